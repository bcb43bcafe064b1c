"""`pst check`: an account of the data that a person can act on."""

from __future__ import annotations

import json

import pytest
import yaml

from pst_dist.config.schema import Config
from pst_dist.data.sources import load_data
from pst_dist.diagnostics.rows import check
from pst_dist.errors import InputError


def _config(root, arm="pst", **data):
    return Config.model_validate({"arm": arm, "data": {"root": str(root), **data}})


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(count):
    return [
        {"problem": f"What is {n} plus 1?", "final_answer": str(n + 1), "explanation": "word " * (n + 1)}
        for n in range(count)
    ]


def test_an_unknown_file_gets_a_map_to_paste_that_then_loads(tmp_path):
    _write(tmp_path / "rows.jsonl", _rows(20))
    report = check(_config(tmp_path, train="rows.jsonl"))
    assert report.ok
    pasted = yaml.safe_load(report.proposal)["data"]
    assert pasted["columns"] == {"question": "problem", "answer": "final_answer", "rationale": "explanation"}
    assert pasted["answer_type"] == "number"
    loaded = load_data(_config(tmp_path, train="rows.jsonl", **pasted))
    assert loaded.splits["train"][0].answer_type == "number"
    assert check(_config(tmp_path, train="rows.jsonl", **pasted)).proposal == ""


def test_a_file_that_is_not_understood_shows_its_columns_and_leaves_a_gap(tmp_path):
    _write(tmp_path / "rows.jsonl", [{"wer": "Who?", "was": "me\x1b[31m"}])
    report = check(_config(tmp_path, train="rows.jsonl"))
    assert not report.ok
    text = "\n".join(report.lines())
    assert "  wer: Who?" in text
    assert "  was: me\\x1b[31m" in text
    assert yaml.safe_load(report.proposal)["data"]["columns"] == {"question": "COLUMN", "answer": "COLUMN"}
    assert "no column 'question'" in text


@pytest.mark.parametrize(
    ("answers", "hint"),
    [
        (
            [*(f"1,{n:03}" for n in range(9)), "unknown"],
            "9 of the first 10 answers are numbers, and 'unknown' is not: as text, 1,000 differs from 1000; "
            "data.answer_type=number compares by value and makes the others bad rows",
        ),
        (
            ["\\frac{1}{2}", *(f"{n}" for n in range(4))],
            None,  # all are numbers
        ),
        (
            ["\\sqrt{2}", *(f"{n}" for n in range(4))],
            "some answers are formulas: data.answer_type=math compares them by value, not as text",
        ),
        ([*(f"{n}" for n in range(5)), *"wxyz"], None),
    ],
)
def test_a_type_that_fits_most_answers_is_said(answers, hint, tmp_path):
    rows = [{"question": f"{n}?", "answer": answer, "rationale": "r"} for n, answer in enumerate(answers)]
    _write(tmp_path / "rows.jsonl", rows)
    report = check(_config(tmp_path, train="rows.jsonl"))
    assert report.hints == ([] if hint is None else [hint])
    assert report.ok and all(line in report.lines() for line in report.hints)


def test_columns_that_may_be_rationales_are_named_where_none_was_found(tmp_path):
    rows = [{"question": f"{n}?", "answer": n, "r1_solution_1": "So it is one more."} for n in range(9)]
    _write(tmp_path / "rows.jsonl", rows)
    report = check(_config(tmp_path, arm="answer_only", train="rows.jsonl", answer_type="number"))
    line = "columns of text that are not read: r1_solution_1; data.columns.rationale takes one"
    assert report.ok and line in report.lines()


def test_columns_that_are_not_read_are_named_beside_rationales_too(tmp_path):
    rows = [{"question": f"{n}?", "answer": "a", "rationale": "r", "facts": ["It is so."]} for n in range(9)]
    _write(tmp_path / "rows.jsonl", rows)
    line = "columns of text that are not read: facts; one that a question depends on belongs to data.columns.question"
    assert line in check(_config(tmp_path, train="rows.jsonl")).lines()
    replies = [{"prompt": f"{n}?", "response": f"So. The answer is {n}."} for n in range(9)]
    _write(tmp_path / "replies.jsonl", replies)
    assert not [line for line in check(_config(tmp_path, train="replies.jsonl")).lines() if "not read" in line]


def test_a_picture_is_not_proposed_as_a_part_of_the_question(tmp_path):
    rows = [{"question": f"{n}?", "answer": "a", "rationale": "r", "image_path": "a.png"} for n in range(9)]
    _write(tmp_path / "rows.jsonl", rows)
    report = check(_config(tmp_path, train="rows.jsonl"))
    assert len(report.loaded.rejects) == 9 and "  question: question" in report.proposal
    assert "image_path" not in report.proposal


