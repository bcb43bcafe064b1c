"""Cuts parts off the training rows in a `RowStore`: a test split, a validation split, or the first `data.max_rows`.

The hash of an id decides, so a cut does not depend on the order of the rows. `splits` has the same cut in memory.
"""

from __future__ import annotations

import logging

from pst_dist.data.row_store import DROPPED, TRAIN, RowStore
from pst_dist.errors import ConfigError

log = logging.getLogger(__name__)


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
    """Warn when the part is far from the share that was asked for, as can happen with few questions."""
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
    """The error for a part that would take all questions."""
    return ConfigError(
        f"data.{purpose}_size={size} leaves none of the {questions} questions for training", "make it smaller"
    )


def keep_first(store: RowStore, count: int) -> None:
    """Keep the `count` training rows with the smallest hashes. A smaller count gives a subset."""
    best = "SELECT place FROM rows WHERE split=0 ORDER BY rows_rank, place LIMIT ?"
    store.run(f"UPDATE rows SET split={DROPPED} WHERE split=0 AND place NOT IN ({best})", (count,))
