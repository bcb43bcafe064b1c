"""Which rows are asked, and which questions new ones must stay away from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pst_dist.config.loading import load_config
from pst_dist.data.sources import load_data
from pst_dist.errors import DataError
from pst_dist.teacher.judging import Answered, Sample
from pst_dist.teacher.questions import read_examples, read_questions, read_texts
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.written import row_of as written_row


def written(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(*words: str):
    return read_questions(load_config(None, list(words)))


def test_rows_with_and_without_answers_are_read_and_repeated_ones_asked_once(tmp_path):
    file = written(
        tmp_path / "r.jsonl",
        {"question": "1 + 1?", "answer": "2"},
        {"question": "1  +  1?", "answer": "2"},
        {"question": "1 + 2?", "answer": ""},
        {"question": "1 + 3?", "answer": None},
        {"question": "1 + 4?", "answer": "many"},
        {"question": "", "answer": "3"},
    )
    found = read(f"data.train={file}", "data.answer_type=number")
    assert [(row.text, row.gold) for row in found.rows] == [("1 + 1?", "2"), ("1 + 2?", None), ("1 + 3?", None)]
    # An answer that cannot be read is a bad row; it is not taken for a missing one.
    assert [reject.line for reject in found.rejects] == [5, 6]
    assert found.counts == {"read": 6, "bad": 2, "repeated_or_held_out": 1, "asked": 3, "without_gold": 2}


def test_a_file_of_questions_alone_needs_no_answer_column(tmp_path):
    file = written(tmp_path / "r.jsonl", {"problem": "Name a colour.", "id": "a-1"}, {"problem": "Name a tree."})
    found = read(f"data.train={file}")
    assert (found.rows[0].id, found.rows[0].gold) == ("a-1", None) and len(found.rows) == 2


def test_options_are_written_into_a_question_without_an_answer(tmp_path):
    file = written(tmp_path / "r.jsonl", {"question": "Which barks?", "choices": ["cat", "dog"]})
    (row,) = read(f"data.train={file}", "data.answer_type=choice").rows
    assert row.text == "Which barks? Answer choices: (A) cat, (B) dog." and row.choices == ("cat", "dog")


def test_the_same_id_in_two_files_becomes_two_ids(tmp_path):
    one = written(tmp_path / "a.jsonl", {"id": "0", "question": "1 + 1?", "answer": 2})
    two = written(tmp_path / "b.jsonl", {"id": "0", "question": "1 + 2?", "answer": 3})
    assert [row.id for row in read(f"data.train=[{one}, {two}]", "data.answer_type=number").rows] == ["0", "0-2"]


def test_held_out_rows_are_never_asked_and_are_to_be_avoided(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(20)]
    file = written(tmp_path / "r.jsonl", *rows)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": list(range(15)), "test": [15, 16]}))
    found = read(f"data.train={file}", f"data.split_file={split}", "data.answer_type=number")
    assert len(found.rows) == 15 and found.avoid == ("15 + 1?", "16 + 1?")
    test = written(tmp_path / "test.jsonl", rows[0], {"question": "other?", "answer": 1})
    found = read(f"data.train={file}", f"data.test={test}", "data.answer_type=number")
    assert len(found.rows) == 19 and found.avoid == ("0 + 1?", "other?")
    found = read(f"data.train={file}", "data.test_size=5", "data.answer_type=number")
    assert len(found.rows) == 15 and len(found.avoid) == 5
    assert {row.text for row in found.rows}.isdisjoint(found.avoid)


def test_a_test_size_cuts_the_rows_that_a_run_cuts(tmp_path):
    from pst_dist.data.sources import load_data

    file = written(tmp_path / "r.jsonl", *({"question": f"{n} + 1?", "answer": n + 1} for n in range(40)))
    words = [f"data.train={file}", "data.test_size=0.3", "data.answer_type=number", "arm=answer_only"]
    run = load_data(load_config(None, words))
    assert sorted(read(*words).avoid) == sorted(sample.question for sample in run.splits["test"])


def test_the_digest_tells_rows_apart(tmp_path):
    file = written(tmp_path / "r.jsonl", {"question": "1 + 1?", "answer": 2})
    first = read(f"data.train={file}", "data.answer_type=number").digest
    written(file, {"question": "1 + 1?", "answer": 3})
    assert read(f"data.train={file}", "data.answer_type=number").digest != first


def test_examples_need_an_answer_and_a_rationale(tmp_path):
    config = load_config(None, ["data.answer_type=number"])
    file = written(
        tmp_path / "e.jsonl",
        {"question": "1 + 1?", "answer": 2, "rationale": "one and one"},
        {"question": "1 + 2?", "answer": 3, "rationale": None},
    )
    assert [row.rationales for row in read_examples(str(file), config)] == [("one and one",)]
    written(file, {"question": "1 + 2?", "answer": 3})
    with pytest.raises(DataError, match="rationale"):
        read_examples(str(file), config)


def test_a_question_to_avoid_that_cannot_be_read_is_an_error(tmp_path):
    config = load_config(None, ["data.answer_type=number"])
    file = written(tmp_path / "t.jsonl", {"question": "1 + 1?"}, {"question": "2 + 2?", "answer": None})
    assert read_texts(str(file), config) == ["1 + 1?", "2 + 2?"]
    written(file, {"question": "1 + 1?", "answer": 2}, {"question": ["list"], "answer": 2})
    with pytest.raises(DataError, match=r"t\.jsonl:2"):
        read_texts(str(file), config)


def test_a_conversation_is_asked_as_one_text_and_keeps_its_turns(tmp_path):
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    turns.append({"role": "user", "content": "And one more?"})
    file = written(
        tmp_path / "r.jsonl", {"question": turns}, {"question": turns, "answer": "6"}, {"question": "1 + 1?"}
    )
    found = read(f"data.train={file}", "data.answer_type=number")
    text = "User: 2 + 3?\nAssistant: 5\nUser: And one more?"
    assert [(row.text, len(row.turns)) for row in found.rows] == [(text, 3), ("1 + 1?", 0)]
    settings = TeachSettings(output=tmp_path / "o.jsonl", endpoint="http://localhost/v1", model="m")
    asked = found.rows[0]
    one = Sample(question=asked, prompt="few_shot", number=0, verdict="kept", answer="6", rationale="5 and 1")
    kept = Answered(question=asked, answer="6", samples=(one,))
    (tmp_path / "o.jsonl").write_text(json.dumps(written_row(kept, settings)) + "\n")
    loaded = load_data(
        load_config(None, [f"data.train={tmp_path / 'o.jsonl'}", "data.answer_type=number", "data.validation_size=0"])
    )
    (sample,) = [row for rows in loaded.splits.values() for row in rows]
    assert sample.question == text and sample.turns == found.rows[0].turns


def test_a_context_column_of_questions_without_answers_is_not_left_out(tmp_path):
    rows = [{"question": "How many?", "passage": "There are 3."}, {"question": "Who?", "passage": ""}]
    found = read(f"data.train={written(tmp_path / 'r.jsonl', *rows)}")
    assert [row.text for row in found.rows] == ["There are 3.\n\nHow many?", "Who?"]
