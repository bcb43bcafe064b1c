"""Requests and replies as files: what the file asks, which replies are taken, and what is asked again."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the package openai")
from faulty_proxy import faulty_proxy

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.errors import ConfigError, InputError
from pst_dist.storage.json_files import read_lines
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.teach import teach


@pytest.fixture
def config(rows):
    return load_config(None, [f"data.train={rows}", "data.answer_type=number"])


def settings(tmp_path: Path, *replies: Path, **more) -> TeachSettings:
    values = {"prompts": ("few_shot",), "batch": tmp_path / "requests.jsonl", "model": "m"} | more
    return TeachSettings(output=tmp_path / "out.jsonl", replies=replies, **values)


def says(request: dict, text: str | None, finish: str = "stop", status: int = 200, **message) -> dict:
    """A line of a batch's output, as OpenAI and vLLM write it."""
    said = {"role": "assistant", "content": text, **message}
    body = {"choices": [{"index": 0, "message": said, "finish_reason": finish}], "object": "chat.completion"}
    body["usage"] = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45}
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}


def fails(request: dict, status: int, message: str) -> dict:
    """A failed line, as vLLM writes it; OpenAI's has an object for `error`."""
    response = {"status_code": status, "request_id": "r", "body": None}
    return {"id": "b", "custom_id": request["custom_id"], "response": response, "error": message}


