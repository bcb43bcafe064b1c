"""`pst teach` as a whole, as a process: killed, out of disk, capped, and without a key on any disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the package openai")
pytest.importorskip("tenacity", reason="needs the package tenacity")
from chaos import mounts
from faulty_proxy import Fault, faulty_proxy, raw, says, status

from pst_dist.cli.main import run_verb
from pst_dist.data.sources.generators import GENERATORS
from pst_dist.storage.json_files import read_lines

KEY = "sk-this-is-the-key-0123456789"


def words(rows: Path | str, endpoint: str, output: Path, *more: str) -> list[str]:
    where = [
        "--endpoint",
        endpoint,
        "--model",
        "tiny",
        "-o",
        str(output),
        "--reply-tokens",
        "8",
        "--prompt",
        "few_shot",
    ]
    return ["teach", str(rows), "data.answer_type=number", *where, "--retries", "1", *more]


def started(arguments: list[str], **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pst_dist.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )


def asked(proxy) -> Counter:
    """How often each request arrived, by its seed."""
    return Counter(seen.body["seed"] for seen in proxy.seen)


@pytest.fixture
def many(tmp_path) -> Path:
    """Forty questions."""
    file = tmp_path / "many.jsonl"
    lines = [{"question": f"What is {n} + {n + 1}?", "answer": 2 * n + 1} for n in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_kill_costs_at_most_the_requests_in_flight(tmp_path, many, server):
    out, process, kills = tmp_path / "out.jsonl", None, [5, 16, 30]

    def kill(number, body):
        # In the middle of the work of all three workers: their requests are with the server now.
        if kills and number >= kills[0]:
            kills.pop(0)
            process.send_signal(signal.SIGKILL)
        return Fault(delay_seconds=0.05)

    with faulty_proxy(server, kill) as proxy:
        arguments = words(many, proxy.endpoint, out, "--concurrency", "3")
        for _ in range(3):
            process = started(arguments)
            said, _ = process.communicate(timeout=120)
            assert process.returncode == -signal.SIGKILL, said
        process = started(arguments)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    times = asked(proxy)
    assert len(times) == 40, "everything was asked"
    twice = sum(count - 1 for count in times.values())
    assert twice <= 3 * 3, f"each of three kills costs at most three requests, and {twice} were asked again"
    journal = read_lines(tmp_path / "out.teach" / "journal.jsonl")
    assert len({line["key"] for line in journal if "key" in line}) == len(journal) - 1 == 40
    report = json.loads((tmp_path / "out.teach" / "report.json").read_text())
    assert report["complete"] and report["ledger"]["requests"] == 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_requests_in_flight_end(tmp_path, many, server, number):
    process = None

    def stop(count, body):
        if count == 6:
            process.send_signal(number)
        return Fault(delay_seconds=0.3)

    with faulty_proxy(server, stop) as proxy:
        arguments = words(many, proxy.endpoint, tmp_path / "out.jsonl", "--concurrency", "3")
        process = started(arguments)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 75 and "Traceback" not in said, said
        answered = len(read_lines(tmp_path / "out.teach" / "journal.jsonl")) - 1
        assert answered == len(proxy.seen), "every request that was sent is kept"
        proxy.choose = lambda count, body: None
        assert run_verb(arguments) == 0
    assert set(asked(proxy).values()) == {1} and len(proxy.seen) == 40


def test_a_full_disk_keeps_everything_that_was_paid(tmp_path, many, server):
    disk = tmp_path / "disk"
    page = 4096

    def on_a_small_disk() -> tuple[int, str, int, int]:
        # Room for the lock, the reserve of three replies (4 pages), and one page of journal, about twenty lines.
        mounts.small_disk(disk, 6 * page)
        arguments = words(many, proxy.endpoint, disk / "out.jsonl", "--concurrency", "3")
        process = started(arguments)
        said, _ = process.communicate(timeout=120)
        kept = len(read_lines(disk / "out.teach" / "journal.jsonl")) - 1
        mounts.resize(disk, 1000 * page)
        again = started(arguments)
        again.communicate(timeout=120)
        return process.returncode, said, kept, again.returncode

    with faulty_proxy(server) as proxy:
        try:
            code, said, kept, again = mounts.in_own_mounts(on_a_small_disk)
        except PermissionError as error:
            pytest.skip(f"not here: {error}")
    last = said.strip().splitlines()[-1]
    assert code == 4 and last.startswith("pst: error[ENVIRONMENT]") and "No space left" in last, said
    assert "Traceback" not in said and 3 < kept < 40
    assert again == 0 and len(proxy.seen) == 40 and set(asked(proxy).values()) == {1}, "nothing was paid for twice"


def test_a_disk_without_room_for_the_replies_is_refused_before_anything_is_sent(tmp_path, many, server):
    disk = tmp_path / "disk"

    def on_a_tiny_disk() -> tuple[int, str]:
        mounts.small_disk(disk, 4 * 4096)
        process = started(words(many, proxy.endpoint, disk / "out.jsonl", "--concurrency", "50"))
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    with faulty_proxy(server) as proxy:
        try:
            code, said = mounts.in_own_mounts(on_a_tiny_disk)
        except PermissionError as error:
            pytest.skip(f"not here: {error}")
        assert code == 4 and "No space left" in said and proxy.seen == [], said


def test_the_key_reaches_the_server_and_no_disk_log_or_message(tmp_path, rows, server):
    def tell(number, body):
        """A server that repeats the key wherever it can."""
        if number == 0:
            return status(500, f"internal error, your key is {KEY}")
        if number == 1:
            return raw(f"{KEY} is no JSON".encode())
        return says(f"Your key is {KEY}. The answer is 3.", reasoning_content=f"key {KEY}") if number < 6 else None

    out = tmp_path / "out.jsonl"
    with faulty_proxy(server, tell) as proxy:
        for extra in (["-v", "--retries", "3"], ["-v", "--retries", "0"]):
            process = started([*words(rows, proxy.endpoint, out), *extra], OPENAI_API_KEY=KEY, OPENAI_LOG="debug")
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0 and KEY not in said, said
        proxy.choose = lambda number, body: status(401, f"Incorrect API key provided: {KEY}")
        process = started(words(rows, proxy.endpoint, tmp_path / "b.jsonl", "--key-env", "MINE"), MINE=KEY)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 4 and "$MINE" in said and KEY not in said, said
    assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in proxy.seen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "journal.jsonl" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    "more, said",
    [
        (["--key-env", "UNSET_VARIABLE"], "UNSET_VARIABLE: this environment variable is not set"),
        (["--key-env", KEY], "not the name of an environment variable"),
        (["--extra", json.dumps({"api_key": KEY})], "secret"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_shown(tmp_path, rows, capsys, more, said):
    assert run_verb(words(rows, "http://127.0.0.1:1/v1", tmp_path / "o.jsonl", *more)) == 2
    error = capsys.readouterr().err
    assert said in error and KEY not in error


def test_a_cap_stops_before_it_is_exceeded_and_a_higher_one_goes_on(tmp_path, many, server, capsys):
    out = tmp_path / "out.jsonl"
    with faulty_proxy(server) as proxy:
        capped = ["--max-tokens", "8000", "--concurrency", "4"]
        assert run_verb(words(many, proxy.endpoint, out, *capped)) == 75
        assert "--max-tokens 8000" in capsys.readouterr().err
        report = json.loads((tmp_path / "out.teach" / "report.json").read_text())
        ledger = report["ledger"]
        assert not report["complete"]
        assert 4000 < ledger["prompt_tokens"] + ledger["completion_tokens"] <= 8000
        first = len(proxy.seen)
        assert run_verb(words(many, proxy.endpoint, out, *capped)) == 75
        assert len(proxy.seen) == first, "the cap is over all starts"
        prices = ["--price-in", "1", "--price-out", "2", "--max-cost", "1000"]
        assert run_verb(words(many, proxy.endpoint, out, *prices)) == 0
    assert set(asked(proxy).values()) == {1} and len(proxy.seen) == 40
    report = json.loads((tmp_path / "out.teach" / "report.json").read_text())
    ledger = report["ledger"]
    wanted = (ledger["prompt_tokens"] + 2 * ledger["completion_tokens"]) / 1e6
    assert ledger["cost"] == pytest.approx(wanted, abs=1e-6) and ledger["requests_of_earlier_starts"] == first


@pytest.mark.parametrize(
    "more, name",
    [(["--seed", "1"], "--seed"), (["--prompt", "zero_shot"], "--prompt"), (["--model", "b"], "--model")],
)
def test_a_journal_of_other_settings_is_refused_by_name(tmp_path, rows, server, capsys, more, name):
    out = tmp_path / "out.jsonl"
    with faulty_proxy(server) as proxy:
        assert run_verb(words(rows, proxy.endpoint, out)) == 0
        count = len(proxy.seen)
        assert run_verb([*words(rows, proxy.endpoint, out), *more]) == 3
        assert name in capsys.readouterr().err
        rows.write_text(rows.read_text().replace("What is 1", "What is 9"))
        assert run_verb(words(rows, proxy.endpoint, out)) == 3
        assert "ROWS" in capsys.readouterr().err
        assert len(proxy.seen) == count


def test_more_samples_and_more_rows_go_on_from_a_trial(tmp_path, rows, server):
    out = tmp_path / "out.jsonl"
    warm = ["--temperature", "0.7"]
    with faulty_proxy(server) as proxy:
        assert run_verb([*words(rows, proxy.endpoint, out), *warm, "--limit", "2"]) == 0
        assert len(proxy.seen) == 2
        assert run_verb([*words(rows, proxy.endpoint, out), *warm, "--samples", "2"]) == 0
    assert len(proxy.seen) == 12 and set(asked(proxy).values()) == {1}


def test_a_dry_run_asks_nothing_and_writes_nothing(tmp_path, rows, capsys):
    more = ["--dry-run", "--price-in", "1", "--price-out", "2", "--samples", "2"]
    before = sorted(tmp_path.rglob("*"))
    assert run_verb([*words(rows, "http://127.0.0.1:1/v1", tmp_path / "o.jsonl", *more)]) == 0
    said = capsys.readouterr().out
    assert "requests           12" in said and "at most 96" in said and "cost" in said
    assert sorted(tmp_path.rglob("*")) == before


def answering(number, body):
    """A teacher that adds right, but for the sums of 7, and that can make up questions."""
    text = body["messages"][-1]["content"]
    if "in the manner of this one" in text:
        n = 10 + int(text.split("What is ")[1].split()[0])
        made = [
            f"Question: A hut has {n} owls and {n} bats on its roof. How many animals sit there?\n"
            f"Reasoning: {n} + {n} = {2 * n}\nAnswer: {2 * n}",
            f"Question: A cart carries {n} melons and {n} plums. How many fruits is that?\n"
            f"Reasoning: {n} + {n} = {2 * n}\nAnswer: {2 * n + 1}",
        ]
        return says("\n\n".join(made))
    numbers = [int(word.strip("?")) for word in text.split() if word.strip("?").isdigit()]
    total = sum(numbers[:2])
    shown = 8 if total == 7 else total
    return says(f"Way {number}: {numbers[0]} and {numbers[1]} make {shown}. The answer is {shown}.")


def test_the_output_is_checked_and_run_as_it_is_and_synthetic_rows_stay_marked(tmp_path, rows, server, capsys):
    test = tmp_path / "test.jsonl"
    test.write_text(
        json.dumps({"question": "A hut has 3 owls and 3 bats on its roof. How many animals sit there?"}) + "\n"
    )
    out = tmp_path / "out.jsonl"
    with faulty_proxy(server, answering) as proxy:
        arguments = [*words(rows, proxy.endpoint, out), "--samples", "2", "--new-questions", "2", "--near", "0.95"]
        assert run_verb([*arguments, "--avoid", str(test)]) == 0
    said = capsys.readouterr().out
    made = [line for line in read_lines(out) if line.get("synthetic")]
    given = [line for line in read_lines(out) if not line.get("synthetic")]
    assert len(given) == 5, "the sum of 7 was wrong both times"
    # Six huts are like the test question but for their numbers, and six carts have a wrong answer.
    assert made == [] and "near avoided 6" in said and "disagree 6" in said
    out2 = tmp_path / "out2.jsonl"
    with faulty_proxy(server, answering) as proxy:
        arguments = [*words(rows, proxy.endpoint, out2), "--samples", "2", "--new-questions", "2", "--near", "0.95"]
        assert run_verb(arguments) == 0
    made = [line for line in read_lines(out2) if line.get("synthetic")]
    assert len(made) == 6 and {line["answer"] for line in made} == {str(2 * n) for n in range(11, 17)}
    assert all(line["synthetic"] is True and line["taught_by"] == "tiny" and line["like"] for line in made)
    assert all(len(line["rationales"]) == 3 for line in made), "the proposed one and two that found the same answer"
    capsys.readouterr()
    assert run_verb(["check", str(out2), "data.answer_type=number", "--rejects", str(tmp_path / "rejects.jsonl")]) == 0
    assert "6 questions were made up by a model" in capsys.readouterr().out
    run = [f"data.train={out2}", "data.answer_type=number", "data.validation_size=2", "data.test_size=2"]
    tiny = ["student.fresh.hidden_size=16", "student.fresh.num_layers=1", "student.fresh.num_heads=2"]
    short = ["train.max_steps=2", "train.report_to=none", "evaluate.max_new_tokens=4", "evaluate.latency_rows=0"]
    config = tmp_path / "run.yaml"
    config.write_text("arm: post_thinking\n")
    assert run_verb(["run", str(config), f"output_dir={tmp_path / 'run'}", *run, *tiny, *short]) == 0
    manifests = {
        path.parent.name: json.loads(path.read_text())["extra"].get("synthetic")
        for path in (tmp_path / "run").rglob("manifest.json")
        if "checkpoint" not in str(path)
    }
    assert {"shards", "best", "export"} <= manifests.keys()
    for name, found in manifests.items():
        assert found and sum(found["rows"].values()) == 6 and found["made_by"] == ["tiny"], name
    card = next((tmp_path / "run").rglob("README.md")).read_text()
    assert "were made up by `tiny`" in card and "Synthetic data" in card


def test_rows_without_answers_take_what_the_samples_agree_on(tmp_path, server):
    file = tmp_path / "bare.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {n} + 2?"}) + "\n" for n in range(1, 4)))
    with faulty_proxy(server, answering) as proxy:
        assert run_verb([*words(file, proxy.endpoint, tmp_path / "out.jsonl"), "--samples", "3"]) == 0
    assert [line["answer"] for line in read_lines(tmp_path / "out.jsonl")] == ["3", "4", "5"]


def test_one_sample_of_rows_without_answers_is_refused_before_it_is_paid(tmp_path, capsys):
    file = tmp_path / "bare.jsonl"
    file.write_text('{"question": "What is 1 + 2?"}\n')
    assert run_verb(words(file, "http://127.0.0.1:1/v1", tmp_path / "out.jsonl")) == 2
    assert "--samples 3" in capsys.readouterr().err


def test_the_output_never_replaces_a_file_of_somebody_else(tmp_path, rows, capsys):
    for place, said in (
        (rows, "input"),
        (tmp_path / "other.jsonl", "not written by pst"),
        (tmp_path / "x.csv", ".jsonl"),
    ):
        if place.name == "other.jsonl":
            place.write_text('{"question": "mine"}\n')
        assert run_verb(words(rows, "http://127.0.0.1:1/v1", place)) == 2
        assert said in capsys.readouterr().err


def test_a_generator_can_be_taught(tmp_path, server):
    assert "coin_flip" in GENERATORS
    with faulty_proxy(server) as proxy:
        arguments = ["teach", "gen:coin_flip?rows=3&seed=1", "task=coin_flip", "-o", str(tmp_path / "o.jsonl")]
        arguments += ["--endpoint", proxy.endpoint, "--model", "tiny", "--reply-tokens", "4"]
        assert run_verb(arguments) == 0
    assert len(proxy.seen) == 3
