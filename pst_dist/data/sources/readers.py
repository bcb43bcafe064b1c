"""Read a data file into rows, good and bad, each with its location, and compute the digest of its bytes.

CSV and Parquet are read here, JSON in `strict_json`, `save_to_disk` folders and hub datasets in `saved_datasets`.
`columns` interprets the columns of a row.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pst_dist.data.sources.arrow_probe import Unreadable, probe
from pst_dist.data.sources.arrow_values import ArrowValues
from pst_dist.data.sources.compressed import (
    COMPRESSED,
    OTHER_ARCHIVES,
    Readable,
    data_suffix,
    decompressed,
    expansion_limit,
)
from pst_dist.data.sources.rows import Entry, Input, RawRow, Reject, excerpt
from pst_dist.data.sources.strict_json import (
    LONG_CELL,
    MAX_CELL_CHARACTERS,
    NOT_UTF8,
    Line,
    fault_in,
    json_document,
    refuse_utf16,
    unparsed_lines,
)
from pst_dist.errors import DataError, EnvironmentFault, InputError
from pst_dist.storage.regular_files import open_regular

_COARSEST_TIME_NS = 2 * 10**9
"""File systems give files times in steps of up to two seconds; a change within a step leaves the time alone."""
_SNIFFED = 1 << 16
"""Characters of a CSV file that decide which delimiter it has."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class FileRows:
    """All rows of one file, good and bad, in order."""

    path: str
    entries: list[Entry]
    input: Input

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return self.input.sha256


def read_file(path: Path) -> FileRows:
    """Read one data file in the format given by its suffix, decompressing `.gz` and `.zst`.

    Raises InputError for a file that is missing, unreadable, of an unsupported format or modified while being read, and
    DataError for one that has no rows or is corrupt as a whole.
    """
    inputs: list[Input] = []
    entries = [parsed(item) for item in stream_file(path, inputs.append)]
    return FileRows(str(path), entries, inputs[0])


def stream_file(path: Path, done: Callable[[Input], None]) -> Iterator[Line | Entry]:
    """The rows of `read_file` one after another, those of JSON Lines as lines that are not parsed yet.

    At the end `done` receives the file's digest and time.
    """
    check_file(path)
    try:
        with open_regular(path, remedy="use a file, or a folder written by save_to_disk") as stream:
            opened, before = time.time_ns(), os.fstat(stream.fileno())
            tap = _HashingReader(stream)
            found = False
            for entry in _entries(path, tap, before.st_size):
                found = True
                yield entry
            tap.drain()
            after = path.stat()
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror or error}", path=path) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or tap.bytes != after.st_size:
        raise InputError("the file changed while it was read", "run again when it is complete", path=path)
    if not found:
        raise DataError("the file has no rows", "use a file with at least one row", path=path)
    done(input_of(path, tap.digest.hexdigest(), before, opened))


def parsed(item: Line | Entry) -> Entry:
    """An entry of a file, parsed if it is not yet."""
    return item.entry() if isinstance(item, Line) else item


def check_file(path: Path) -> None:
    """Raise InputError for a file that does not exist or has an unsupported format."""
    refuse_other_formats(path)
    if not os.path.lexists(path):
        raise InputError("no such file", _neighbours(path), path=path)


def input_of(path: Path, sha256: str, found: os.stat_result, opened: int) -> Input:
    """A file that was read whole; `opened` is the time in nanoseconds at which `found` was looked up."""
    settled = found.st_mtime_ns < opened - _COARSEST_TIME_NS
    times = (found.st_mtime_ns, found.st_ctime_ns) if settled else (None, None)
    return Input(os.path.abspath(path), sha256, found.st_size, *times)


def refuse_other_formats(path: Path) -> None:
    """Raise InputError for an unsupported format."""
    suffix = data_suffix(path.name)
    if path.suffix.lower() in OTHER_ARCHIVES:
        raise InputError(f"cannot read {path.suffix}", "decompress it, or use .gz or .zst", path=path)
    if suffix == ".parquet" and path.suffix.lower() in COMPRESSED:
        raise InputError("compressed Parquet files are not supported", "decompress it", path=path)
    if suffix not in SUFFIXES:
        kind = path.suffix or "a file without a suffix"
        raise InputError(f"cannot read {kind}", f"use {', '.join(SUFFIXES)}, or these as .gz or .zst", path=path)


