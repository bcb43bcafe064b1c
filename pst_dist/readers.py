"""From bytes on disk to rows, each with its address; what is not a row becomes a `Reject` and the rest goes on.

JSON is read strictly and by b"\\n" only: a duplicate key, NaN or half a surrogate pair is a fault that the
usual readers accept without a word. What the columns of a row mean is left to `columns`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pst_dist.errors import DataError, EnvironmentFault, InputError

MAX_LINE_BYTES = 16 << 20
"""A longer line is a reject and is not held in memory."""
MAX_DEPTH = 64
"""Deeper nesting of lists and objects is a reject."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Reject:
    """A row that could not be used: where it stands, why, and how it begins."""

    path: str
    line: int
    """Line counted from 1; in files without lines the row, counted from 1."""
    code: str
    """One word: json, encoding, missing, type, empty, answer…"""
    what: str
    text: str = ""
    """The first 80 characters, control characters escaped."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"

    def to_json(self) -> dict[str, Any]:
        """As it stands in rejects.jsonl."""
        return {"path": self.path, "line": self.line, "code": self.code, "what": self.what, "text": self.text}


@dataclass(frozen=True)
class RawRow:
    """One row as it was read."""

    value: dict[str, Any]
    path: str
    line: int
    label: str
    """A short address that is the same on every machine: `file:line` or `file#row`."""

    def reject(self, code: str, what: str) -> Reject:
        """This row, refused."""
        return Reject(self.path, self.line, code, what, excerpt(str(self.value)))


Entry = RawRow | Reject


@dataclass(frozen=True)
class FileRows:
    """All rows of one file, in order, good and bad."""

    path: str
    entries: list[Entry]
    sha256: str


def excerpt(text: str | bytes) -> str:
    """The first 80 characters with control characters escaped, safe to print and to log."""
    if isinstance(text, bytes):
        text = text[:400].decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:80])


def read_file(path: Path) -> FileRows:
    """Read one data file by its suffix.

    Raises InputError for a file that is missing, unreadable, of another kind or changed while being read, and
    DataError for one that holds no rows or is broken as a whole.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot read {path.suffix or 'a file without suffix'}", f"use {', '.join(SUFFIXES)}", path=path)
    if not path.exists():
        raise InputError("no such file", _neighbours(path), path=path)
    if not path.is_file():
        raise InputError("is not a regular file", "give a file, or a folder that save_to_disk wrote", path=path)
    try:
        with path.open("rb") as stream:
            before = os.fstat(stream.fileno())
            tap = _HashingReader(stream)
            entries = list(_entries(path, tap))
            tap.drain()
            after = path.stat()
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror or error}", path=path) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or tap.bytes != after.st_size:
        raise InputError("changed while it was read", "run again when it is complete", path=path)
    if not entries:
        raise DataError("no rows in it", "give a file with at least one row", path=path)
    return FileRows(str(path), entries, tap.digest.hexdigest())


def _neighbours(path: Path) -> str:
    """What the nearest existing folder holds, for a mistyped name."""
    import difflib

    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either: check data.root"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"did you mean {near[0]}?" if near else "check the name and data.root"


