"""Where each sample of a split is in its tars, in one file that all processes of a machine share through a memory map.

Reading the indexes of ten thousand shards takes half a minute and 16 bytes a row, in each process of a training. The
file is made by the first one and lies beside the shards; it is no part of them and can be deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pst_dist.errors import PstError
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.json_files import canonical_json

PLACE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("check", "<u4")])
"""Where a sample is in its tar, and a checksum of its id."""
FROM_ROWS = 50_000
"""Fewer rows are read from their indexes, in a tenth of a second."""


def open_places(path: Path, shards: str, rows: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """[rows] of `PLACE`, for the shards with the manifest digest `shards`.

    They are mapped from the file, which is made if it is missing, damaged or of other shards. For few rows, and where
    the file cannot be written, they are in memory.
    """
    if rows < FROM_ROWS:
        return make()
    found = _read(path, shards, rows)
    if found is not None:
        return found
    made = make()
    header = {"shards": shards, "rows": rows, "sha256": _digest(made)}
    with contextlib.suppress(PstError, OSError), atomic_path(path) as partial, partial.open("wb") as stream:
        stream.write(canonical_json(header).encode() + b"\n")
        made.tofile(stream)
    found = _read(path, shards, rows)
    return made if found is None else found


def _digest(places: np.ndarray) -> str:
    return hashlib.sha256(places.view(np.uint8).data).hexdigest()


def _read(path: Path, shards: str, rows: int) -> np.ndarray | None:
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.readline())
            start = stream.tell()
        if (header["shards"], header["rows"]) != (shards, rows):
            return None
        places = np.memmap(path, PLACE, "r", start, (rows,))
        return places if _digest(places) == header["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
