"""Files of questions: every row's answer in order, whatever kills the command, and nothing else is overwritten."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from talking import TALKS, messages
from tiny import ROWS, fitted

import pst_dist
from pst_dist.answering.files import AnswerJob, answer_file
from pst_dist.answering.windows import BATCHES_PER_WINDOW, AnswerSettings
from pst_dist.cli.main import run_verb
from pst_dist.errors import DataError, InputError, IntegrityError, LockedError, StaleError
from pst_dist.storage.locks import directory_lock
from pst_dist.student.ask import answer_question
from pst_dist.student.saved import LoadedStudent, load_student

SETTINGS = AnswerSettings(batch_size=2, max_new_tokens=24)
WINDOW = 2 * BATCHES_PER_WINDOW
ASKED = [{"id": n, "question": ROWS[n % 4].question + " " * (n % 3), "tags": ["é", n]} for n in range(2 * WINDOW + 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student")
    fitted("pst").save(path / "best")
    return path


@pytest.fixture(scope="module")
def student(folder) -> LoadedStudent:
    return load_student(folder / "best", "cpu")


def write(path: Path, rows=ASKED) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def job(source: Path | str, output: Path | str, settings: AnswerSettings = SETTINGS, **more) -> AnswerJob:
    return AnswerJob(str(source), str(output), settings=settings, **more)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_keeps_its_columns_and_gets_its_answer_in_order(student, tmp_path):
    settings = AnswerSettings(explain=True, confidence=True, batch_size=2, max_new_tokens=24)
    done = answer_file(job(write(tmp_path / "q.jsonl"), tmp_path / "a.jsonl", settings), student)
    assert (done.rows, done.skipped, done.resumed) == (len(ASKED), 0, 0)
    answers = read(tmp_path / "a.jsonl")
    assert [{name: row[name] for name in ("id", "question", "tags")} for row in answers] == ASKED
    for n, row in enumerate(answers):
        known = ROWS[n % 4]
        assert (row["student_answer"], row["student_rationale"]) == (known.answer, known.rationales[0])
    one = answer_question(student, ASKED[0]["question"], explain=False, max_new_tokens=24)
    assert answers[0]["student_tokens"] == one.tokens and answers[0]["student_complete"]
    assert answers[0]["student_probability"] == pytest.approx(one.probability, abs=2e-5)
    assert answers[0]["student_confidence"] == pytest.approx(one.confidence, abs=2e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.manifest.json", "q.jsonl"]


def test_the_same_command_does_nothing_and_others_are_refused(student, tmp_path):
    questions, output = write(tmp_path / "q.jsonl", ASKED[:3]), tmp_path / "a.jsonl"
    answer_file(job(questions, output), student)
    before, stamp = output.read_bytes(), output.stat().st_mtime_ns
    assert answer_file(job(questions, output), student).resumed == 3
    assert output.stat().st_mtime_ns == stamp
    longer = AnswerSettings(batch_size=2, max_new_tokens=25)
    with pytest.raises(StaleError, match=r"made from other questions, another student or other settings.*--rebuild"):
        answer_file(job(questions, output, longer), student)
    write(questions, ASKED[1:4])
    with pytest.raises(StaleError):
        answer_file(job(questions, output), student)
    assert output.read_bytes() == before
    answer_file(job(questions, output), student, rebuild=True)
    assert [row["id"] for row in read(output)] == [1, 2, 3]
    output.write_bytes(before)
    with pytest.raises(IntegrityError, match="was changed after it was written"):
        answer_file(job(questions, output), student)
    (tmp_path / "a.jsonl.manifest.json").unlink()
    with pytest.raises(StaleError):
        answer_file(job(questions, output), student)


def test_what_pst_did_not_write_is_not_overwritten(student, tmp_path):
    questions = write(tmp_path / "q.jsonl", ASKED[:3])
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"answer": 5}\n')
    for name in ("mine.jsonl", "q.jsonl"):
        with pytest.raises(InputError, match=r"is an input of this command|was not written by pst"):
            answer_file(job(questions, tmp_path / name), student)
    (tmp_path / "new.jsonl.partial").write_text("a diary\n")
    with pytest.raises(InputError, match=r"new\.jsonl\.partial.*was not written by pst"):
        answer_file(job(questions, tmp_path / "new.jsonl"), student)
    (tmp_path / "link.jsonl").symlink_to(mine)
    with pytest.raises(InputError, match="is a link"):
        answer_file(job(questions, tmp_path / "link.jsonl"), student)
    assert mine.read_text() == '{"answer": 5}\n' and len(read(questions)) == 3


@pytest.mark.parametrize("kept", [0, 1, WINDOW, WINDOW + 3])
def test_a_torn_file_is_continued_to_the_same_bytes(student, tmp_path, kept):
    """What a kill leaves: some lines, perhaps part of one, and the manifest of answers that are not finished."""
    questions, output = write(tmp_path / "q.jsonl"), tmp_path / "a.jsonl"
    answer_file(job(questions, output), student)
    whole = output.read_bytes()
    manifest = output.with_name("a.jsonl.manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "sha256": None, "bytes": None}, indent=2))
    lines = whole.splitlines(keepends=True)
    output.unlink()
    output.with_name("a.jsonl.partial").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    done = answer_file(job(questions, output), student)
    assert done.resumed == kept // WINDOW * WINDOW and output.read_bytes() == whole
    assert not output.with_name("a.jsonl.partial").exists()


def test_killed_between_the_last_answer_and_its_name(student, tmp_path):
    questions, output = write(tmp_path / "q.jsonl", ASKED[:3]), tmp_path / "a.jsonl"
    answer_file(job(questions, output), student)
    whole = output.read_bytes()
    output.rename(tmp_path / "a.jsonl.partial")
    assert answer_file(job(questions, output), student).resumed == 3 and output.read_bytes() == whole


def test_kill_9_at_any_moment_and_the_same_command_gives_the_same_bytes(folder, student, tmp_path):
    questions = write(tmp_path / "q.jsonl", ASKED * 4)
    answer_file(job(questions, tmp_path / "whole.jsonl"), student)
    output, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    words = ["answer", str(folder), "--input", str(questions), "--output", str(output)]
    command = [sys.executable, "-m", "pst_dist.cli", *words, "--batch-size", "2", "--max-new-tokens", "24"]
    env = os.environ | {"PYTHONPATH": str(Path(pst_dist.__file__).parents[1])}
    seen = 0
    for _ in range(2):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        patient_until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < patient_until:
            if partial.is_file() and len(partial.read_bytes().splitlines()) > seen:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not partial.is_file():
            break
        seen = len(partial.read_bytes().splitlines())
    assert seen >= WINDOW and not output.exists(), "the command was killed in the middle"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "exist already, continuing" in done.stderr
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_bad_rows_are_refused_by_line_or_left_out(student, tmp_path, caplog):
    questions = tmp_path / "q.jsonl"
    rows = ['{"question": "2 + 3?"}', '{"question": ""}', "{broken", json.dumps({"question": "x" * 200})]
    questions.write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"q\.jsonl:2: question is empty \(3 of 4 rows cannot be asked\).*--skip-bad"):
        answer_file(job(questions, tmp_path / "a.jsonl"), student)
    assert not (tmp_path / "a.jsonl.manifest.json").exists(), "refused before anything is written"
    done = answer_file(job(questions, tmp_path / "a.jsonl", skip_bad=True), student)
    assert (done.rows, done.skipped) == (1, 3) and [row["student_answer"] for row in read(tmp_path / "a.jsonl")] == [
        "5"
    ]
    for words in ("q.jsonl:2: question is empty", "q.jsonl:3: column 2: not JSON", "fills all positions"):
        assert words in caplog.text
    write(questions, [{"question": "2 + 3?", "student_answer": "6"}])
    with pytest.raises(DataError, match="has the column 'student_answer', which the answers have too"):
        answer_file(job(questions, tmp_path / "b.jsonl"), student)
    write(questions, [{"title": "no question", "n": 3}])
    with pytest.raises(DataError, match=r"no column 'question' for question among: title, n.*--question"):
        answer_file(job(questions, tmp_path / "b.jsonl"), student)
    named = answer_file(job(questions, tmp_path / "b.jsonl", question="{title} {n}"), student)
    assert named.rows == 1
    with pytest.raises(InputError, match="no such file"):
        answer_file(job(tmp_path / "absent.jsonl", tmp_path / "c.jsonl"), student)


def test_context_and_choices_belong_to_the_question(student, tmp_path):
    rows = [{"question": "Which?", "choices": ["cat", "dog"]}]
    seen = []

    def answerer(windows, bar):
        for window in windows:
            seen.extend(window)
            yield [answer_question(student, "2 + 3?", explain=False, max_new_tokens=9) for _ in window]

    answer_file(job(write(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"), student, answerer=answerer)
    assert seen == ["Which? Answer choices: (A) cat, (B) dog."]
    seen.clear()
    write(tmp_path / "q.jsonl", [{"question": "Which?", "passage": "On Monday."}, {"question": "Why?", "passage": ""}])
    answer_file(job(tmp_path / "q.jsonl", tmp_path / "c.jsonl"), student, answerer=answerer)
    assert seen == ["On Monday.\n\nWhich?", "Why?"]
    write(tmp_path / "q.jsonl", [{"question": "Which?", "hint": "It was on Monday."}])
    with pytest.raises(DataError, match="column 'hint' would not be read"):
        answer_file(job(tmp_path / "q.jsonl", tmp_path / "b.jsonl"), student)


def test_csv_parquet_and_generated_rows(student, tmp_path):
    (tmp_path / "q.csv").write_text("id;problem\n1;2 + 3?\n2;Say 140\n")
    answer_file(job(tmp_path / "q.csv", tmp_path / "csv.jsonl"), student)
    assert [(row["id"], row["student_answer"]) for row in read(tmp_path / "csv.jsonl")] == [("1", "5"), ("2", "140")]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"q": ["2 + 3?", "Say 140"], "day": pyarrow.array([19000, 1], pyarrow.date32())})
    parquet.write_table(table, tmp_path / "q.parquet")
    answer_file(job(tmp_path / "q.parquet", tmp_path / "parquet.jsonl"), student)
    assert [(row["day"], row["student_answer"]) for row in read(tmp_path / "parquet.jsonl")][1] == ("1970-01-02", "140")
    assert answer_file(job("gen:arithmetic?rows=3&seed=1", tmp_path / "gen.jsonl"), student).rows == 3


def test_standard_input_and_output(student):
    out = io.StringIO()
    lines = io.BytesIO(b'{"question": "2 + 3?"}\n{"question": "Say 140", "n": 1}\n')
    done = answer_file(job("-", "-"), student, stdin=lines.readline, stdout=out)
    assert done.rows == 2
    assert [json.loads(line)["student_answer"] for line in out.getvalue().splitlines()] == ["5", "140"]
    with pytest.raises(DataError, match="no rows"):
        answer_file(job("-", "-"), student, stdin=io.BytesIO(b"").readline, stdout=out)


def test_two_commands_do_not_write_one_file(student, tmp_path):
    questions = write(tmp_path / "q.jsonl", ASKED[:3])
    with directory_lock(tmp_path, name=".a.jsonl.lock"), pytest.raises(LockedError):
        answer_file(job(questions, tmp_path / "a.jsonl"), student)


def test_words_of_the_command_line(folder, tmp_path, capsys):
    questions, output = write(tmp_path / "q.jsonl", ASKED[:3]), tmp_path / "a.jsonl"
    base = ["answer", str(folder)]
    assert run_verb([*base, "--input", str(questions), "--output", str(output), "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out == f"{output}: 3 answers\n"
    assert run_verb([*base, "--explain", "Say 140", "--confidence"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["140", "because: it is said"] and said[2].startswith("confidence: 0.9")
    for words, problem in (
        (["a", "b"], "2 questions were given; put the question in quotes"),
        ([], "needs a question or --input, not both"),
        (["a", "--input", str(questions)], "needs a question or --input, not both"),
        (["--input", str(questions)], "--output is missing"),
        (["a", "on=ray"], "on=ray and --output are for a file of questions"),
        (["--input", "x", "--output", "-", "on=ray"], "on=ray needs a file for the answers"),
        (["--input", "x", "--output", "y", "ray.num_actors=2"], "ray.num_actors has no effect without on=ray"),
        (["--input", "x", "--output", "y", "on=ray", "ray.num_actor=2"], "num_actor"),
        (["a", "--unknown"], "unknown option"),
    ):
        assert run_verb([*base, *words]) == 2
        assert problem in capsys.readouterr().err


def test_a_conversation_is_asked_as_turns_and_a_text_as_text(talking_run, tmp_path):
    """The answers of the last question behind its turns, in every form in which a row may have them."""
    talker = load_student(Path(talking_run.output_dir) / "best", "cpu")
    right = [sample.answer for sample in TALKS]
    forms = {
        "question": [{"question": messages(sample) if sample.turns else sample.question} for sample in TALKS],
        "prompt": [{"prompt": messages(sample)} for sample in TALKS],
        "messages": [{"messages": messages(sample)} for sample in TALKS],
        "replied": [{"messages": [*messages(one), {"role": "assistant", "content": "?"}]} for one in TALKS],
        "turns": [{"question": one.question, **({"turns": messages(one)} if one.turns else {})} for one in TALKS],
        "sharegpt": [
            {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in messages(sample)]}
            for sample in TALKS
        ],
    }
    for name, rows in forms.items():
        output = tmp_path / f"{name}.answers.jsonl"
        answer_file(job(write(tmp_path / f"{name}.jsonl", rows), output), talker)
        assert [row["student_answer"] for row in read(output)] == right, name
        assert [{key: row[key] for key in one} for row, one in zip(read(output), rows, strict=True)] == rows
    named = answer_file(
        job(write(tmp_path / "n.jsonl", [{"x": messages(TALKS[3])}]), tmp_path / "n.answers.jsonl", question="x"),
        talker,
    )
    assert named.rows == 1 and read(tmp_path / "n.answers.jsonl")[0]["student_answer"] == "14"


def test_turns_that_cannot_be_asked_are_bad_rows(talking_run, student, tmp_path):
    talker = load_student(Path(talking_run.output_dir) / "best", "cpu")
    user, reply = {"role": "user", "content": "Say 140"}, {"role": "assistant", "content": "140"}
    for bad, what in (
        ([user, user], "needs user and assistant turns in alternation"),
        ([reply], "0 user and 0 assistant turns, expected a question at the end"),
        ([user, {"role": "critic", "content": "no"}], "unknown role 'critic'"),
        ([user, reply, {"role": "user", "content": " "}], "question is empty"),
        ([{"role": "user", "content": "Say 140" + "0" * 3000}], "fills all positions"),
    ):
        rows = [{"messages": [user]}, {"messages": bad}]
        with pytest.raises(DataError, match=what) as caught:
            answer_file(job(write(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"), talker)
        assert caught.value.line == 2
    # A student without a chat template is asked the conversation as one text.
    plain = [{"question": "2 + 3?"}, {"question": [{"role": "system", "content": "Add."}, *messages(TALKS[0])]}]
    answer_file(job(write(tmp_path / "q.jsonl", plain), tmp_path / "p.jsonl"), student)
    asked = answer_question(student, "Add.\n\nSay 140", explain=False, max_new_tokens=24)
    assert [row["student_answer"] for row in read(tmp_path / "p.jsonl")] == ["5", asked.text]
