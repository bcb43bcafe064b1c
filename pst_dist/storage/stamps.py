"""Remembers that files were compared with their digests, so that they are read again only when they have changed.

Comparing the shards and vectors of ten million rows reads hundreds of gigabytes, and every start and every rank would
do it. So the process that compares or publishes a directory writes the stamps of its files into
`.NAME.verified.json`. A file whose stamp is still the same is not read. Every write gives a file another stamp, by
whatever program; damage that leaves the stamp alone (a failing disk) is found by `pst verify`, which reads everything.

The note is not part of the artefact: it contains times and inode numbers, which differ between machines. Without it, or
on another machine, all files are compared.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from pst_dist.errors import PstError
from pst_dist.storage.atomic import write_text
from pst_dist.storage.json_files import canonical_json, parse_json, read_content

Stamp = list[int]
"""Bytes, modification time and change time in nanoseconds, and inode."""
_TICK_SECONDS = 0.02
"""Longer than the steps in which the kernel's clock gives files their times."""


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file; None for one that cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def stamps_of(directory: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """The stamps of files, to be taken before their digests are compared."""
    found = {name: stamp_of(directory / name) for name in names}
    return {name: stamp for name, stamp in found.items() if stamp is not None}


def remembered(directory: Path, digest: str) -> dict[str, Stamp]:
    """The noted stamps of a directory with this manifest digest; empty when there is no such note."""
    path = _note(directory)
    try:
        found = parse_json(read_content(path), path)
    except PstError:
        return {}
    if not isinstance(found, dict) or found.get("manifest") != digest or not isinstance(found.get("files"), dict):
        return {}
    return found["files"]


def remember(directory: Path, digest: str, stamps: dict[str, Stamp]) -> None:
    """Note the stamps of files that were found to match the manifest with this digest.

    Left out are files that changed a moment ago, since a further change could leave the same times. Does nothing where
    nothing can be written: the files are then compared again.
    """
    latest = time.time_ns() - int(_TICK_SECONDS * 1e9)
    settled = {name: stamp for name, stamp in stamps.items() if max(stamp[1], stamp[2]) < latest}
    if settled != remembered(directory, digest):
        with contextlib.suppress(PstError, OSError):
            write_text(_note(directory), canonical_json({"manifest": digest, "files": settled}) + "\n")


def remember_published(directory: Path, digest: str, names: Iterable[str]) -> None:
    """Note the stamps of files that this process has just written and published."""
    time.sleep(_TICK_SECONDS)
    remember(directory, digest, stamps_of(directory, names))


def _note(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.verified.json")
