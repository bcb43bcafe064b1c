"""Rows on their way from sources to shards, in a scratch database on disk, so that memory does not grow with rows.

The engine is SQLite from the standard library. Finding repeated questions, leaks and splits means grouping rows by
question, which its sorted indexes do out of core with a fixed cache, and merging rows needs updates in place. Arrow has
no out-of-core grouping without a further engine, and sorted runs of our own would be one more engine to maintain.

The database has no name: SQLite creates it in TMPDIR (else /var/tmp) and unlinks it at once, so a killed process leaves
nothing behind. Each row is stored as the bytes that its shard will contain, with the few columns by which rows are
compared. `sources.arrange` assigns the rows to splits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import numpy as np

from pst_dist.data.sample import SPLITS, ReasoningSample
from pst_dist.errors import EnvironmentFault
from pst_dist.storage.manifest import canonical_json

_T = TypeVar("_T")
_CACHE_KIB = 128 << 10
_BATCH = 2000
TRAIN, VALIDATION, TEST = range(len(SPLITS))
"""The `split` of a row, as a position in `SPLITS`."""
DROPPED = -1
"""The `split` of a row that was removed."""

_TABLES = """
CREATE TABLE rows(
    place INTEGER PRIMARY KEY, split INTEGER, part INTEGER, path INTEGER, line INTEGER, id TEXT, key BLOB, pair BLOB,
    rationales INTEGER, correct INTEGER, turns INTEGER, synthetic TEXT,
    test_rank REAL, validation_rank REAL, rows_rank REAL
);
CREATE TABLE samples(place INTEGER PRIMARY KEY, sample BLOB);
CREATE TABLE rejects(number INTEGER PRIMARY KEY, reject TEXT);
CREATE TABLE packed(split INTEGER, number INTEGER, place INTEGER, PRIMARY KEY(split, number)) WITHOUT ROWID;
"""
_COLUMNS = 15
Row = tuple[Any, ...]
"""The columns of `rows` in their order."""


def digest(*parts: bytes) -> bytes:
    """16 bytes by which questions, and questions with their answers, are compared."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def content_of(sample: ReasoningSample) -> bytes:
    """The bytes of a sample in its shard. Half a surrogate pair is kept here, and refused where a shard is written."""
    return canonical_json(sample.to_json()).encode("utf-8", "surrogatepass")


def sample_of(content: bytes) -> ReasoningSample:
    """Inverse of `content_of`."""
    return ReasoningSample.from_json(json.loads(content.decode("utf-8", "surrogatepass")))