class _HashingReader:
    """A binary file that hashes all it gives out, so the digest is of exactly the bytes that were parsed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.bytes = stream, hashlib.sha256(), 0

    def _seen(self, piece: bytes) -> bytes:
        self.digest.update(piece)
        self.bytes += len(piece)
        return piece

    def read(self) -> bytes:
        return self._seen(self._stream.read())

    def readline(self, limit: int) -> bytes:
        return self._seen(self._stream.readline(limit))

    def drain(self) -> None:
        while self._seen(self._stream.read(1 << 20)):
            pass


def _entries(path: Path, stream: _HashingReader) -> Iterator[Entry]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path, stream)
    elif suffix == ".json":
        yield from _json_document(path, stream.read())
    elif suffix == ".parquet":
        yield from _parquet(path)
    else:
        yield from _delimited(path, stream.read(), "\t" if suffix == ".tsv" else ",")


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError("is UTF-16", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8", path=path)


# --- JSON ---------------------------------------------------------------------------------------------------


class _Fault:
    """Stands in a parsed value where strict JSON would not go on."""

    def __init__(self, code: str, what: str) -> None:
        self.code, self.what = code, what


def _object(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return _Fault("duplicate_key", f"key {excerpt(twice)!r} stands twice in one object")
    return value


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= 4000 else _Fault("too_long", f"a number of {len(digits)} digits")


def _real(digits: str) -> Any:
    value = float(digits)
    return value if abs(value) != float("inf") else _Fault("not_finite", f"number {excerpt(digits)} is not finite")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_real,
    parse_constant=lambda word: _Fault("not_finite", f"{word} is not JSON"),
)


def _fault_in(value: Any) -> _Fault | None:
    """The first fault anywhere in a parsed value; walks without recursion, so depth cannot hurt it."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, _Fault):
            return item
        if depth > MAX_DEPTH:
            return _Fault("too_deep", f"nested deeper than {MAX_DEPTH}")
        if isinstance(item, str):
            if any("\ud800" <= char <= "\udfff" for char in item) if not item.isascii() else False:
                return _Fault("surrogate", "half of a surrogate pair (\\ud800 to \\udfff) in a text")
        elif isinstance(item, dict):
            stack.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            stack.extend((part, depth + 1) for part in item)
    return None


def _row_or_reject(value: Any, path: Path, line: int, text: str | bytes) -> Entry:
    fault = _fault_in(value)
    if fault is not None:
        return Reject(str(path), line, fault.code, fault.what, excerpt(text))
    if not isinstance(value, dict):
        from pst_dist.tasks.scoring import kind_of

        return Reject(str(path), line, "not_object", f"row is {kind_of(value)}, wanted an object", excerpt(text))
    return RawRow(value, str(path), line, f"{path.name}:{line}")


def _json_lines(path: Path, stream: _HashingReader) -> Iterator[Entry]:
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            _refuse_utf16(path, raw)
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            start = raw[:400]
            while (more := stream.readline(1 << 20)) and not more.endswith(b"\n"):
                pass
            yield Reject(
                str(path), number, "too_long", f"line is longer than {MAX_LINE_BYTES >> 20} MiB", excerpt(start)
            )
        elif raw.strip():
            yield _json_line(path, number, raw)


def _json_line(path: Path, number: int, raw: bytes) -> Entry:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject(str(path), number, "encoding", f"byte {error.start + 1} is not UTF-8", excerpt(raw))
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
    except json.JSONDecodeError as error:
        return Reject(str(path), number, "json", f"column {error.colno}: not JSON: {error.msg}", excerpt(text))
    except RecursionError:
        return Reject(str(path), number, "too_deep", f"nested deeper than {MAX_DEPTH}", excerpt(text))
    rest = text[end:].strip(" \t\r\n")
    if rest:
        return Reject(
            str(path), number, "json", f"column {end + 1}: not JSON: {excerpt(rest)[:20]!r} after the object", excerpt(text)
        )
    return _row_or_reject(value, path, number, text)


def _json_document(path: Path, raw: bytes) -> Iterator[Entry]:
    """A list of objects, an object whose `data` is one, or JSON lines under another name."""
    _refuse_utf16(path, raw)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    start = raw.lstrip()[:1]
    if start == b"[":
        yield from _json_list(path, _text(path, raw))
        return
    if start == b"{" and _is_lines(raw):
        for number, line in enumerate(raw.split(b"\n"), 1):
            if line.strip():
                yield _json_line(path, number, line)
        return
    if not start:
        return
    text = _text(path, raw)
    value = _whole(path, text)
    rows = value.get("data") if isinstance(value, dict) else None
    if isinstance(rows, dict):
        raise DataError(
            "its `data` is an object, not a list of rows",
            "a Fine-tune-CoT completion file belongs in data.teacher_completions",
            path=path,
        )
    if not isinstance(rows, list):
        keys = f"an object with {', '.join(map(excerpt, list(value)[:6]))}" if isinstance(value, dict) else "one value"
        raise DataError(f"holds {keys}, not rows", 'give a list, {"data": [...]} or one object a line', path=path)
    yield from _json_list(path, text, text.index("[", text.index('"data"')))


