"""Gives the rows of a `RowStore` ids that are unique over all splits and sources.

Ids often count from 0 in every file, so equal ids in different files are normal. Within one split, two different rows
with the same id are an error of the data.
"""

from __future__ import annotations

from collections.abc import Iterator

from pst_dist.data.row_store import RowStore
from pst_dist.data.sample import SPLITS


def first_repeated_id(store: RowStore, split: int) -> tuple[int, int] | None:
    """(place, earlier place) of the first row with the id of an earlier row but another question or answer, or None."""
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


def final_ids(store: RowStore) -> None:
    """Give rows ids that are unique over all splits.

    An id that an earlier split uses gets the split's name as a prefix; one that its own split uses gets a number as a
    suffix.
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
    """The same for a mixture: an id that is taken gets the name of its source as a prefix. `parts` are the names."""
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
    """(place, part, id) of the rows of a split in order, as they are before the caller changes ids."""
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
