"""Rows that a tokenizer cannot encode as text are bad rows, found by `pst check` and before shards are made."""

from __future__ import annotations

import json

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet
from pst_dist.diagnostics.rows import check
from pst_dist.errors import DataError
from pst_dist.pipeline import make_shards

WORDS = ("<unk>", "|", "<pad>", "how", "many", "is", "it", "one", "two", "so", "###", "?", "-->", "a")


@pytest.fixture
def student(tmp_path):
    """A student whose end token is a word of one character, `|`, which no split turns into text."""
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="|", pad_token="<pad>", unk_token="<unk>"
    )
    folder = tmp_path / "student"
    tokenizer.save_pretrained(folder)
    shape = transformers.GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


def _row(number, **changes):
    row = {"id": f"r{number}", "question": f"how many is it {number} ?", "answer": "one", "rationale": "so it is one"}
    return row | changes


def _config(tmp_path, student, train, test, **more):
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output_dir": str(tmp_path / "run"),
        "data": {"root": str(tmp_path), "train": "train.jsonl", "test": "test.jsonl", "validation_size": 0},
        "student": {"model_name_or_path": str(student)},
    }
    settings["data"] |= more.pop("data", {})
    return Config.model_validate(settings | {"arm": "pst"} | more)


def test_check_names_each_row_in_training_and_test_and_respects_max_bad(tmp_path, student):
    train = [_row(0), _row(1, question="how | many 1 ?"), _row(2, rationale="so | it"), _row(3)]
    test = [_row(10), _row(11, answer="|"), _row(12, rationale="so | it")]
    wanted = ["train.jsonl:2", "train.jsonl:3", "test.jsonl:2", "test.jsonl:3"]
    report = check(_config(tmp_path, student, train, test))
    assert [str(reject).removeprefix(f"{tmp_path}/").split(": ")[0] for reject in report.loaded.rejects] == wanted
    assert all("only as its control token |" in reject.what for reject in report.loaded.rejects)
    assert not report.ok and "4 of 7 rows are bad" in str(report.problem)
    assert not check(_config(tmp_path, student, train, test, data={"max_bad": 3})).ok
    assert check(_config(tmp_path, student, train, test, data={"max_bad": 4})).ok
    # An arm that never reads rationales loses no row to them.
    answers = check(_config(tmp_path, student, train, test, arm="answer_only", data={"max_bad": 2}))
    assert answers.ok and len(answers.loaded.rejects) == 2


def test_shards_refuse_such_rows_or_leave_them_out(tmp_path, student):
    train = [_row(0), _row(1, question="how | many 1 ?"), _row(2)]
    test = [_row(10), _row(11, answer="|")]
    with pytest.raises(DataError, match="control token"):
        make_shards(_config(tmp_path, student, train, test))
    config = _config(tmp_path, student, train, test, data={"max_bad": 2})
    assert make_shards(config).extra["counts"] == {"train": 2, "validation": 0, "test": 1}
    shards = ShardSet.open(next(tmp_path.rglob("shards")))
    assert [sample.id for sample in shards.split("train")] == ["r0", "r2"]


def test_a_tokenizer_that_reads_them_as_text_loses_no_row(tmp_path, student):
    import zoo

    train = [_row(0), _row(1, question="how </s> many <|endoftext|> 1 ?", answer="one</s>")]
    for name in ("gpt2", "t5", "llama2"):
        folder = zoo.make(name, tmp_path / name)
        assert check(_config(tmp_path, folder, train, [_row(10)])).loaded.rejects == []


def test_a_student_that_cannot_be_loaded_is_said_and_the_rows_are_still_reported(tmp_path, student):
    (student / "tokenizer.json").write_text("{")
    report = check(_config(tmp_path, student, [_row(0)], [_row(10)]))
    assert report.ok and any("not checked: whether the student can read every row" in line for line in report.lines())
