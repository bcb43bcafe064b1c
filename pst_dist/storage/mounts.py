"""Which file system a folder is on."""

from __future__ import annotations

from pathlib import Path

OF_ONE_MACHINE = ("tmpfs", "ramfs", "overlay", "devtmpfs")
"""File systems that no other node can see."""


def filesystem_of(folder: Path, mounts: str) -> str:
    """The type of the file system that a folder is on; `mounts` is the text of /proc/self/mounts."""
    parts = folder.absolute().parts
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, place, found, *_ = (*line.split(" "), "", "", "")
        mounted = Path(place.replace("\\040", " ")).parts
        if parts[: len(mounted)] == mounted and len(mounted) >= best:
            best, kind = len(mounted), found
    return kind