class RowStore:
    """The scratch database. One thread at a time."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in (f"cache_size=-{_CACHE_KIB}", "journal_mode=OFF", "synchronous=OFF", "temp_store=FILE"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("BEGIN")  # never committed: nobody reads it afterwards
        for statement in _TABLES.split(";"):
            self._database.execute(statement)
        self._waiting: list[tuple[Row, tuple[int, bytes]]] = []
        self._rejected = 0

    # ---- SQL

    def run(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Execute one statement after all rows that were added; raises EnvironmentFault when the disk is full."""
        self.flush()
        with _disk_errors():
            return self._database.execute(statement, values)

    def run_many(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        """Execute one statement for many rows of values."""
        self.flush()
        with _disk_errors():
            self._database.executemany(statement, values)

    def number(self, statement: str, values: Sequence[Any] = ()) -> int:
        """The number that a query gives; 0 for NULL."""
        return int(self.run(statement, values).fetchone()[0] or 0)

    # ---- rows

    def add(self, row: Row, content: bytes) -> None:
        """Add one row: its columns, of which the first is its place, and its bytes."""
        assert len(row) == _COLUMNS
        self._waiting.append((row, (row[0], content)))
        if len(self._waiting) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            marks = ",".join("?" * _COLUMNS)
            with _disk_errors():
                self._database.executemany(f"INSERT INTO rows VALUES({marks})", [row for row, _ in waiting])
                self._database.executemany("INSERT INTO samples VALUES(?,?)", [content for _, content in waiting])

    def content(self, place: int) -> bytes:
        """The bytes of one row."""
        found: bytes = self.run("SELECT sample FROM samples WHERE place=?", (place,)).fetchone()[0]
        return found

    def sample(self, place: int) -> ReasoningSample:
        """One row as a sample."""
        return sample_of(self.content(place))

    def change(self, place: int, **fields: Any) -> None:
        """Give a row other fields; its id, rationales and turns are changed in its columns too."""
        sample = replace(self.sample(place), **fields)
        self.run("UPDATE samples SET sample=? WHERE place=?", (content_of(sample), place))
        self.run(
            "UPDATE rows SET id=?, rationales=?, turns=? WHERE place=?",
            (sample.id, len(sample.rationales), len(sample.turns), place),
        )

    def samples(self, split: int) -> Iterator[tuple[int, ReasoningSample]]:
        """(place, sample) of the rows that are in a split now, in order."""
        query = "SELECT place, sample FROM rows JOIN samples USING(place) WHERE split=? ORDER BY place"
        for place, content in self.run(query, (split,)):
            yield place, sample_of(content)

    def count(self, split: int) -> int:
        """How many rows a split has now."""
        return self.number("SELECT COUNT(*) FROM rows WHERE split=?", (split,))

    def reorder(self, order: Iterable[tuple[int, int]]) -> None:
        """Keep exactly the rows at these (split, place), in this order; places that have no row are left out."""
        names = [name for _, name, *_ in self.run("PRAGMA table_info(rows)")][2:]
        kept = ",".join(names)
        self.run("CREATE TABLE wanted(number INTEGER PRIMARY KEY, split INTEGER, place INTEGER)")
        self.run_many("INSERT INTO wanted(split, place) VALUES(?,?)", order)
        joined = "FROM wanted CROSS JOIN rows USING(place)"
        self.run(f"CREATE TABLE chosen AS SELECT number, wanted.split AS split, {kept} {joined} ORDER BY number")
        self.run(
            "CREATE TABLE texts AS SELECT number, sample FROM wanted CROSS JOIN samples USING(place) ORDER BY number"
        )
        self.run("DELETE FROM rows")
        self.run("DELETE FROM samples")
        self.run(f"INSERT INTO rows SELECT number, split, {kept} FROM chosen ORDER BY number")
        self.run("INSERT INTO samples SELECT number, sample FROM texts ORDER BY number")
        for table in ("wanted", "chosen", "texts"):
            self.run(f"DROP TABLE {table}")

    def may_repeat_ids(self, split: int | None = None) -> bool:
        """Whether rows of a split, or of all splits, share an id; False is certain, True rarely a coincidence.

        Takes 8 bytes of memory for each row, for the hashes of the ids.
        """
        where, values = ("split>=0", ()) if split is None else ("split=?", (split,))
        count = self.number(f"SELECT COUNT(*) FROM rows WHERE {where}", values)
        found = self.run(f"SELECT id FROM rows WHERE {where}", values)
        hashes = np.fromiter((hash(name) for (name,) in found), np.int64, count)
        hashes.sort()
        return bool((hashes[1:] == hashes[:-1]).any())

    # ---- results

    def reject(self, value: dict[str, Any]) -> None:
        """Add a bad row."""
        self._rejected += 1
        self.run("INSERT INTO rejects VALUES(?,?)", (self._rejected - 1, json.dumps(value)))

    @property
    def rejected(self) -> int:
        """How many bad rows were added."""
        return self._rejected

    def finish(self) -> None:
        """Number the rows of each split; called once, before `rows_of`."""
        for split in range(len(SPLITS)):
            self.run(
                "INSERT INTO packed SELECT ?, ROW_NUMBER() OVER (ORDER BY place) - 1, place FROM rows WHERE split=?",
                (split, split),
            )

    def rows_of(self, split: str) -> StoredRows:
        """The finished rows of a split."""
        return StoredRows(self, split)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if not any(words in str(error) for words in ("full", "I/O", "unable to open")):
            raise
        raise EnvironmentFault(
            f"cannot write the scratch file that rows are sorted in: {error}",
            "set TMPDIR to a folder on a disk with room for twice the rows",
        ) from error


class Stored(Sequence[_T]):
    """A sequence of values that are on disk. Equal to any sequence of equal values."""

    def __init__(self, count: int) -> None:
        self._count = count

    @abstractmethod
    def between(self, start: int, stop: int) -> Iterator[_T]:
        """The values from `start` to before `stop`."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_T]:
        return self.between(0, self._count)

    @overload
    def __getitem__(self, i: int) -> _T: ...
    @overload
    def __getitem__(self, i: slice) -> list[_T]: ...
    def __getitem__(self, i: int | slice) -> _T | list[_T]:
        if isinstance(i, slice):
            start, stop, step = i.indices(self._count)
            if step == 1:
                return list(self.between(start, stop))
            return [self[k] for k in range(start, stop, step)]
        if not -self._count <= i < self._count:
            raise IndexError(i)
        return next(self.between(i % self._count, i % self._count + 1))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes) or len(other) != self._count:
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._count} values, {self[:3]!r}…>"


class StoredRows(Stored[ReasoningSample]):
    """The rows of one split; each is parsed when it is asked for."""

    def __init__(self, store: RowStore, split: str, *, with_turns: bool = True) -> None:
        self.store, self._split, self._name, self._with_turns = store, SPLITS.index(split), split, with_turns
        super().__init__(store.number("SELECT COUNT(*) FROM packed WHERE split=?", (self._split,)))

    def between(self, start: int, stop: int) -> Iterator[ReasoningSample]:
        """The samples from `start` to before `stop`."""
        for _, content, _ in self.contents(start, stop):
            yield sample_of(content)

    def contents(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, bytes, int]]:
        """(id, bytes in the shard, number of rationales) of the rows from `start` to before `stop`."""
        cursor = self.store.run(
            "SELECT id, sample, rationales, turns FROM packed JOIN rows USING(place) JOIN samples USING(place)"
            " WHERE packed.split=? AND number>=? AND number<? ORDER BY number",
            (self._split, start, self._count if stop is None else stop),
        )
        for name, content, rationales, turns in cursor:
            if turns and not self._with_turns:
                content = content_of(replace(sample_of(content), turns=()))
            yield name, content, rationales

    def without_turns(self) -> StoredRows:
        """The same rows without their conversations."""
        return StoredRows(self.store, self._name, with_turns=False)

    @property
    def have_turns(self) -> bool:
        """Whether any row has a conversation."""
        return self._with_turns and bool(self._sum("turns"))

    @property
    def rationales(self) -> int:
        """Number of rationales of all rows."""
        return self._sum("rationales")

    def synthetic(self) -> dict[str, int]:
        """Model -> number of the questions that it made up."""
        query = "SELECT synthetic, COUNT(*) FROM rows WHERE split=? AND synthetic!='' GROUP BY synthetic"
        return dict(self.store.run(query, (self._split,)))

    def by_part(self) -> dict[int, int]:
        """Number of a source in a mixture -> its rows."""
        query = "SELECT part, COUNT(*) FROM rows WHERE split=? GROUP BY part ORDER BY part"
        return dict(self.store.run(query, (self._split,)))

    def _sum(self, column: str) -> int:
        return self.store.number(f"SELECT SUM({column}) FROM rows WHERE split=?", (self._split,))
