"""A file that grows by chunks under a temporary name, survives a kill, and gets its final name when it is complete.

Each chunk is synced before `append` returns. After a kill or a power cut the next process reads the complete lines,
truncates the file after those it keeps, and appends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pst_dist.storage.atomic import disk_errors, fsync_path


class GrowingFile:
    """Lines that become the file `path`; until `finish` they are in `partial` beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")

    def lines(self) -> Iterator[bytes]:
        """Every line that ends with a newline, without it; nothing when the file does not exist."""
        if not self.partial.is_file():
            return
        with disk_errors(self.partial), self.partial.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield line[:-1]

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes; creates the file, and the folder, when they do not exist."""
        with disk_errors(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            with self.partial.open("ab") as stream:
                stream.truncate(size)
                os.fsync(stream.fileno())
            fsync_path(self.partial.parent)

    def append(self, data: bytes) -> None:
        """Write and sync a chunk; raises EnvironmentFault for a full or failing disk, what was there stays."""
        with disk_errors(self.partial), self.partial.open("ab") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        """Give the file its name, replacing an older one."""
        with disk_errors(self.path):
            os.replace(self.partial, self.path)
            fsync_path(self.path.parent)