def test_lengths_are_given_as_percentiles_by_nearest_rank(tmp_path):
    _write(tmp_path / "rows.jsonl", _rows(100))
    lines = check(_config(tmp_path, train="rows.jsonl", validation_size=0)).lines()
    assert "train: 100 rows read, 100 kept; answers: text 100" in lines
    assert "  question words: 5% 5, median 5, 95% 5, longest 5" in lines
    assert "  rationale words: 5% 5, median 50, 95% 95, longest 100" in lines
    assert lines[-1] == "ok"


def test_bad_rows_are_all_written_and_printed_in_groups_with_the_first_of_each(tmp_path):
    rows = [*_rows(15), *({"problem": f"p{n}", "explanation": "e"} for n in range(12)), {"problem": 3}]
    _write(tmp_path / "rows.jsonl", rows)
    path = tmp_path / "out" / "rejects.jsonl"
    report = check(_config(tmp_path, train="rows.jsonl"), path)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [reject["line"] for reject in written] == list(range(16, 29))
    assert set(written[0]) == {"path", "line", "code", "what", "text"}
    lines = report.lines()
    start = lines.index(f"13 bad rows, all in {path}:")
    assert lines[start + 1] == f"  12 rows, the first {tmp_path}/rows.jsonl:16: answer is missing"
    assert lines[start + 2] == f"  {tmp_path}/rows.jsonl:28: question is a number, expected text"
    assert lines[-1].startswith(f"error[DATA] {tmp_path}/rows.jsonl:16: answer is missing (13 of 28 rows are bad")
    assert not report.ok


def test_reasons_that_differ_only_in_a_value_are_one_group_and_ten_groups_are_shown(tmp_path):
    bad = [
        {"problem": f"p{n}", "final_answer": f"{letter} word", "explanation": "e"} for n, letter in enumerate("abcdef")
    ]
    bad += [{"problem": f"p{n}", "final_answer": "1", "explanation": [n]} for n in range(1, 3)]
    other = [{"problem": "p", "final_answer": {"x": 1}}, {"problem": 4}, {"problem": [5], "final_answer": "1"}]
    _write(tmp_path / "rows.jsonl", [*_rows(3), *bad, *other])
    lines = check(_config(tmp_path, train="rows.jsonl", answer_type="number", validation_size=0)).lines()
    start = next(place for place, line in enumerate(lines) if line.startswith("11 bad rows"))
    assert lines[start + 1].startswith(f"  6 rows, the first {tmp_path}/rows.jsonl:4: answer 'a word'")
    assert lines[start + 2] == f"  2 rows, the first {tmp_path}/rows.jsonl:10: rationale is a number, expected text"


def test_the_first_row_is_shown_as_it_was_read(tmp_path):
    first = {"problem": "How\nmany?", "final_answer": "7", "explanations": ["a" * 100, "b", "c"]}
    others = [{"explanations": [row.pop("explanation")], **row} for row in _rows(3)]
    _write(tmp_path / "rows.jsonl", [first, *others])
    lines = check(_config(tmp_path, train="rows.jsonl", answer_type="number", validation_size=0)).lines()
    start = lines.index("first row, rows.jsonl:1:")
    assert lines[start + 1 : start + 4] == [
        "  question: How\\nmany?",
        "  answer: 7 (number)",
        f"  rationale: {'a' * 80}… (100 characters) (and 2 more)",
    ]


def test_duplicates_conflicts_leaks_and_missing_rationales_are_counted(tmp_path):
    rows = _rows(10)
    rows += [rows[0], {**rows[1], "explanation": "another"}, {**rows[2], "final_answer": "99"}]
    _write(tmp_path / "train.jsonl", rows)
    _write(tmp_path / "test.jsonl", [{"problem": rows[4]["problem"], "final_answer": "5"}])
    config = _config(tmp_path, train="train.jsonl", test="test.jsonl", leaks="refuse", validation_size=0)
    report = check(config)
    lines = report.lines()
    assert "2 training rows repeat the question and answer of an earlier one" in lines
    assert "1 of these have another rationale, which was merged into the earlier row" in lines
    assert "1 questions have two answers, first: train.jsonl:3 has 3, train.jsonl:13 has 99" in lines
    assert "1 training questions are also held out, first: train.jsonl:5 and test.jsonl:1" in lines
    assert "test: 1 rows read, 1 kept; answers: text 1" in lines
    assert "  1 row without rationale" in lines
    assert "set data.leaks=drop" in lines[-1]


def test_check_agrees_with_loading_about_what_is_refused(tmp_path):
    _write(tmp_path / "rows.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(5)])
    assert check(_config(tmp_path, "answer_only", train="rows.jsonl")).ok
    report = check(_config(tmp_path, "pst", train="rows.jsonl"))
    assert not report.ok
    assert "no training row has a rationale" in report.lines()[-1]


def test_what_cannot_be_read_at_all_is_raised(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check(_config(tmp_path, train="rows.jsonl"))
