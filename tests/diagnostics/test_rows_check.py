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


def test_lengths_are_given_as_percentiles_by_nearest_rank(tmp_path):
    _write(tmp_path / "rows.jsonl", _rows(100))
    lines = check(_config(tmp_path, train="rows.jsonl", validation_size=0)).lines()
    assert "train: 100 rows read, 100 kept; answers: text 100" in lines
    assert "  question words: 5% 5, median 5, 95% 5, longest 5" in lines
    assert "  rationale words: 5% 5, median 50, 95% 95, longest 100" in lines
    assert lines[-1] == "ok"


def test_bad_rows_are_all_written_and_the_first_ten_printed(tmp_path):
    rows = [*_rows(15), *({"problem": f"p{n}", "explanation": "e"} for n in range(12))]
    _write(tmp_path / "rows.jsonl", rows)
    path = tmp_path / "out" / "rejects.jsonl"
    report = check(_config(tmp_path, train="rows.jsonl"), path)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [reject["line"] for reject in written] == list(range(16, 28))
    assert set(written[0]) == {"path", "line", "code", "what", "text"}
    lines = report.lines()
    assert f"12 bad rows, all in {path}:" in lines
    printed = [line for line in lines if line.startswith(f"  {tmp_path}/rows.jsonl:")]
    assert printed[0] == f"  {tmp_path}/rows.jsonl:16: answer is missing"
    assert len(printed) == 10
    assert "  … and 2 more" in lines
    assert lines[-1].startswith(f"error[DATA] {tmp_path}/rows.jsonl:16: answer is missing (12 bad rows of 27")
    assert not report.ok


def test_duplicates_conflicts_leaks_and_missing_rationales_are_counted(tmp_path):
    rows = _rows(10)
    rows += [rows[0], {**rows[1], "explanation": "another"}, {**rows[2], "final_answer": "99"}]
    _write(tmp_path / "train.jsonl", rows)
    _write(tmp_path / "test.jsonl", [{"problem": rows[4]["problem"], "final_answer": "5"}])
    config = _config(tmp_path, train="train.jsonl", test="test.jsonl", leaks="refuse", validation_size=0)
    report = check(config)
    lines = report.lines()
    assert "2 training rows repeat question and answer of an earlier one" in lines
    assert "1 of them brought another rationale for the same question" in lines
    assert "1 questions have two answers, first: train.jsonl:3 says 3, train.jsonl:13 99" in lines
    assert "1 training questions are held out too, first: train.jsonl:5 and test.jsonl:1" in lines
    assert "test: 1 rows read, 1 kept; answers: text 1" in lines
    assert "  1 rows without rationale" in lines
    assert "say data.leaks=drop" in lines[-1]


def test_check_agrees_with_loading_about_what_is_refused(tmp_path):
    _write(tmp_path / "rows.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(5)])
    assert check(_config(tmp_path, "answer_only", train="rows.jsonl")).ok
    report = check(_config(tmp_path, "pst", train="rows.jsonl"))
    assert not report.ok
    assert "no training row has a rationale" in report.lines()[-1]


def test_what_cannot_be_read_at_all_is_raised(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check(_config(tmp_path, train="rows.jsonl"))