def output(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answer_of(request: dict) -> str:
    """The right reply to a question like `What is 3 + 4?`."""
    asked = request["body"]["messages"][-1]["content"]
    one, two = (int(word.strip("?")) for word in asked.split("What is ")[-1].split("?")[0].split(" + "))
    return f"I add {one} and {two} to get {one + two}. The answer is {one + two}."


def requests_in(tmp_path: Path) -> list[dict]:
    return read_lines(tmp_path / "requests.jsonl")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_batch_asks_a_real_server_what_live_requests_ask_and_ends_alike(tmp_path, rows, config, server, api):
    common = {"prompts": ("zero_shot",), "reply_tokens": 8, "seed": 3, "api": api, "model": "tiny"}
    with faulty_proxy(server) as proxy:
        (tmp_path / "live").mkdir()
        live = TeachSettings(output=tmp_path / "live" / "out.jsonl", endpoint=proxy.endpoint, concurrency=1, **common)
        teach(config, live)
        asked = sorted(json.dumps(seen.body, sort_keys=True) for seen in proxy.seen)
    taken: list[Path] = []
    bodies: list[str] = []
    for number in range(3):
        outcome = teach(config, settings(tmp_path, *taken, **common))
        if not outcome.waiting:
            break
        lines = []
        for request in requests_in(tmp_path):
            bodies.append(json.dumps(request["body"], sort_keys=True))
            url, content = server.removesuffix("/v1").rstrip("/") + request["url"], json.dumps(request["body"]).encode()
            sent = urllib.request.Request(url, content, {"Content-Type": "application/json"})
            with urllib.request.urlopen(sent, timeout=60) as answer:
                response = {"status_code": answer.status, "request_id": "r", "body": json.load(answer)}
            lines.append({"id": "b", "custom_id": request["custom_id"], "response": response, "error": None})
        taken.append(output(tmp_path / f"replies-{number}.jsonl", lines))
    assert not outcome.waiting and not (tmp_path / "requests.jsonl").exists()
    firsts, of_live = (sorted(body for body in some if "Therefore" not in body) for some in (bodies, asked))
    assert firsts == of_live and len(firsts) == 6, "the first request of each question, the same as live"
    ledger = outcome.report["ledger"]
    assert ledger["requests"] == len(bodies) and ledger["requests_with_estimated_tokens"] == 0
    again = teach(config, settings(tmp_path, *taken, **common))
    assert again.report["quality"] == outcome.report["quality"] and not again.waiting


def test_a_prompt_of_two_steps_takes_two_rounds_and_right_answers_are_kept(tmp_path, config):
    assert teach(config, settings(tmp_path, prompts=("zero_shot",))).waiting == 6
    first = requests_in(tmp_path)
    one = output(tmp_path / "one.jsonl", [says(request, answer_of(request)) for request in reversed(first)])
    assert teach(config, settings(tmp_path, one, prompts=("zero_shot",))).waiting == 6
    second = requests_in(tmp_path)
    assert not {request["custom_id"] for request in first} & {request["custom_id"] for request in second}
    assert all("The answer is" in json.dumps(request["body"]) for request in second), "it contains the first reply"
    told = [answer_of(request).split()[-1].rstrip(".") for request in first]
    two = output(tmp_path / "two.jsonl", [says(request, f" {n}.") for request, n in zip(second, told, strict=True)])
    done = teach(config, settings(tmp_path, one, two, prompts=("zero_shot",)))
    assert [row["answer"] for row in done.rows] == ["3", "5", "7", "9", "11", "13"] and done.report["complete"]
    assert not (tmp_path / "requests.jsonl").exists() and not done.waiting


def test_an_answer_without_a_status_around_it_is_read_too(tmp_path, config):
    teach(config, settings(tmp_path))
    lines = [says(request, answer_of(request)) for request in requests_in(tmp_path)]
    bare = [line | {"response": line["response"]["body"]} for line in lines]
    assert len(teach(config, settings(tmp_path, output(tmp_path / "replies.jsonl", bare))).rows) == 6


def test_what_failed_is_asked_again_and_what_is_there_never(tmp_path, config):
    teach(config, settings(tmp_path))
    a, b, c, d, e, f = requests_in(tmp_path)
    wrong = {"error": {"code": "batch_expired", "message": "too late"}, "response": None, "custom_id": e["custom_id"]}
    lines = [
        fails(d, 400, "the prompt is too long"),  # before any reply: it is final all the same
        says(a, answer_of(a)),
        says(a, "The answer is 99."),  # a second reply to the same request
        says(b, answer_of(b), finish="length"),
        fails(c, 500, "oops"),
        wrong,
        says(f, "", reasoning_content="I think."),
        "",
        says({"custom_id": "pst-of-another-job"}, "The answer is 1."),
    ]
    replies = output(tmp_path / "replies.jsonl", lines)
    outcome = teach(config, settings(tmp_path, replies))
    assert outcome.waiting == 2 and [line["custom_id"] for line in requests_in(tmp_path)] == [
        c["custom_id"],
        e["custom_id"],
    ]
    assert outcome.report["ledger"]["failed_attempts"] == {"500": 1, "batch_expired": 1}
    assert [row["answer"] for row in outcome.rows] == ["3"] and not outcome.report["complete"]
    verdicts = outcome.report["quality"]["verdicts"]
    assert verdicts == {"kept": 1, "cut": 1, "empty": 1, "refused": 1}
    before = (tmp_path / "out.teach" / "journal.jsonl").read_bytes()
    assert teach(config, settings(tmp_path, replies)).waiting == 2
    assert (tmp_path / "out.teach" / "journal.jsonl").read_bytes() == before


def test_new_questions_are_checked_in_a_round_of_their_own(tmp_path, config):
    asking = {"samples": 2, "new_questions": 1, "limit": 1}
    assert teach(config, settings(tmp_path, **asking)).waiting == 2 + 1, "two samples, and one new question to ask for"
    *samples, invention = requests_in(tmp_path)
    new = "Question: A pond has 12 frogs and 5 jump out. How many stay?\nReasoning: 12 - 5 = 7.\nAnswer: 7"
    lines = [
        says(samples[0], answer_of(samples[0])),
        says(samples[1], "It is 3. The answer is 3."),
        says(invention, new),
    ]
    one = output(tmp_path / "one.jsonl", lines)
    assert teach(config, settings(tmp_path, one, **asking)).waiting == 2, "two samples that check the new question"
    checks = requests_in(tmp_path)
    assert all("12 frogs" in json.dumps(request["body"]) for request in checks)
    texts = ("12 less 5 is 7. The answer is 7.", "7 frogs stay. The answer is 7.")
    two = output(tmp_path / "two.jsonl", [says(request, text) for request, text in zip(checks, texts, strict=True)])
    done = teach(config, settings(tmp_path, one, two, **asking))
    assert [row["answer"] for row in done.rows] == ["3", "7"] and done.rows[1]["synthetic"] and not done.waiting


def test_a_live_server_can_finish_what_a_batch_left(tmp_path, config, server):
    common = {"model": "tiny", "reply_tokens": 8}
    teach(config, settings(tmp_path, **common))
    first, *_ = requests_in(tmp_path)
    replies = output(tmp_path / "replies.jsonl", [says(first, answer_of(first))])
    with faulty_proxy(server) as proxy:
        outcome = teach(config, settings(tmp_path, replies, batch=None, endpoint=proxy.endpoint, **common))
        assert len(proxy.seen) == 5
    assert outcome.report["complete"] and outcome.rows[0]["answer"] == "3"


def test_caps_hold_for_a_batch_too(tmp_path, config):
    outcome = teach(config, settings(tmp_path, max_tokens=3000, reply_tokens=100))
    assert 0 < outcome.waiting < 6 and outcome.cap == "--max-tokens 3000"
    assert len(requests_in(tmp_path)) == outcome.waiting
    none = teach(config, settings(tmp_path, max_tokens=10, reply_tokens=100))
    assert none.waiting == 0 and none.cap == "--max-tokens 10" and not (tmp_path / "requests.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"replies\.jsonl:2: .*JSON"),
        ("[1]", r"replies\.jsonl:2: is not a reply of a batch; --replies takes the output"),
        ('{"custom_id": "a", "body": {}}', "is not a reply of a batch"),
        ('{"custom_id": 5, "response": {}}', "is not a reply of a batch"),
    ],
)
def test_a_line_that_is_no_reply_is_named(tmp_path, config, line, said):
    teach(config, settings(tmp_path))
    first, *_ = requests_in(tmp_path)
    replies = output(tmp_path / "replies.jsonl", [says(first, answer_of(first)), line])
    with pytest.raises(InputError, match=said):
        teach(config, settings(tmp_path, replies))
    kept = [row for row in read_lines(tmp_path / "out.teach" / "journal.jsonl") if "key" in row]
    assert len(kept) == 1, "the replies before it are not lost"


