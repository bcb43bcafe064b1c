"""Questions that occur more than once in a `RowStore`: repeated rows, leaks between splits and contradictions.

The rows are visited question by question, in the order of an index on disk, so memory does not depend on their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pst_dist.data.row_store import DROPPED, TEST, TRAIN, VALIDATION, RowStore
from pst_dist.data.sample import SPLITS


def index_questions(store: RowStore) -> None:
    """Sort the rows by question. Call it once, after all rows were added and bad ones were dropped."""
    store.run("CREATE INDEX by_question ON rows(key, place, split, pair, part, test_rank, validation_rank)")


@dataclass
class Repeats:
    """What `settle` found."""

    repeated: list[int] = field(default_factory=lambda: [0] * len(SPLITS))
    """By split: rows with the question and answer of an earlier row."""
    merged: int = 0
    """Training rows that gave an earlier row a further rationale."""
    dropped: int = 0
    """Training rows that repeated an earlier row and its rationales."""
    leaks: list[int] = field(default_factory=lambda: [0] * len(SPLITS))
    """By split: rows whose question a later split has."""
    first_leak: tuple[int, int] | None = None
    """Places of the first training row that leaks, and of the row held out."""
    conflicts: int = 0
    """Training questions with more than one answer."""
    first_conflict: tuple[int, int] | None = None
    """Places of a question's first row and of the first row that contradicts it."""


@dataclass
class _Row:
    place: int
    split: int
    pair: bytes
    part: int


def _questions(store: RowStore) -> Iterator[list[_Row]]:
    """The rows of each question that occurs more than once, in the order of reading."""
    store.run("CREATE TABLE IF NOT EXISTS twins(key BLOB PRIMARY KEY) WITHOUT ROWID")
    store.run("DELETE FROM twins")
    store.run("INSERT INTO twins SELECT key FROM rows WHERE split>=0 GROUP BY key HAVING COUNT(*) > 1")
    query = (
        "SELECT key, place, split, pair, part FROM twins CROSS JOIN rows USING(key) WHERE split>=0 ORDER BY key, place"
    )
    for _, rows in itertools.groupby(store.run(query), key=lambda row: row[0]):
        yield [_Row(*values) for _, *values in rows]


def settle(store: RowStore, *, merge: bool, drop_leaks: bool) -> Repeats:
    """Merge the repeated rows of each split, drop leaks, and count these and the contradictions that are left.

    With `merge`, the first row of a question and answer in a split gets the rationales of the others, which are
    dropped. With `drop_leaks`, a row whose question a later split has is dropped.
    """
    found = Repeats()
    gone: list[tuple[int, int]] = []
    for rows in _questions(store):
        kept: list[_Row] = []
        for split in range(len(SPLITS)):
            own = [row for row in rows if row.split == split]
            firsts = list({row.pair: row for row in reversed(own)}.values())
            found.repeated[split] += len(own) - len(firsts)
            if merge and len(firsts) < len(own):
                merged, dropped = _merge(store, own)
                staying = {row.place for row in firsts}
                gone += [(DROPPED, row.place) for row in own if row.place not in staying]
                own = sorted(firsts, key=lambda row: row.place)
                if split == TRAIN:
                    found.merged, found.dropped = found.merged + merged, found.dropped + dropped
            kept += own
        by_split = [[row for row in kept if row.split == split] for split in range(len(SPLITS))]
        held_out = by_split[VALIDATION] + by_split[TEST]
        train = by_split[TRAIN]
        if train and held_out:
            found.leaks[TRAIN] += len(train)
            found.first_leak = _earlier(found.first_leak, (train[0].place, held_out[0].place), by=0)
        if by_split[VALIDATION] and by_split[TEST]:
            found.leaks[VALIDATION] += len(by_split[VALIDATION])
        if drop_leaks and held_out:
            gone += [(DROPPED, row.place) for row in train]
            train = []
            if by_split[TEST]:
                gone += [(DROPPED, row.place) for row in by_split[VALIDATION]]
        other = next((row for row in train if row.pair != train[0].pair), None)
        if other is not None:
            found.conflicts += 1
            found.first_conflict = _earlier(found.first_conflict, (train[0].place, other.place), by=1)
        if len(gone) > 10_000:
            _note(store, gone)
    _note(store, gone)
    _move_noted(store)
    return found


def _earlier(one: tuple[int, int] | None, other: tuple[int, int], *, by: int) -> tuple[int, int]:
    return other if one is None or other[by] < one[by] else one


def _merge(store: RowStore, rows: list[_Row]) -> tuple[int, int]:
    """Give the first row of each answer the new rationales of later ones: (rows that added some, rows that did not)."""
    merged = dropped = 0
    for first, *later in _by_answer(rows):
        own = store.sample(first.place).rationales
        texts = dict.fromkeys(own)
        for row in later:
            before = len(texts)
            texts.update(dict.fromkeys(store.sample(row.place).rationales))
            added = len(texts) > before
            merged, dropped = merged + added, dropped + (not added)
        if len(texts) > len(own):
            store.change(first.place, rationales=tuple(texts))
    return merged, dropped


def _by_answer(rows: list[_Row]) -> Iterable[list[_Row]]:
    groups: dict[bytes, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.pair, []).append(row)
    return groups.values()


def _note(store: RowStore, moves: list[tuple[int, int]]) -> None:
    """Write down which rows go to which split, because the index must not change while it is read; empties `moves`."""
    store.run("CREATE TABLE IF NOT EXISTS moves(split INTEGER, place INTEGER)")
    store.run_many("INSERT INTO moves VALUES(?,?)", moves)
    moves.clear()


def _move_noted(store: RowStore) -> None:
    """Move the rows that `_note` wrote down."""
    for split in sorted({split for (split,) in store.run("SELECT DISTINCT split FROM moves")}):
        store.run("UPDATE rows SET split=? WHERE place IN (SELECT place FROM moves WHERE split=?)", (split, split))
    store.run("DELETE FROM moves")


def repeats_in(store: RowStore, split: int) -> int:
    """How many rows of a split repeat the question and answer of an earlier row."""
    return sum(
        len(own) - len({row.pair for row in own})
        for rows in _questions(store)
        if (own := [row for row in rows if row.split == split])
    )


def drop_leaks_between_parts(store: RowStore, *, drop: bool) -> int:
    """The number of training rows whose question is in validation or test of another source.

    With `drop` they are removed, and so are validation rows whose question is in another source's test split.
    """
    later = {TRAIN: (VALIDATION, TEST), VALIDATION: (TEST,)}
    gone: list[tuple[int, int]] = []
    count = 0
    for rows in _questions(store):
        for row in rows:
            if any(other.split in later.get(row.split, ()) and other.part != row.part for other in rows):
                gone.append((DROPPED, row.place))
                count += row.split == TRAIN
        if len(gone) > 10_000:
            _note(store, gone)
    _note(store, gone)
    if drop:
        _move_noted(store)
    store.run("DELETE FROM moves")
    return count