_PUBLIC = {"reasoning_teacher", "teacher_completions_davinci002", "gsm8k", "aqua", "aqua_human", "csqa_palm"}
"""Folders of public files that the ready-made configs name."""


def _neighbours(path: Path) -> str:
    """A hint: a file in the same folder whose name differs by a typing error, or what to check."""
    if not path.parent.is_dir():
        where = "; docs/data.md says where the twelve tasks' files come from" if _PUBLIC & set(path.parts) else ""
        return f"the folder {path.parent} does not exist either: check data.root{where}"
    # Compared without suffixes, and not if only the digits differ: n1.jsonl and n7.jsonl are different files.
    wanted = path.name.partition(".")[0]
    stems = {entry.name.partition(".")[0]: entry.name for entry in path.parent.iterdir() if entry.name[:1] != "."}
    letters = wanted.strip("0123456789")
    near = [
        name
        for name in difflib.get_close_matches(wanted, stems, n=3, cutoff=0.75)
        if len(letters) > 2 and name.strip("0123456789") != letters
    ]
    same = stems.get(wanted)
    if same or near:
        return f"did you mean {same or stems[near[0]]}?"
    return "check the name and data.root"


class _HashingReader:
    """A binary stream that hashes everything it returns, so that the digest covers exactly the bytes parsed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.bytes = stream, hashlib.sha256(), 0

    def _seen(self, piece: bytes) -> bytes:
        self.digest.update(piece)
        self.bytes += len(piece)
        return piece

    def read(self, size: int = -1, /) -> bytes:
        return self._seen(self._stream.read(size))

    def readline(self, limit: int = -1, /) -> bytes:
        return self._seen(self._stream.readline(limit))

    def drain(self) -> None:
        while self._seen(self._stream.read(1 << 20)):
            pass


def _entries(path: Path, tap: _HashingReader, size: int) -> Iterator[Line | Entry]:
    suffix = data_suffix(path.name)
    stream: Readable = decompressed(path, tap, size) if path.suffix.lower() in COMPRESSED else tap
    if suffix in (".jsonl", ".ndjson"):
        yield from unparsed_lines(path, stream.readline)
    elif suffix == ".json":
        yield from json_document(path, stream.read())
    elif suffix == ".parquet":
        yield from _parquet(path, size)
    else:
        yield from _delimited(path, stream, "\t" if suffix == ".tsv" else ",")


class _Chained(io.RawIOBase):
    """The bytes of a head that was read already, then those of its stream."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head, self._stream = memoryview(head), stream

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any, /) -> int:
        if not self._head:
            self._head = memoryview(self._stream.read(len(target)))
        count = min(len(target), len(self._head))
        target[:count], self._head = self._head[:count], self._head[count:]
        return count


def _head(stream: Readable, size: int) -> bytes:
    """The first bytes of a stream, which may return fewer at a time."""
    found = b""
    while len(found) < size and (piece := stream.read(size - len(found))):
        found += piece
    return found


