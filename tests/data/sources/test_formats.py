"""The forms in which people keep rows: read right, or refused with what to do."""

from __future__ import annotations

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from pst_dist.cli.main import run_verb
from pst_dist.config.schema import Config
from pst_dist.data.sources import compressed, readers, strict_json, survey
from pst_dist.data.sources.arrow_probe import Unreadable, probe
from pst_dist.data.sources.arrow_values import ArrowValues
from pst_dist.data.sources.column_guess import guess_columns
from pst_dist.data.sources.columns import RowError
from pst_dist.data.sources.readers import read_file
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import RawRow
from pst_dist.data.sources.specs import read_specs
from pst_dist.data.sources.values import as_answer
from pst_dist.errors import DataError, EnvironmentFault, InputError

ROWS = [{"question": "q1", "answer": "a"}, {"question": "q2", "answer": "b"}]


def _lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _values(path):
    return [entry.value for entry in read_file(path).entries if isinstance(entry, RawRow)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(_lines(), mtime=0)),
        ("rows.JSON.GZ", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("rows.csv.gz", gzip.compress(b"question,answer\nq1,a\nq2,b\n", mtime=0)),
        ("semicolons.csv", b"question;answer\nq1;a\nq2;b\n"),
        ("excel.csv", b"sep=;\r\nquestion;answer\r\nq1;a\r\nq2;b\r\n"),
        ("quoted.csv", b'"question";"answer"\n"q1";"a"\n"q2";"b"\n'),
        ("tabs.csv", b"question\tanswer\nq1\ta\nq2\tb\n"),
        ("rows.tsv", b"\xef\xbb\xbfquestion\tanswer\r\nq1\ta\r\nq2\tb\r\n"),
        ("commas.tsv", b"question,answer\nq1,a\nq2,b\n"),
        ("index.json", json.dumps({"0": ROWS[0], "1": ROWS[1]}).encode()),
        ("index.json", json.dumps({"0": ROWS[0], "1": ROWS[1]}, indent=1).encode()),
        ("named.json", json.dumps({"first": ROWS[0], "second": ROWS[1]}).encode()),
        ("columns.json", json.dumps({"question": ["q1", "q2"], "answer": ["a", "b"]}).encode()),
        ("columns.json", json.dumps({"question": {"0": "q1", "1": "q2"}, "answer": {"0": "a", "1": "b"}}).encode()),
        ("wrapped.json", json.dumps({"name": "n", "metrics": ["m"], "examples": ROWS}).encode()),
        ("wrapped.json", json.dumps({"name": "n", "questions": ROWS}, indent=1).encode()),
        ("lines.json", b'{"name": "n",\n"rows": [\n' + b",\n".join(map(str.encode, map(json.dumps, ROWS))) + b"\n]}"),
        ("split.json", json.dumps({"columns": ["question", "answer"], "data": [["q1", "a"], ["q2", "b"]]}).encode()),
    ],
)
def test_the_same_rows_are_read_from_many_forms(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert _values(tmp_path / name) == ROWS


def test_a_single_row_with_a_list_of_examples_is_a_row(tmp_path):
    row = {"question": "q1", "answer": "a", "examples": [{"input": "q2"}]}
    (tmp_path / "row.json").write_text(json.dumps(row))
    assert _values(tmp_path / "row.json") == [row]


def test_a_quote_of_a_text_does_not_swallow_rows_of_a_tsv(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('question\tanswer\nq1\t"a\nq2\tb"\nq3\t"c\nd"\n')
    bad, good = read_file(path).entries
    assert (bad.line, bad.what) == (2, "a quote opens a cell that goes on to line 3, over whole rows")
    assert good.value == {"question": "q3", "answer": "c\nd"}


def test_zstandard_is_read_where_its_library_is_and_named_where_not(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    try:
        import zstandard
    except ImportError:
        path.write_bytes(b"\x28\xb5\x2f\xfd")
        with pytest.raises(EnvironmentFault, match="pip install zstandard, or decompress"):
            read_file(path)
        return
    path.write_bytes(zstandard.compress(_lines()))
    assert _values(path) == ROWS
    path.write_bytes(zstandard.compress(_lines(ROWS[:1])) + zstandard.compress(_lines(ROWS[1:])))
    assert _values(path) == ROWS
    many = [{"question": f"{n * n * 7919 % 10007}", "answer": str(n)} for n in range(40_000)]
    whole = zstandard.compress(_lines(many))
    path.write_bytes(whole)
    assert _values(path) == many
    for cut in (3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cannot decompress: the file ends inside"):
            read_file(path)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.jsonl.gz", gzip.compress(_lines(), mtime=0)[:-12], "cannot decompress: "),
        ("rows.jsonl.gz", _lines(), "cannot decompress: "),
        ("rows.jsonl.bz2", b"x", r"cannot read \.bz2; decompress it"),
        ("rows.parquet.gz", b"x", "compressed Parquet files are not supported"),
        ("rows.txt.gz", b"x", r"cannot read \.gz; use \.jsonl"),
        ("wide.jsonl", "\ufeff{}".encode("utf-16-le"), "is UTF-16; convert it to UTF-8"),
        ("wide.csv", "question,answer\nq,a\n".encode("utf-16-le"), "is UTF-16"),
        ("wide.json", "[{}]".encode("utf-32"), "is UTF-32"),
        (
            "head.csv",
            "größe,answer\n1,a\n".encode("cp1252"),
            "header contains bytes that are not UTF-8 .for Windows-1252",
        ),
        ("rows.json", b'{"question": ["a", "b"], "answer": ["a"]}', "different lengths: question 2, answer 1"),
        ("rows.json", b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "contains the splits train, test.*its own file"),
        ("rows.json", b'{"a": {"0": 1}, "b": {"1": 1}}', "columns with different rows"),
        ("rows.json", b'{"columns": ["a"], "data": [[1, 2]]}', "row 1 does not have 1 values"),
    ],
)
def test_what_is_not_read_is_refused_with_the_remedy(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, InputError), match=what):
        read_file(tmp_path / name)


def test_rows_in_windows_1252_are_bad_rows_with_the_remedy(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("question,answer\ncafé?,oui\nthe?,non\n".encode("cp1252"))
    reject, row = read_file(path).entries
    assert "iconv -f WINDOWS-1252" in reject.what
    assert row.value == {"question": "the?", "answer": "non"}


def test_a_file_may_not_expand_without_end(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(_lines(ROWS * 5000), mtime=0))
    assert len(read_file(path).entries) == 10_000
    monkeypatch.setattr(compressed, "EXPANDED_BYTES", 100_000)
    monkeypatch.setattr(compressed, "EXPANSION", 20)
    with pytest.raises(InputError, match="expands to more than 0 MiB"):
        read_file(path)


def test_a_longer_cell_than_allowed_is_a_bad_row_in_every_format(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    for module in (strict_json, readers):
        monkeypatch.setattr(module, "MAX_CELL_CHARACTERS", 50)
    rows = [ROWS[0], {"question": "q" * 51, "answer": "a"}, ROWS[1]]
    (tmp_path / "rows.jsonl").write_bytes(_lines(rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("".join(f"{row['question']},{row['answer']}\n" for row in [*_HEADER, *rows]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet"):
        entries = read_file(tmp_path / name).entries
        assert [getattr(entry, "code", "good") for entry in entries] == ["good", "too_long", "good"], name


_HEADER = [{"question": "question", "answer": "answer"}]


# --- Arrow -------------------------------------------------------------------------------------------------


def test_a_parquet_file_that_expands_beyond_its_bound_is_refused_before_it_is_read(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    # One text in the dictionary, repeated by run length: a few kilobytes in the file, 100 MB as rows.
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q" * 10_000] * 10_000}), path)
    assert path.stat().st_size < 100_000
    with pytest.raises(Unreadable, match=r"rows\.parquet: expands to more than 16 MiB"):
        probe([path], 16 << 20)
    probe([path], 200 << 20)
    monkeypatch.setattr(compressed, "EXPANDED_BYTES", 16 << 20)
    with pytest.raises(DataError, match=r"not a readable Parquet file: rows\.parquet: expands to more than 16 MiB"):
        read_file(path)


def test_a_damaged_dataset_folder_is_named_and_does_not_end_the_process(tmp_path):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"question": f"q{n}", "answer": "a" * 50} for n in range(200)]).save_to_disk(folder)
    (arrow,) = folder.glob("*.arrow")
    intact = arrow.read_bytes()
    config = Config.model_validate({"arm": "answer_only", "data": {"train": str(folder), "validation_size": 0}})
    assert survey(config).report["rows_read"] == 200
    # The offsets of the texts point far outside the file: reading them unchecked is a segmentation fault.
    offsets = b"".join(number.to_bytes(4, "little") for number in range(0, 250, 50))
    assert offsets in intact
    wild = b"".join(number.to_bytes(4, "little") for number in (0, 2**30, 2**30 + 9, 2**30 + 99, 2**31 - 9))
    for damaged in (intact.replace(offsets, wild), intact[: len(intact) // 2], b"\xff" * len(intact)):
        arrow.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"cannot read the dataset: {arrow.name}"):
            survey(config)


def test_a_reader_that_is_ended_by_a_signal_is_told_from_the_child(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text("import os, signal, sys\nprint(sys.argv[2], flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr("pst_dist.data.sources.arrow_probe.__file__", str(script))
    with pytest.raises(Unreadable, match=r"bad\.parquet is damaged: it crashes the reader with SIGSEGV"):
        probe([tmp_path / "bad.parquet"], 1)


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["18"], "18"),
        ([18], 18),
        (Decimal("18.00"), 18),
        (Decimal("12.5"), 12.5),
        (Decimal("0.12345678901234567890123"), "0.12345678901234567890123"),
        (datetime.date(2021, 4, 30), "2021-04-30"),
        (datetime.datetime(2021, 4, 30), "2021-04-30"),
        (datetime.datetime(2021, 4, 30, 12, 5), "2021-04-30 12:05:00"),
        (True, True),
    ],
)
def test_answers_of_tables_are_read_as_what_they_are(value, expected):
    assert as_answer(value) == expected
    assert type(as_answer(value)) is type(expected)


def test_narrow_floats_of_a_table_keep_the_decimals_that_were_written(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pair = pa.struct([("x", pa.float32()), ("n", pa.int64())])
    table = {
        "single": pa.array([0.1, None, 1e10], pa.float32()),
        "half": pa.array([0.1, 2.7, float("inf")], pa.float32()).cast(pa.float16()),
        "list": pa.array([[0.3, None], None, []], pa.list_(pa.float32())),
        "pair": pa.array([{"x": 2.7, "n": 3}, None, {"x": None, "n": 4}], pair),
        "double": pa.array([0.1, 1 / 3, 2.5]),
    }
    parquet.write_table(pa.table(table), tmp_path / "rows.parquet")
    assert _values(tmp_path / "rows.parquet") == [
        {"single": 0.1, "half": 0.1, "list": [0.3, None], "pair": {"x": 2.7, "n": 3}, "double": 0.1},
        {"single": None, "half": 2.7, "list": None, "pair": None, "double": 1 / 3},
        {"single": 1e10, "half": float("inf"), "list": [], "pair": {"x": None, "n": 4}, "double": 2.5},
    ]


def test_class_labels_of_a_parquet_file_are_names_as_in_the_folder_it_came_from(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["neither", "follows"])}
    rows = {"question": ["q1", "q2", "q3"], "answer": [1, 0, -1]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    dataset.save_to_disk(str(tmp_path / "folder"))
    (folder,) = read_specs(str(tmp_path / "folder"), "train", SourceRoot("", tmp_path))
    assert [row["answer"] for row in _values(tmp_path / "rows.parquet")] == ["follows", "neither", -1]
    assert [row.value["answer"] for row in folder.rows()] == ["follows", "neither", -1]


@pytest.mark.parametrize(
    "metadata", [{}, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"huggingface": b'{"info": {"features": 3}}'}]
)
def test_metadata_of_another_program_names_no_labels(metadata):
    pa = pytest.importorskip("pyarrow")
    assert ArrowValues.of(pa.schema([("a", pa.int64())], metadata=metadata)).corrected({"a": 1}) == {"a": 1}


def test_several_answers_are_refused_with_a_way_to_choose():
    for value, what in (
        (["a", "b"], r"a list of 2, expected one answer; data\.columns\.answer=COLUMN\[0\]"),
        ([], "0"),
    ):
        with pytest.raises(RowError, match=what):
            as_answer(value)
    with pytest.raises(DataError, match=r"column 'answer' cannot be the answer: it contains an object; select a part"):
        guess_columns([{"question": "q", "answer": {"value": 3}}], "f")


@pytest.mark.parametrize("answers", [(1, 0), ("1", "0"), (True, False), ("true", "no")])
def test_truth_values_may_be_numbers_in_a_table(tmp_path, answers):
    rows = [{"question": f"q{n}", "answer": answer, "rationale": "r"} for n, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_bytes(_lines(rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "validation_size": 0, "answer_type": "bool"}
    loaded = survey(Config.model_validate({"data": data}))
    assert [sample.answer for sample in loaded.splits["train"]] == ["yes", "no"]


def test_a_missing_file_gets_a_suggestion_only_for_a_slip(tmp_path):
    for name in ("n7.jsonl", "train_7.jsonl", "questions.jsonl", "other.csv"):
        (tmp_path / name).write_bytes(_lines())
    for name, hint in (
        ("n1.jsonl", "check the name"),
        ("train_8.jsonl", "check the name"),
        ("qusetions.jsonl", r"did you mean questions\.jsonl"),
        ("other.jsonl", r"did you mean other\.csv"),
    ):
        with pytest.raises(InputError, match=hint):
            read_file(tmp_path / name)


# --- pst check ---------------------------------------------------------------------------------------------


def test_check_takes_patterns_lists_and_saved_folders(tmp_path, monkeypatch, capsys):
    import datasets

    rows = [{"question": f"q{n}", "answer": f"a{n}", "rationale": "r"} for n in range(4)]
    monkeypatch.chdir(tmp_path)
    Path("part-1.jsonl").write_bytes(_lines(rows[:2]))
    Path("part-2.jsonl").write_bytes(_lines(rows[2:]))
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    for words in (["part-*.jsonl"], ["part-*"], ["part-1.jsonl", "part-2.jsonl"], ["saved"]):
        assert run_verb(["check", *words]) == 0, words
        shown = capsys.readouterr().out
        assert "train: 4 rows read, 4 kept" in shown
        assert "  question: q0\n  answer: a0 (text)\n  rationale: r\n" in shown