def test_replies_of_another_job_or_to_nothing_are_refused(tmp_path, config):
    teach(config, settings(tmp_path))
    other = output(tmp_path / "other.jsonl", [says({"custom_id": "request-1"}, "The answer is 1.")])
    with pytest.raises(InputError, match="none of its replies is to a request of this job"):
        teach(config, settings(tmp_path, other))
    every = [fails(request, 400, "unknown field: seed") for request in requests_in(tmp_path)]
    with pytest.raises(InputError, match=r"no request was accepted \(400: unknown field: seed\); see --omit"):
        teach(config, settings(tmp_path, output(tmp_path / "all.jsonl", every)))
    with pytest.raises(InputError, match="missing"):
        teach(config, settings(tmp_path, tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"endpoint": "http://localhost:1/v1"}, "name one teacher"),
        ({"teacher_model": "smollm2"}, "name one teacher"),
        ({"model": None}, "--batch needs --model"),
        ({"batch": None, "teacher_model": "smollm2", "replies": (Path("x"),)}, "--replies are those of a batch"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, values, said):
    with pytest.raises(ConfigError, match=said):
        TeachSettings(**{"output": tmp_path / "o.jsonl", "batch": tmp_path / "r.jsonl", "model": "m"} | values)


def test_the_requests_replace_no_file_of_anybody_else(tmp_path, rows, config):
    (tmp_path / "mine.jsonl").write_text('{"question": "mine"}\n')
    for path, said in (
        (tmp_path / "mine.jsonl", "was not written by pst"),
        (rows, "is an input of this command"),
        (tmp_path / "out.jsonl", "is the output too"),
        (tmp_path / "requests.txt", r"ending in \.jsonl"),
    ):
        with pytest.raises((ConfigError, InputError), match=said):
            teach(config, settings(tmp_path, batch=path))
    assert (tmp_path / "mine.jsonl").read_text() == '{"question": "mine"}\n'


def test_the_command_says_what_to_run_next(tmp_path, rows, capsys):
    words = ["teach", str(rows), "data.answer_type=number", "-o", str(tmp_path / "out.jsonl"), "--model", "m"]
    words += ["--prompt", "few_shot", "--batch", str(tmp_path / "requests.jsonl")]
    assert run_verb(words) == 0
    said = capsys.readouterr().out
    assert "requests.jsonl: 6 requests. Run them" in said and "vllm run-batch -i" in said and "--replies" in said
    lines = [says(request, answer_of(request)) for request in requests_in(tmp_path)]
    assert run_verb([*words, "--replies", str(output(tmp_path / "replies.jsonl", lines))]) == 0
    assert "6 of 6 questions have a rationale" in capsys.readouterr().out
