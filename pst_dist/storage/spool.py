"""Arrays that are written to a nameless file one by one and then read through memory maps.

For weights of which only a few may be in memory at once. The file has no name from its creation on, so a kill leaves
nothing behind; the maps keep it until the last array is dropped.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.storage.atomic import disk_errors


class Spool:
    """float32 arrays in a nameless file below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = tempfile.TemporaryFile(dir=folder)
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Append a float32 array; raises EnvironmentFault when the disk is full."""
        with disk_errors(self._folder):
            self._places[name] = (self._file.tell(), values.shape)
            self._file.write(np.ascontiguousarray(values, dtype=np.float32).data)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by name, as a private map of the file; no further array may be added."""
        with disk_errors(self._folder):
            self._file.flush()
        return {name: self._map(offset, shape) for name, (offset, shape) in self._places.items()}

    def _map(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        if not math.prod(shape):
            return np.zeros(shape, dtype=np.float32)  # an empty map is refused
        return np.memmap(self._file, dtype=np.float32, mode="c", offset=offset, shape=shape)
