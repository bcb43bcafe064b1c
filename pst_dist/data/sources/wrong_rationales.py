"""Gives a share of the training rows wrong rationales, to measure how much a method depends on right ones."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

from pst_dist.data.row_store import TRAIN, RowStore
from pst_dist.data.sample import normalise_question
from pst_dist.errors import DataError


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
