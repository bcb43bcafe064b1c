"""Split, filter, merge and name the rows in a `RowStore`, with memory that does not depend on their number.

Every decision is about one question or about a rank, so the rows are visited question by question: only questions that
occur more than once can repeat, leak or contradict each other, and their rows are together in the index by question.
`load` calls these steps in order; `mixture` joins several stores. `splits` has the cuts of rows that are in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pst_dist.data.row_store import DROPPED, RowStore
from pst_dist.data.sample import SPLITS, normalise_question
from pst_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = range(len(SPLITS))


def index_questions(store: RowStore) -> None:
    """Sort the rows by question; called when all rows are there and none is bad any more."""
    store.run("CREATE INDEX by_question ON rows(key, place, split, pair, part, test_rank, validation_rank)")


def first_repeated_id(store: RowStore, split: int) -> tuple[int, int] | None:
    """(place of the first row whose id an earlier row has with another question or answer, that earlier place)."""
    if not store.may_repeat_ids(split):
        return None
    found = store.run(
        "SELECT rows.place, first.place FROM ("
        " SELECT id, MIN(place) AS place, pair FROM rows WHERE split=? GROUP BY id HAVING COUNT(*) > 1"
        ") AS first JOIN rows ON rows.id = first.id AND rows.split=? WHERE rows.pair != first.pair"
        " ORDER BY rows.place LIMIT 1",
        (split, split),
    ).fetchone()
    return found and (found[0], found[1])


def cut(store: RowStore, size: int | float, purpose: str, into: int) -> None:
    """Move a part of the training rows to another split.

    `size` below 1 is a fraction: the hash of a question's first row decides, so rows added later never move other rows.
    From 1 on it is a number of questions, those with the smallest hashes. Rows with the same question stay together, so
    the part cannot leak. Raises ConfigError for another size, and if no training rows would remain.
    """
    if size == 0 or not store.count(TRAIN):
        return
    check_size(size, purpose)
    # SQLite takes the rank from the row with the smallest place ("bare columns in an aggregate query").
    groups = f"SELECT key, MIN(place) AS place, {purpose}_rank AS rank FROM rows WHERE split=0 GROUP BY key"
    store.run("CREATE TABLE part(key BLOB PRIMARY KEY) WITHOUT ROWID")
    if size < 1:
        store.run(f"INSERT INTO part SELECT key FROM ({groups}) WHERE rank < ?", (size,))
    if not store.number("SELECT EXISTS(SELECT 1 FROM part)"):
        most = max(1, int(size))
        store.run(f"INSERT INTO part SELECT key FROM ({groups}) ORDER BY rank, place LIMIT ?", (most,))
    part = store.number("SELECT COUNT(*) FROM part")
    store.run("UPDATE rows SET split=? WHERE split=0 AND key IN (SELECT key FROM part)", (into,))
    if not store.count(TRAIN):
        raise leaves_none(size, purpose, part)
    store.run("DROP TABLE part")
    if size < 1:
        _warn_of_uneven(size, purpose, part, part + store.number("SELECT COUNT(DISTINCT key) FROM rows WHERE split=0"))


def _warn_of_uneven(size: float, purpose: str, part: int, questions: int) -> None:
    """Warn when the hashes of few questions gave a part far from the share that was asked for."""
    wanted = max(1, round(size * questions))
    if abs(part - wanted) >= 2 and 2 * abs(part - wanted) > wanted:
        log.warning(
            "data.%s_size=%s took %d of %d questions instead of about %d, as the hashes of few ids are uneven; "
            "data.%s_size=%d takes that many",
            purpose,
            size,
            part,
            questions,
            wanted,
            purpose,
            wanted,
        )


def check_size(size: int | float, purpose: str) -> None:
    """Raise ConfigError for a size that is neither a fraction nor a number of questions."""
    if size < 0 or (isinstance(size, float) and size > 1 and size != int(size)):
        raise ConfigError(f"data.{purpose}_size={size} is neither a fraction nor a number of questions")


def leaves_none(size: int | float, purpose: str, questions: int) -> ConfigError:
    """The error for a part that has all questions."""
    return ConfigError(
        f"data.{purpose}_size={size} leaves none of the {questions} questions for training", "make it smaller"
    )


@dataclass
class Repeats:
    """What `settle` found out about questions that occur more than once."""

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
    """The rows of each question that occurs more than once, in order."""
    store.run("CREATE TABLE IF NOT EXISTS twins(key BLOB PRIMARY KEY) WITHOUT ROWID")
    store.run("DELETE FROM twins")
    store.run("INSERT INTO twins SELECT key FROM rows WHERE split>=0 GROUP BY key HAVING COUNT(*) > 1")
    query = (
        "SELECT key, place, split, pair, part FROM twins CROSS JOIN rows USING(key) WHERE split>=0 ORDER BY key, place"
    )
    for _, rows in itertools.groupby(store.run(query), key=lambda row: row[0]):
        yield [_Row(*values) for _, *values in rows]


def settle(store: RowStore, *, merge: bool, drop_leaks: bool) -> Repeats:
    """Merge repeated rows of each split, drop leaks, and count both and the contradictions that are left."""
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
    """Remember which rows go to which split: an index must not change while it is read."""
    store.run("CREATE TABLE IF NOT EXISTS moves(split INTEGER, place INTEGER)")
    store.run_many("INSERT INTO moves VALUES(?,?)", moves)
    moves.clear()


def _move_noted(store: RowStore) -> None:
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


def keep_first(store: RowStore, count: int) -> None:
    """Keep the `count` training rows with the smallest hashes. A smaller count gives a subset."""
    best = "SELECT place FROM rows WHERE split=0 ORDER BY rows_rank, place LIMIT ?"
    store.run(f"UPDATE rows SET split={DROPPED} WHERE split=0 AND place NOT IN ({best})", (count,))


def spoil_rationales(store: RowStore, share: float) -> int:
    """Give a share of the training rows the rationales of another row; returns how many rows were changed.

    Rows are ranked by the hash of their question, and the first ones get the rationales of the next row in rank. A
    larger share therefore changes the same rows and more. Raises DataError if there is only one row.
    """
    rows = store.count(TRAIN)
    count = round(share * rows)
    if not count:
        return 0
    if rows < 2:
        raise DataError("data.wrong_rationales needs at least two training rows, found one")
    store.run("CREATE TABLE ranked(hash BLOB, place INTEGER)")
    store.run_many("INSERT INTO ranked VALUES(?,?)", _ranked(store))
    order = [place for (place,) in store.run("SELECT place FROM ranked ORDER BY hash, place LIMIT ?", (count + 1,))]
    if count == rows:
        order.append(order[0])
    first = store.sample(order[0]).rationales
    for here, donor in itertools.pairwise(order):
        rationales = first if donor == order[0] else store.sample(donor).rationales
        store.change(here, rationales=rationales)
    store.run("DROP TABLE ranked")
    return count


def _ranked(store: RowStore) -> Iterator[tuple[bytes, int]]:
    for (place,) in store.run("SELECT place FROM rows WHERE split=0 ORDER BY place"):
        key = normalise_question(store.sample(place).question)
        yield hashlib.sha256(f"wrong/{key}".encode()).digest(), place


def final_ids(store: RowStore) -> None:
    """Give rows ids that are unique over all splits.

    Ids often count from 0 in every file. An id that an earlier split uses gets the split's name as a prefix; one that
    its own split uses gets a number as a suffix.
    """
    if not store.may_repeat_ids():
        return
    names = _Names(store)
    for split, word in enumerate(SPLITS):
        store.run("CREATE TABLE here(name TEXT PRIMARY KEY) WITHOUT ROWID")
        for place, _, given in _named(store, split):
            name = given
            if names.has(name) and not store.number("SELECT EXISTS(SELECT 1 FROM here WHERE name=?)", (name,)):
                name = f"{word}-{name}"[:120]
            base, number = name, 1
            while names.has(name):
                number += 1
                name = f"{base[:110]}-{number}"
            names.take(name)
            store.run_many("INSERT OR IGNORE INTO here VALUES(?)", [(name,), (given,)])
            if name != given:
                store.change(place, id=name)
        store.run("DROP TABLE here")
    names.close()


def final_ids_of_parts(store: RowStore, parts: list[str]) -> None:
    """The same for the rows of a mixture: an id that is taken gets the name of its source as a prefix."""
    if not store.may_repeat_ids():
        return
    names = _Names(store)
    for split in range(len(SPLITS)):
        for place, part, given in _named(store, split):
            name, number = given, 1
            while names.has(name):
                number += 1
                base = f"{parts[part]}-{given}"[:110]
                name = base if number == 2 else f"{base}-{number}"
            names.take(name)
            if name != given:
                store.change(place, id=name)
    names.close()


def _named(store: RowStore, split: int) -> Iterator[tuple[int, int, str]]:
    """(place, part, id) of the rows of a split in order, as they were when this began."""
    store.run("CREATE TABLE ids AS SELECT place, part, id FROM rows WHERE split=? ORDER BY place", (split,))
    yield from store.run("SELECT place, part, id FROM ids ORDER BY rowid")
    store.run("DROP TABLE ids")


class _Names:
    """The ids that are taken."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        store.run("CREATE TABLE taken(name TEXT PRIMARY KEY) WITHOUT ROWID")

    def has(self, name: str) -> bool:
        return bool(self._store.number("SELECT EXISTS(SELECT 1 FROM taken WHERE name=?)", (name,)))

    def take(self, name: str) -> None:
        self._store.run("INSERT INTO taken VALUES(?)", (name,))

    def close(self) -> None:
        self._store.run("DROP TABLE taken")


def drop_leaks_between_parts(store: RowStore, *, drop: bool) -> int:
    """Find training and validation rows whose question a later split of another source has; the training rows' number.

    With `drop` they are removed.
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


def copy_rows(source: RowStore, target: RowStore, part: int, split: int, first: int) -> int:
    """Append the finished rows of a split to another store, as those of a part, from place `first` on; their number."""
    query = (
        "SELECT rows.*, sample FROM packed JOIN rows USING(place) JOIN samples USING(place)"
        " WHERE packed.split=? ORDER BY number"
    )
    number = 0
    for row in source.run(query, (split,)):
        values: list[Any] = list(row[:-1])
        values[0], values[1], values[2] = first + number, split, part
        target.add(tuple(values), row[-1])
        number += 1
    return number
