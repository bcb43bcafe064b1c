"""Reading files strictly: each fault is named with its line, and the good rows around it are kept."""

from __future__ import annotations

import json
import os

import pytest

from pst_dist.data.sources.readers import read_file
from pst_dist.data.sources.rows import RawRow, Reject, excerpt
from pst_dist.errors import DataError, InputError

GOOD = b'{"question": "q", "answer": "a"}'


def _rows(entries):
    return [entry.value for entry in entries if isinstance(entry, RawRow)]


def _rejects(entries):
    return [entry for entry in entries if isinstance(entry, Reject)]


@pytest.mark.parametrize(
    ("line", "code", "what"),
    [
        (b'{"question": "q"', "json", "column 17: not JSON"),
        (b'{"question": "q",}', "json", "not JSON"),
        (b'{"question": "q"} x', "json", "'x' after the object"),
        (b"[1, 2]", "not_object", "row is a list"),
        (b'"text"', "not_object", "row is text"),
        (b"17", "not_object", "row is a number"),
        (b"null", "not_object", "row is null"),
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', "duplicate_key", "duplicate key 'x' in an object"),
        (b'{"a": NaN}', "not_finite", "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "not_finite", "-Infinity is not JSON"),
        (b'{"a": 1e999}', "not_finite", "1e999 is not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too_long", "a number of 5000 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep", "nested deeper than 64"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "too_deep", "nested deeper than 64"),
        (b'{"a": "\xff"}', "encoding", "byte 8 is not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate", "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "surrogate", "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_by_name_and_its_neighbours_are_kept(tmp_path, line, code, what):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    entries = read_file(path).entries
    assert len(_rows(entries)) == 2
    (reject,) = _rejects(entries)
    assert (reject.code, reject.line, reject.path) == (code, 2, str(path))
    assert what in reject.what
    assert len(reject.text) <= 80
    assert str(reject).startswith(f"{path}:2: ")


def test_lines_end_at_newline_bytes_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + '{"a": "one\u2028two\u0085three \U0001f600"}\r\n\n  \n{"a": "\\ud83d\\ude00"}'.encode()
    )
    entries = read_file(path).entries
    assert _rows(entries) == [{"a": "one\u2028two\u0085three \U0001f600"}, {"a": "\U0001f600"}]
    assert [entry.line for entry in entries] == [1, 4]


def test_an_overlong_line_is_refused_and_not_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b'\n{"a": "' + b"x" * (17 << 20) + b'"}\n' + GOOD)
    entries = read_file(path).entries
    assert [type(entry) for entry in entries] == [RawRow, Reject, RawRow]
    assert (entries[1].code, entries[1].line, entries[2].line) == ("too_long", 2, 3)


def test_utf16_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(InputError, match="UTF-16"):
        read_file(path)


@pytest.mark.parametrize(
    "text",
    [
        '[\n  {"a": 1},\n  {"a": NaN},\n  7,\n  {\n    "a": 2\n  }\n]\n',
        '{"name": "data", "data":\n[{"a": 1},\n  {"a": NaN},\n  7,\n  {\n    "a": 2\n  }\n]}\n',
        '{"a": 1}\n\n{"a": NaN}\n7\n{"a": 2}\n',
    ],
)
def test_json_files_hold_a_list_or_data_or_lines_and_each_row_has_its_line(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    entries = read_file(path).entries
    assert _rows(entries) == [{"a": 1}, {"a": 2}]
    assert [(reject.line, reject.code) for reject in _rejects(entries)] in ([(3, "not_finite"), (4, "not_object")],)
    assert entries[-1].line == 5


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[{"a": 1},\n {"a": ]', 2, "not JSON"),
        ('[{"a": 1}\n {"a": 2}]', 2, "expected ','"),
        ('[{"a": 1},\n]', 2, "comma before the closing bracket"),
        ('[{"a": 1}]\nmore', 2, "more after the closing bracket"),
        ('[{"a": 1},', 1, "not JSON"),
        ('{\n"a": 1}', None, "contains an object with a, not rows"),
        ('{"data": {"1": []}}', None, "data.teacher_completions"),
        ("", None, "no rows"),
        ("[]", None, "no rows"),
        ("  \n ", None, "no rows"),
    ],
)
def test_a_json_file_that_is_broken_as_a_whole_is_one_error_with_its_line(tmp_path, text, line, what):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert what in str(caught.value)
    assert (str(caught.value.path), caught.value.line) == (str(path), line)


def test_csv_rows_are_named_by_their_first_line_and_ragged_ones_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer\r\n"two\nlines",a\r\n\nonly one\nb\xff,c\n"d,""e""",f\n')
    entries = read_file(path).entries
    assert _rows(entries) == [{"question": "two\nlines", "answer": "a"}, {"question": 'd,"e"', "answer": "f"}]
    assert [(entry.line) for entry in entries] == [2, 5, 6, 7]
    assert [reject.code for reject in _rejects(entries)] == ["csv", "encoding"]


def test_empty_rows_and_columns_of_a_spreadsheet_are_left_out_but_no_value_is(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,,\nq,a,,\n,,,\nr,b,c,\ns,t\n , ,,\n")
    entries = read_file(path).entries
    assert _rows(entries) == [{"question": "q", "answer": "a"}, {"question": "s", "answer": "t"}]
    (reject,) = _rejects(entries)
    assert (reject.line, reject.what) == (4, "4 cells, but the header has 2")
    path.write_text(",question\n,q\n,\n")  # pandas writes its index without a name
    assert _rows(read_file(path).entries) == [{"": "", "question": "q"}]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a,a\n1,2\n", "the header has a duplicate column 'a'"),
        (",a,,b\n1,2,3,4\n", "have no name"),
        ('a,b\n"1,2\n', "not CSV"),
        ("a,b\n", "no rows"),
    ],
)
def test_a_csv_without_a_sound_header_or_rows_is_refused(tmp_path, text, what):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=what):
        read_file(path)


