"""Temporary names of files and directories being written, and the removal of those that killed writers left.

A temporary name is `.NAME.ID.partial` or `.NAME.ID.replaced`, where NAME is the final name and ID identifies the
process that created it. A `.replaced` directory is an older version that is being removed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path

# ID is 8 hex digits for the machine, 8 for the process and 4 random ones. Checkpoints have no ID, because all ranks
# write into one directory; older versions used other IDs.
_TEMPORARY = re.compile(
    r"\.(.+?)(?:\.([0-9a-f]{8})([0-9a-f]{8})[0-9a-f]{4}|\.[0-9a-f]+)?\.(partial|replaced)", re.DOTALL
)
_FOREIGN_SECONDS = 24 * 3600.0
"""A temporary file of another machine counts as abandoned when it has not changed for this long."""


def temporary_name(path: Path, ending: str) -> Path:
    """A unique name in the folder of `path` that identifies the process that created it."""
    return path.with_name(f".{path.name}.{_origin()}{os.getpid():08x}{uuid.uuid4().hex[:4]}.{ending}")


def final_name(name: str) -> str | None:
    """The final name that belongs to a temporary one; None when `name` is not a temporary name."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found is not None else None


def remove_leftovers(folder: Path, pattern: str = "*", *, locked: bool = False) -> None:
    """Remove temporary files of killed writers in `folder` whose final names match `pattern` (fnmatch).

    With `locked` the caller holds the lock of everything that matches, so every temporary file is abandoned. Without
    it, only those of processes that have ended are removed; those of other machines and earlier boots, once they have
    not changed for a day. Other files stay, and so does whatever cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(name for name in os.listdir(folder) if name.startswith(".")):
            found = _TEMPORARY.fullmatch(name)
            if found is None or not fnmatch.fnmatchcase(found[1], pattern):
                continue
            path = folder / name
            with contextlib.suppress(OSError):
                if locked or _is_abandoned(path, found[2], found[3]):
                    _remove(path)


def restore_replaced(path: Path) -> bool:
    """Restore a directory's name when a writer was killed between the two renames that replace it.

    The caller holds the lock. True when something was restored.
    """
    if path.exists():
        return False
    for name in sorted(os.listdir(path.parent)) if path.parent.is_dir() else []:
        if final_name(name) == path.name and name.endswith(".replaced"):
            (path.parent / name).rename(path)
            return True
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_abandoned(path: Path, origin: str | None, process: str | None) -> bool:
    if origin is None or process is None:
        return False
    if origin == _origin():
        return not _is_running(int(process, 16))
    return time.time() - path.stat().st_mtime > _FOREIGN_SECONDS


@functools.cache
def _origin() -> str:
    """8 hex digits for this boot and container, within which process ids are unique."""
    facts = [os.uname().nodename]
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            facts.append(os.readlink(place) if place.endswith("pid") else Path(place).read_text())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
