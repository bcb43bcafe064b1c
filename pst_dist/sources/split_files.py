"""The file that says which rows of data.train are trained on and which are held out, by their index."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pst_dist.errors import DataError, InputError
from pst_dist.schema import SPLITS


def read_split_file(path: Path, rows: int) -> tuple[dict[str, list[int]], str]:
    """Indices of each split, counted from 0, in the file's order, and the file's sha256.

    The file is JSON {"train": […], "test": […]}, with "validation" if one is wanted. Raises InputError when it
    cannot be read and DataError when an index is no row of the `rows` there are or stands twice.
    """
    try:
        raw = path.read_bytes()
        value: Any = json.loads(raw)
    except OSError as error:
        raise InputError(f"cannot read the split file: {error.strerror}", "check data.split_file", path=path) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"split file is not JSON: {error}", path=path) from error
    if not isinstance(value, dict) or "train" not in value or not set(value) <= set(SPLITS):
        raise DataError('split file is not {"train": [index…], "test": [index…]}', path=path)
    owner: dict[int, str] = {}
    for split, indices in value.items():
        if not isinstance(indices, list):
            raise DataError(f"{split} is not a list of row indices", path=path)
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise DataError(f"{split} holds {index!r}, which is no row index", path=path)
            if not 0 <= index < rows:
                raise DataError(
                    f"{split} names row {index}, but data.train has {rows} rows",
                    "the split file belongs to another file",
                    path=path,
                )
            if index in owner:
                raise DataError(f"row {index} is in {owner[index]} and again in {split}", path=path)
            owner[index] = split
    return value, hashlib.sha256(raw).hexdigest()
