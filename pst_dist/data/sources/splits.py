"""Assign rows to splits by the hash of their ids or by a split file.

`cut_by_hash` cuts rows in memory; `cuts` cuts rows on disk by the same rule.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_dist.data.sample import SPLITS
from pst_dist.data.sources.cuts import check_size, leaves_none
from pst_dist.data.sources.drafts import Draft
from pst_dist.data.sources.readers import input_of
from pst_dist.data.sources.rows import Input
from pst_dist.errors import DataError
from pst_dist.storage.regular_files import read_with_stat

_MAX_SPLIT_FILE_BYTES = 1 << 30


def without(drafts: Sequence[Draft], removed: Sequence[Draft]) -> list[Draft]:
    """`drafts` without those in `removed`, compared by identity."""
    gone = {id(draft) for draft in removed}
    return [draft for draft in drafts if id(draft) not in gone]


def cut_by_hash(drafts: Sequence[Draft], size: int | float, purpose: str) -> tuple[list[Draft], list[Draft]]:
    """Cut a part off the rows: (the rest, the part), both in the original order.

    `size` below 1 is a fraction: the hash of a question's first row decides, so rows added later never move other rows.
    From 1 on it is a number of questions, those with the smallest hashes. Rows with the same question stay together, so
    the part cannot leak. `purpose` salts the hash, so that test and validation cuts are independent. Raises ConfigError
    if no training rows would remain.
    """
    if size == 0 or not drafts:
        return list(drafts), []
    check_size(size, purpose)
    groups: dict[str, list[Draft]] = defaultdict(list)
    for draft in drafts:
        groups[draft.question_key].append(draft)
    order = sorted(groups.values(), key=lambda group: rank_of(group[0].sample.id, purpose))
    if size < 1:
        part = [draft for group in order if rank_of(group[0].sample.id, purpose) < size for draft in group] or list(
            order[0]
        )
    else:
        part = [draft for group in order[: int(size)] for draft in group]
    rest = without(drafts, part)
    if not rest:
        raise leaves_none(size, purpose, len(groups))
    return rest, without(drafts, rest)


def rank_of(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends only on an id and the purpose."""
    digest = hashlib.sha256(f"{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_split_file(path: Path, rows: int) -> tuple[dict[str, list[int]], Input]:
    """Row indices of each split, counted from 0, in the file's order, and the file as it was read.

    The file is JSON {"train": […], "test": […]} with an optional "validation". Raises InputError if it cannot be read,
    and DataError for an index outside the `rows` rows or a duplicate index.
    """
    opened = time.time_ns()
    raw, found = read_with_stat(path, _MAX_SPLIT_FILE_BYTES, remedy="check data.split_file")
    try:
        value: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"split file is not JSON: {error}", path=path) from error
    if not isinstance(value, dict) or "train" not in value or not set(value) <= set(SPLITS):
        raise DataError('split file is not {"train": [index…], "test": [index…]}', path=path)
    owner = bytearray(rows)
    for split, indices in value.items():
        if not isinstance(indices, list):
            raise DataError(f"{split} is not a list of row indices", path=path)
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise DataError(f"{split} contains {index!r}, which is not a row index", path=path)
            if not 0 <= index < rows:
                raise DataError(
                    f"{split} contains row {index}, but data.train has {rows} rows",
                    "use the split file that belongs to data.train",
                    path=path,
                )
            if owner[index]:
                earlier = SPLITS[owner[index] - 1]
                raise DataError(f"row {index} is in {earlier} and again in {split}", path=path)
            owner[index] = SPLITS.index(split) + 1
    return value, input_of(path, hashlib.sha256(raw).hexdigest(), found, opened)