def _delimited(path: Path, stream: Readable, delimiter: str) -> Iterator[Entry]:
    """Read CSV with a header. A row may span several lines; its line number is that of the first.

    Spreadsheets also write rows and columns that are empty: rows without a value are skipped, and columns at the end
    that have neither name nor values.
    """
    head = _head(stream, 4 * _SNIFFED)  # a character has at most four bytes
    refuse_utf16(path, head)
    head = head.removeprefix(codecs.BOM_UTF8)
    # Higher than our own limit, because the library would refuse the whole file.
    csv.field_size_limit(4 * MAX_CELL_CHARACTERS)
    delimiter = _delimiter(head.decode("utf-8", "surrogateescape"), delimiter)
    # Bytes that are not UTF-8 become lone surrogates here and are found cell by cell below.
    buffered = io.BufferedReader(_Chained(head, stream), 1 << 20)
    text = io.TextIOWrapper(buffered, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    nameless = last_line = 0
    try:
        for cells in reader:
            line, last_line = last_line + 1, reader.line_num
            if not cells or (header is None and cells == ["sep=", ""]):
                continue
            if header is None:
                nameless = _nameless_at_the_end(cells)
                header = _header(path, line, cells[: len(cells) - nameless])
                continue
            if len(cells) > 1 and not any(map(str.strip, cells)):
                continue
            if nameless and len(cells) == len(header) + nameless and not any(map(str.strip, cells[-nameless:])):
                cells = cells[:-nameless]
            if len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)}"
                yield Reject(str(path), line, "csv", what, excerpt(delimiter.join(cells)))
            elif delimiter == "\t" and any(_holds_rows(cell, len(header)) for cell in cells):
                what = f"a quote opens a cell that goes on to line {last_line}, over whole rows"
                yield Reject(str(path), line, "csv", what, excerpt(delimiter.join(cells)))
            elif any(map(_has_foreign_bytes, cells)):
                what = f"bytes that are not UTF-8{NOT_UTF8}"
                yield Reject(str(path), line, "encoding", what, excerpt(delimiter.join(cells)))
            elif any(len(cell) > MAX_CELL_CHARACTERS for cell in cells):
                yield Reject(str(path), line, "too_long", LONG_CELL, excerpt(cells[0]))
            else:
                row = dict(zip(header, cells, strict=True))
                yield RawRow(row, str(path), line, f"{path.name}:{line}")
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", "fix the quotes", path=path, line=reader.line_num) from error


def _delimiter(text: str, usual: str) -> str:
    """The usual delimiter, or another one if the usual one gives a single column and the other one several.

    In many countries spreadsheets write semicolons, because the comma is the decimal separator.
    """
    lines = text[:_SNIFFED].splitlines()
    first = next((line for line in lines if line.strip()), "")
    if len(first) == 5 and first.startswith("sep="):  # Excel's own line about it
        return first[4]
    found = {}
    for delimiter in (usual, ",", ";", "\t", "|"):
        try:
            found[delimiter] = len(next(csv.reader([first], delimiter=delimiter)))
        except csv.Error:
            found[delimiter] = 1
    return usual if found[usual] > 1 else max(found, key=lambda delimiter: found[delimiter])


def _nameless_at_the_end(cells: list[str]) -> int:
    """The number of columns without a name at the end of a header; 0 for a single one, which is read like others."""
    count = len(cells)
    while count and not cells[count - 1].strip():
        count -= 1
    return len(cells) - count if 0 < count < len(cells) - 1 else 0


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        what = (
            f"the header has a duplicate column {twice[0]!r}" if twice[0] else "two columns of the header have no name"
        )
        raise DataError(what, "rename one" if twice[0] else "name them", path=path, line=line)
    if any(map(_has_foreign_bytes, cells)):
        raise DataError(f"the header contains bytes that are not UTF-8{NOT_UTF8}", path=path, line=line)
    return header


def _holds_rows(cell: str, columns: int) -> bool:
    """Whether a cell has line breaks and tabs enough for another row: programs write TSV without quoting quotes."""
    return "\n" in cell and cell.count("\t") >= columns - 1 > 0


def _has_foreign_bytes(cell: str) -> bool:
    return not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell)


def _parquet(path: Path, size: int) -> Iterator[Entry]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EnvironmentFault("reading Parquet needs pyarrow", "pip install 'pst-dist[data]'", path=path) from error
    try:
        probe([path], expansion_limit(size))
        with parquet.ParquetFile(path) as table:
            number, values = 0, ArrowValues.of(table.schema_arrow)
            # Few rows at a time: one cell may have 16 MiB and occur in every row of the file.
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield table_row(values.corrected(row), str(path), path.name, number)
    except (pyarrow.ArrowException, UnicodeDecodeError, Unreadable) as error:
        what = f"not a readable Parquet file: {str(error).splitlines()[0][:160]}"
        raise DataError(what, "copy or create the file again", path=path) from error


def table_row(row: dict[str, Any], path: str, name: str, number: int) -> Entry:
    """Row `number` (counted from 1) of a table without lines (Parquet, Arrow), checked by the same rules as JSON."""
    fault = fault_in(row)
    if fault is not None:
        return Reject(path, number, fault.code, fault.what, excerpt(str(row)))
    return RawRow(row, path, number, f"{name}#{number}")