def test_parquet_rows_keep_lists_and_are_counted_from_one(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    rows = [{"question": "q", "rationales": ["a", "b"]}, {"question": None, "rationales": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    entries = read_file(path).entries
    assert _rows(entries) == rows
    assert [entry.label for entry in entries] == ["rows.parquet#1", "rows.parquet#2"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_file(path)


def test_what_is_no_file_is_refused_with_a_hint(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match=r"did you mean train\.jsonl"):
        read_file(tmp_path / "trian.jsonl")
    with pytest.raises(InputError, match=r"cannot read \.txt"):
        read_file(tmp_path / "rows.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        read_file(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"the folder .* does not exist either"):
        read_file(tmp_path / "absent" / "rows.jsonl")
    with pytest.raises(
        InputError, match=r"check data\.root; docs/data\.md says where the twelve tasks' files come from"
    ):
        read_file(tmp_path / "gsm8k" / "train.jsonl")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n")
    measure = os.fstat

    def measure_then_grow(descriptor):
        size = measure(descriptor)
        with path.open("ab") as stream:
            stream.write(GOOD + b"\n")
        return size

    # The reader measures the file first and reads it then: the second row arrives between the two.
    monkeypatch.setattr("pst_dist.data.sources.readers.os.fstat", measure_then_grow)
    with pytest.raises(InputError, match="changed while it was read"):
        read_file(path)


def test_the_digest_is_of_the_bytes(tmp_path):
    import hashlib

    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n\n")
    assert read_file(path).sha256 == hashlib.sha256(GOOD + b"\n\n").hexdigest()


def test_excerpts_cannot_forge_a_log_line():
    assert excerpt("a\nb\x1b[31m\u202e" + "x" * 100) == "a\\nb\\x1b[31m\\u202e" + "x" * 71
    assert "\x1b" not in excerpt(json.dumps("\x1b").encode() + b"\x1b\xff")