def _is_lines(raw: bytes) -> bool:
    """Whether the first line is a whole object: JSON lines, however the file is called."""
    first = raw.lstrip().split(b"\n", 1)[0]
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return not (isinstance(value, dict) and isinstance(value.get("data"), list | dict) and len(value) <= 3)


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"byte {error.start + 1} is not UTF-8", "convert the file to UTF-8", path=path, line=line) from error


def _whole(path: Path, text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"column {error.colno}: not JSON: {error.msg}", "mend the file", path=path, line=error.lineno) from error
    except RecursionError as error:
        raise DataError(f"nested deeper than {MAX_DEPTH}", path=path) from error


def _json_list(path: Path, text: str, start: int | None = None) -> Iterator[Entry]:
    """The elements of a JSON list one by one, so that each has its line and a faulty one its own reject."""
    if start is None:
        start = text.index("[")
    position, line, counted = start + 1, text.count("\n", 0, start) + 1, start

    def skip(index: int) -> int:
        while index < len(text) and text[index] in " \t\r\n":
            index += 1
        return index

    def broken(index: int, message: str) -> DataError:
        column = index - text.rfind("\n", 0, index)
        return DataError(
            f"column {column}: not JSON: {message}", "mend the file", path=path, line=text.count("\n", 0, index) + 1
        )

    position = skip(position)
    if text[position : position + 1] == "]":
        return
    while True:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from error
        except RecursionError as error:
            raise DataError(f"nested deeper than {MAX_DEPTH}", path=path, line=line) from error
        yield _row_or_reject(value, path, line, text[position : position + 200])
        position = skip(end)
        separator = text[position : position + 1]
        if separator == "]":
            return
        if separator != ",":
            raise broken(position, "expected ',' or ']' after a row")
        position = skip(position + 1)


# --- tables -------------------------------------------------------------------------------------------------


def _delimited(path: Path, raw: bytes, delimiter: str) -> Iterator[Entry]:
    """CSV with a header; a row may span lines and is named by its first."""
    _refuse_utf16(path, raw)
    # Bytes that are not UTF-8 become lone surrogates here and are found cell by cell below.
    text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    last_line = 0
    try:
        for cells in reader:
            line, last_line = last_line + 1, reader.line_num
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise DataError(f"column {twice[0]!r} stands twice in the header", path=path, line=line)
                continue
            if len(cells) != len(header):
                what = f"{len(cells)} cells, the header has {len(header)}"
                yield Reject(str(path), line, "csv", what, excerpt(delimiter.join(cells)))
            elif any("\udc80" <= char <= "\udcff" for cell in cells if not cell.isascii() for char in cell):
                yield Reject(str(path), line, "encoding", "bytes that are not UTF-8", excerpt(delimiter.join(cells)))
            else:
                row = dict(zip(header, cells, strict=True))
                yield RawRow(row, str(path), line, f"{path.name}:{line}")
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", "mend the quotes", path=path, line=reader.line_num) from error


def _parquet(path: Path) -> Iterator[Entry]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EnvironmentFault("reading Parquet needs pyarrow", "pip install 'pst-dist[data]'", path=path) from error
    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield table_row(row, str(path), path.name, number)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"not a readable Parquet file: {str(error).splitlines()[0][:120]}", path=path) from error


def table_row(row: dict[str, Any], path: str, name: str, number: int) -> Entry:
    """A row of a table without lines (Parquet, Arrow), counted from 1, held to the same rules as JSON."""
    fault = _fault_in(row)
    if fault is not None:
        return Reject(path, number, fault.code, fault.what, excerpt(str(row)))
    return RawRow(row, path, number, f"{name}#{number}")
