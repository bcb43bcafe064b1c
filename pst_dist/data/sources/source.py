"""A source of rows: something that can be read several times, from its first row to its last, with a digest.

`specs` makes sources of the words in a config.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pst_dist.data.sources.readers import parsed
from pst_dist.data.sources.remote import RemoteSource
from pst_dist.data.sources.rows import Entry, Input, RawRow
from pst_dist.data.sources.strict_json import Line
from pst_dist.errors import InputError

Done = Callable[[str, tuple[Input, ...]], None]
"""Receives the digest of a source and its inputs when all its rows were read."""


@dataclass
class Source:
    """The rows of one file, folder, dataset or generator, which may be read several times."""

    path: str
    stem: str
    """Short name; ids that we create start with it."""
    read: Callable[[Done], Iterator[Line | Entry]]
    """Reads all rows once, good and bad, in order."""
    generated: bool = False
    is_whole: bool = False
    """Whether it cannot be read without having all rows in memory; they are then kept from the first time on."""
    sha256: str = ""
    """Known, like `inputs`, when all rows were read."""
    inputs: tuple[Input, ...] = ()
    """The files that were read; for a hub dataset or a generator its spec."""
    remote: RemoteSource | None = None
    """Where it is in object storage; it is fetched by `fetch`, or when it is first read."""
    _kept: list[Line | Entry] | None = None

    def rows(self) -> Iterator[Entry]:
        """The rows one after another; raises as `read_specs` does, and InputError for a source that changed."""
        return map(parsed, self.items())

    def items(self) -> Iterator[Line | Entry]:
        """The rows, those of JSON Lines as lines that are not parsed yet; raises as `rows`."""
        if self.is_whole and self._kept is None:
            self._kept = list(self.read(self._done))
        yield from self.read(self._done) if self._kept is None else self._kept

    def head(self, most: int) -> list[dict[str, Any]]:
        """The first good rows."""
        good = (row.value for row in self.rows() if isinstance(row, RawRow))
        return list(itertools.islice(good, most))

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """All rows, kept in memory."""
        return list(self.rows())

    def _done(self, sha256: str, inputs: tuple[Input, ...]) -> None:
        if self.sha256 not in ("", sha256):
            raise InputError("the file changed while it was read", "run again when it is complete", path=self.path)
        self.sha256, self.inputs = sha256, inputs
