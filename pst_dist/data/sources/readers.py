"""From a data file to its rows, good and bad, each with its address, and the digest of the bytes they came from.

CSV and Parquet are read here, JSON in `strict_json`; `save_to_disk` folders and hub datasets in `specs`.
What the columns of a row mean is left to `columns`.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pst_dist.data.sources.rows import Entry, RawRow, Reject, excerpt
from pst_dist.data.sources.strict_json import MAX_LINE_BYTES, fault_in, json_document, json_lines, refuse_utf16
from pst_dist.errors import DataError, EnvironmentFault, InputError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class FileRows:
    """All rows of one file, in order, good and bad."""

    path: str
    entries: list[Entry]
    sha256: str


def read_file(path: Path) -> FileRows:
    """Read one data file by its suffix.

    Raises InputError for a file that is missing, unreadable, of another kind or changed while being read, and
    DataError for one that holds no rows or is broken as a whole.
    """
    if path.suffix.lower() not in SUFFIXES:
        kind = path.suffix or "a file without suffix"
        raise InputError(f"cannot read {kind}", f"use {', '.join(SUFFIXES)}", path=path)
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
        yield from json_lines(path, stream.readline)
    elif suffix == ".json":
        yield from json_document(path, stream.read())
    elif suffix == ".parquet":
        yield from _parquet(path)
    else:
        yield from _delimited(path, stream.read(), "\t" if suffix == ".tsv" else ",")


def _delimited(path: Path, raw: bytes, delimiter: str) -> Iterator[Entry]:
    """CSV with a header; a row may span lines and is named by its first."""
    refuse_utf16(path, raw)
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
    fault = fault_in(row)
    if fault is not None:
        return Reject(path, number, fault.code, fault.what, excerpt(str(row)))
    return RawRow(row, path, number, f"{name}#{number}")
