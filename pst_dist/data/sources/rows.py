"""The output of the readers: a row with its location, or the reason why it was rejected."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.data.row_store import RowStore, Stored
from pst_dist.storage.manifest import canonical_json
from pst_dist.storage.outputs import is_reject_list, write_output


@dataclass(frozen=True)
class Reject:
    """A row that could not be used: its location, the reason, and its first characters."""

    path: str
    line: int
    """Line number counted from 1; in files without lines, the row number counted from 1."""
    code: str
    """One word: json, encoding, missing, type, empty, answer…"""
    what: str
    text: str = ""
    """The first 80 characters, with control characters escaped."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"

    def to_json(self) -> dict[str, Any]:
        """The object written to rejects.jsonl."""
        return {"path": self.path, "line": self.line, "code": self.code, "what": self.what, "text": self.text}


class RowError(ValueError):
    """A row that lacks a field, has one of the wrong type, or has no certain answer; `code` is one word."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code, self.what = code, what


@dataclass(frozen=True)
class RawRow:
    """One row as read from its source."""

    value: dict[str, Any]
    path: str
    line: int
    label: str
    """A short location that is the same on every machine: `file:line` or `file#row`."""

    def reject(self, code: str, what: str) -> Reject:
        """This row as a reject."""
        return Reject(self.path, self.line, code, what, excerpt(str(self.value)))


@dataclass(frozen=True)
class Input:
    """Something that was read: a file, a hub dataset or a generator, as it was at that time."""

    name: str
    """Absolute path of a file; its URL without secrets; the spec of a hub dataset or generator."""
    sha256: str
    """Of a file's bytes; for a hub dataset the digest of its fingerprint, for a generator that of its rows."""
    bytes: int = 0
    mtime_ns: int | None = None
    """None where the time cannot show a change: the file changed shortly before it was read, or it is not a file."""
    ctime_ns: int | None = None
    """The time of the last change of the file or of its times, which `touch` and `cp -p` cannot set back."""
    version: str | None = None
    """Of a file in object storage: what the store changes with its content. None where a change might not show."""


Entry = RawRow | Reject
"""One entry of a file, good or bad."""


class Rejects(Stored[Reject]):
    """The bad rows in a store, in the order in which they were found."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        super().__init__(store.rejected)

    def between(self, start: int, stop: int) -> Iterator[Reject]:
        """The bad rows from `start` to before `stop`."""
        query = "SELECT reject FROM rejects WHERE number>=? AND number<? ORDER BY number"
        for (text,) in self._store.run(query, (start, stop)):
            yield Reject(**json.loads(text))


@functools.lru_cache(maxsize=4096)
def plain_name(column: str) -> str:
    """The name of a column in lower case without separators."""
    return re.sub(r"[^a-z0-9]", "", str(column).lower())


def excerpt(text: str | bytes) -> str:
    """The first 80 characters with control characters escaped, safe to print and to log."""
    if isinstance(text, bytes):
        text = text[:400].decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:80])


def write_rejects(path: Path, rejects: Sequence[Reject], *, inside: Path | None = None) -> None:
    """One JSON line per bad row: path, line, code, what, text; an empty file when there are none.

    Raises InputError for a file that exists and is no such list, and for one that a link takes out of `inside`.
    """
    lines = "".join(canonical_json(reject.to_json()) + "\n" for reject in rejects)
    # Bytes that were no UTF-8 are in file names as lone surrogates.
    write_output(path, lines.encode("utf-8", "backslashreplace"), is_reject_list, inside=inside)
