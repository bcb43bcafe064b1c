"""The client of an OpenAI-compatible endpoint, against a real llama.cpp server behind a proxy that fails."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the package openai")
pytest.importorskip("tenacity", reason="needs the package tenacity")
from faulty_proxy import Fault, faulty_proxy, raw, says, status
from ports import free_port

from pst_dist.config.loading import load_config
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, PstError
from pst_dist.publish.gguf.server import server_command
from pst_dist.storage.json_files import read_lines
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.teach import teach


def settings(tmp_path: Path, endpoint: str, **more) -> TeachSettings:
    values = {"reply_tokens": 8, "retries": 2, "prompts": ("few_shot",), "timeout_seconds": 20.0} | more
    return TeachSettings(output=tmp_path / "out.jsonl", endpoint=endpoint, model="tiny", **values)


def config(rows: Path, *words: str):
    return load_config(None, [f"data.train={rows}", "data.answer_type=number", *words])


def journal(tmp_path: Path) -> list[dict]:
    return [line for line in read_lines(tmp_path / "out.teach" / "journal.jsonl") if "key" in line]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_real_server_is_asked_once_per_request(tmp_path, rows, server, api):
    with faulty_proxy(server) as proxy:
        outcome = teach(config(rows), settings(tmp_path, proxy.endpoint, api=api, seed=3))
        assert len(proxy.seen) == 6
        again = teach(config(rows), settings(tmp_path, proxy.endpoint, api=api, seed=3))
        assert len(proxy.seen) == 6, "a finished job asks nothing"
    assert outcome.rows == again.rows and outcome.report["quality"] == again.report["quality"]
    path = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}[api]
    assert {seen.path for seen in proxy.seen} == {path}
    assert len({seen.body["seed"] for seen in proxy.seen}) == 6
    ledger = outcome.report["ledger"]
    lines = journal(tmp_path)
    assert ledger["requests"] == len(lines) == 6
    assert ledger["completion_tokens"] == sum(line["usage"]["completion"] for line in lines) > 0
    assert ledger["prompt_tokens"] > 6 * 20 and ledger["requests_with_estimated_tokens"] == 0
    # Eight tokens of noise: the server says that it cut them, and so do we.
    assert {line["finish"] for line in lines} == {"length"}
    assert len(read_lines(tmp_path / "out.teach" / "cut.jsonl")) == 6 and outcome.rows == ()


def test_retry_after_holds_back_every_request(tmp_path, rows, server):
    times: list[float] = []

    def storm(number, body):
        times.append(time.monotonic())
        return status(429, "slow down", retry_after=2) if number < 3 else None

    with faulty_proxy(server, storm) as proxy:
        outcome = teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=3))
    assert len(journal(tmp_path)) == 6 and len(proxy.seen) == 9
    assert times[3] - times[2] >= 1.9, "nobody may come back before the time that the server asked for"
    assert outcome.report["ledger"]["failed_attempts"] == {"429": 3}


PASSING = {
    "500": status(500, "oops"),
    "502 without JSON": raw(b"<html>bad gateway</html>", 502, "text/html"),
    "429 without a time": status(429, "slow down"),
    "408": status(408),
    "cut": Fault(cut=True),
    "dropped": Fault(drop=True),
    "half JSON": raw(b'{"choices": [{"message":'),
    "no choices": raw(b'{"choices": []}'),
    "choices of a wrong type": raw(b'{"choices": 5}'),
    "text for a wrong type": raw(b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}'),
    "HTML with 200": raw(b"<html>welcome</html>", 200, "text/html"),
    "nothing": raw(b""),
    "empty text": says(""),
    "null text": says(None),
    "a list": raw(b"[1, 2]"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(tmp_path, rows, server, name):
    with faulty_proxy(server, lambda number, body: PASSING[name] if number == 1 else None) as proxy:
        outcome = teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1))
    assert len(journal(tmp_path)) == 6 and len(proxy.seen) == 7
    assert sum(outcome.report["ledger"]["failed_attempts"].values()) == 1


@pytest.mark.parametrize("name", ["500", "429 without a time", "cut", "half JSON"])
def test_what_never_passes_ends_after_the_retries_and_keeps_what_was_paid(tmp_path, rows, server, name):
    with faulty_proxy(server, lambda number, body: PASSING[name] if number >= 2 else None) as proxy:
        with pytest.raises(EnvironmentFault) as caught:
            teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1, retries=1))
        assert len(proxy.seen) == 4, "two replies, and one request with one repetition"
        line = str(caught.value)
        assert "\n" not in line and "tried 2 times" in line and "same command" in line and len(line) < 500
        assert len(journal(tmp_path)) == 2
        proxy.choose = lambda number, body: None
        teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1, retries=1))
        assert len(proxy.seen) == 4 + 4, "the two that were paid for are not asked again"


def four(number, body):
    return says("Two and two are four. The answer is 4.")


@pytest.mark.parametrize("empty", [says(""), says(None), says(None, tool_calls=[])])
def test_a_question_that_gets_no_text_each_time_does_not_stop_the_job(tmp_path, rows, server, empty):
    with faulty_proxy(server, lambda number, body: empty if number in (1, 2) else four(number, body)) as proxy:
        teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1, retries=1))
        assert len(proxy.seen) == 7
    assert sorted(line["text"] for line in journal(tmp_path)) == ["", *["Two and two are four. The answer is 4."] * 5]


def test_a_server_that_says_nothing_any_more_ends_the_job(tmp_path, rows, server):
    with faulty_proxy(server, lambda number, body: four(number, body) if number == 0 else says("")) as proxy:
        with pytest.raises(EnvironmentFault, match=r"the reply is empty \(tried 2 times\)"):
            teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1, retries=1))
        assert len(proxy.seen) == 1 + 3 * 2, "the third question in a row ends it"


@pytest.mark.parametrize(
    ("reply", "text", "thought", "finish"),
    [
        (says(None, "content_filter"), "", None, "content_filter"),
        (says(None, refusal="I cannot help with that."), "I cannot help with that.", None, "refused"),
        (says([{"type": "text", "text": "It is"}, {"type": "text", "text": "4."}]), "It is\n4.", None, "stop"),
        (
            says([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "4"}]),
            "4",
            "Hm.",
            "stop",
        ),
        (says(None, "length", reasoning_content="Hm, 2"), "", "Hm, 2", "length"),
    ],
)
def test_other_forms_of_a_reply_are_read_at_once(tmp_path, rows, server, reply, text, thought, finish):
    with faulty_proxy(server, lambda number, body: reply) as proxy:
        teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1))
        assert len(proxy.seen) == 6
    assert {(line["text"], line["thought"], line["finish"]) for line in journal(tmp_path)} == {(text, thought, finish)}


def test_what_a_server_says_about_a_failure_is_shown(tmp_path, rows, server):
    detail = b'{"detail": [{"loc": ["body", "seed"], "msg": "extra fields not permitted"}]}'
    busy = b'{"error": {"message": "model overloaded", "code": 503}}'
    for fault, words in (
        (raw(detail, 422), "422: body.seed: extra fields not permitted"),
        (raw(b'{"detail": "no such route"}', 400), "400: no such route"),
        (raw(busy), "the reply has an error: model overloaded"),
        (status(401, "no"), "the server wants a key, and $OPENAI_API_KEY is unset"),
    ):
        with faulty_proxy(server, lambda number, body, fault=fault: fault) as proxy, pytest.raises(PstError) as caught:
            teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1, retries=0))
        assert words in str(caught.value)


def test_a_pause_that_is_too_long_ends_the_job(tmp_path, rows, server):
    with faulty_proxy(server, lambda number, body: status(429, "quota", retry_after=7200)) as proxy:
        with pytest.raises(EnvironmentFault, match="asks to wait 7200 s"):
            teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1))
        assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    "fault, kind, words",
    [
        (status(401, "Incorrect API key provided"), EnvironmentFault, ["OPENAI_API_KEY", "401"]),
        (status(403, "not allowed"), EnvironmentFault, ["403"]),
        (status(404, "The model `tiny` does not exist"), InputError, ["no model 'tiny'", "--model"]),
        (status(400, "Unsupported parameter: 'seed'"), InputError, ["'seed'", "--omit"]),
        (status(307, "moved", location="https://elsewhere.example/v1"), InputError, ["elsewhere.example", "redirects"]),
    ],
)
def test_what_cannot_pass_is_told_at_once(tmp_path, rows, server, fault, kind, words):
    with faulty_proxy(server, lambda number, body: fault) as proxy:
        with pytest.raises(kind) as caught:
            teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1))
        assert len(proxy.seen) == 1
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert proxy.url in str(caught.value)


def test_a_request_that_is_too_long_is_left_out_and_the_others_go_on(tmp_path, server):
    file = tmp_path / "rows.jsonl"
    questions = ["What is 1 + 1?", "What is 2 + 2? " + "Think. " * 3000, "What is 3 + 3?"]
    file.write_text("".join(json.dumps({"question": text, "answer": 4}) + "\n" for text in questions))
    outcome = teach(config(file), settings(tmp_path, f"{server}/v1", concurrency=1))
    assert outcome.report["quality"]["verdicts"] == {"cut": 2, "refused": 1}
    assert outcome.report["complete"] is True


def test_a_proxy_of_the_environment_is_not_given_what_is_for_this_machine(tmp_path, rows, server, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with faulty_proxy(server, lambda number, body: status(502, "a proxy")) as elsewhere:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.url)
        outcome = teach(config(rows), settings(tmp_path, f"{server}/v1", retries=0))
        assert outcome.report["complete"] and elsewhere.seen == []


def test_a_host_that_nobody_listens_on_is_told_soon(tmp_path, rows):
    started = time.monotonic()
    with pytest.raises(EnvironmentFault) as caught:
        teach(config(rows), settings(tmp_path, f"http://127.0.0.1:{free_port()}/v1", retries=6))
    assert time.monotonic() - started < 30
    line = str(caught.value)
    assert "no connection" in line and "check --endpoint" in line and "\n" not in line and "tried 3 times" in line


def test_a_reply_that_does_not_come_is_a_timeout(tmp_path, rows, server):
    with faulty_proxy(server, lambda number, body: Fault(delay_seconds=5)) as proxy:
        with pytest.raises(EnvironmentFault, match="no reply within 1 s"):
            teach(config(rows), settings(tmp_path, proxy.endpoint, timeout_seconds=1.0, retries=1, concurrency=1))
        assert len(proxy.seen) == 2


def test_a_server_that_dies_in_the_middle_keeps_what_it_answered(tmp_path, rows, tiny_gguf):
    process = subprocess.Popen(
        server_command(tiny_gguf, slots=2, context=4096),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = next(line for line in process.stdout if line.startswith("http")).strip()

        def die(number, body):
            if number == 3:
                process.kill()
                process.wait()
            return None

        with faulty_proxy(url, die) as proxy:
            with pytest.raises(EnvironmentFault, match="no connection"):
                teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1, retries=1))
        assert len(journal(tmp_path)) == 3
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_as_many_requests_as_allowed_are_in_flight(tmp_path, rows, server):
    with faulty_proxy(server, lambda number, body: Fault(delay_seconds=0.3)) as proxy:
        teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=3))
    assert proxy.most_in_flight == 3


def test_requests_per_minute_are_kept(tmp_path, rows, server):
    started = time.monotonic()
    with faulty_proxy(server) as proxy:
        teach(config(rows), settings(tmp_path, proxy.endpoint, requests_per_minute=40.0, concurrency=6))
    assert len(proxy.seen) == 6
    assert time.monotonic() - started >= 3, "four at once, then one each 1.5 s"


def test_reasoning_is_separated_from_the_reply(tmp_path, rows, server):
    replies = [
        says("<think>hm, three</think>One and two are three. The answer is 3."),
        says("Two and three are five. The answer is 5.", reasoning_content="let me see"),
        says("Three and four are seven. The answer is 7.", reasoning="short"),
        says("<think>never ends", "stop"),
        says(None, "length", reasoning_content="thinking and thinking"),
        says("13"),
    ]
    with faulty_proxy(server, lambda number, body: replies[number]) as proxy:
        outcome = teach(config(rows), settings(tmp_path, proxy.endpoint, concurrency=1))
    assert [row["rationales"] for row in outcome.rows] == [
        ["One and two are three."],
        ["Two and three are five."],
        ["Three and four are seven."],
    ]
    assert [line["thought"] for line in journal(tmp_path)][1:3] == ["let me see", "short"]
    assert outcome.report["quality"]["verdicts"] == {"kept": 3, "cut": 2, "no_rationale": 1}


def test_a_server_without_usage_is_counted_by_estimate(tmp_path, rows, server):
    with faulty_proxy(server, lambda number, body: says("The answer is 3.", usage=None)) as proxy:
        outcome = teach(config(rows), settings(tmp_path, proxy.endpoint))
    ledger = outcome.report["ledger"]
    assert ledger["requests_with_estimated_tokens"] == 6 and ledger["prompt_tokens"] > 100


def test_fields_can_be_left_out_and_added(tmp_path, rows, server):
    more = {"omit": ("seed", "max_tokens"), "extra": {"max_completion_tokens": 8}}
    with faulty_proxy(server, lambda number, body: says("The answer is 3.")) as proxy:
        teach(config(rows), settings(tmp_path, proxy.endpoint, **more))
    body = proxy.seen[0].body
    assert "seed" not in body and "max_tokens" not in body and body["max_completion_tokens"] == 8


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://user:pass@host/v1",
        "https://host/v1?api_key=sk-1234567890",
        "http://sk-123456@host/v1",
        "host/v1",
        "ftp://h",
    ],
)
def test_an_endpoint_with_a_secret_or_no_url_is_refused_without_showing_it(tmp_path, endpoint):
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, endpoint)
    assert not any(secret in str(caught.value) for secret in ("pass@", "sk-1234"))
