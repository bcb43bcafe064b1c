"""Files and directories that are whole or absent: written under another name, synced, renamed into place.

What a killed process leaves is told by its name and removed by the next write of the same thing. Which bytes belong
together, and their digests, are `storage`; who may write at all is `locks`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pst_dist.errors import EnvironmentFault, PstError

_FULL = ("No space left on device", "PytorchStreamWriter failed writing", "file write failed")
_WORDED = re.compile(r"\(os error (\d+)\)")
OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILING = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.EREMOTEIO, errno.ENOTCONN)
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})([0-9a-f]{8})([0-9a-f]{4})\.(partial|replaced)")
_FOREIGN_SECONDS = 24 * 3600.0
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's headers


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one line that names path and remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PstError):
            raise  # told already, of the file itself
        if not isinstance(error, OSError):
            # safetensors and torch write by themselves and raise kinds of their own.
            number = _WORDED.search(str(error))
            if number is None and not any(words in str(error) for words in _FULL):
                raise
            code = int(number[1]) if number is not None else errno.ENOSPC
            error = OSError(code, os.strerror(code))
        fault = fault_of(error, path)
        if fault is None:
            raise
        raise fault from error


def fault_of(error: OSError, path: Path) -> EnvironmentFault | None:
    """The line for an error of the operating system that has a remedy outside this program, else None."""
    if error.errno in OUT_OF_ROOM:
        remedy = _make_room(path)
    elif error.errno in FAILING:
        remedy = "the disk or network share is failing: see to it, then run the same command again"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "choose a directory that this user may write to"
    elif error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
        remedy = "no file can be made there: choose another place"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        remedy = "something else stands at that place: move it or choose another directory"
    elif error.errno in (errno.EBUSY, errno.EXDEV):
        remedy = "another file system is mounted there: mount it on a directory above, or make this one a link to it"
    else:
        return None
    return EnvironmentFault(f"cannot write: {error.strerror}", remedy, path=path)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the deepest of its parents that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _make_room(path: Path) -> str:
    free = shutil.disk_usage(nearest_existing(path)).free
    return f"{free / 2**20:.0f} MiB are free: make room and run the same command again"


@functools.cache
def _origin() -> str:
    """8 hex digits for the set of processes whose ids can be told apart here: this boot, this container."""
    facts = [os.uname().nodename]
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            facts.append(os.readlink(place) if place.endswith("pid") else Path(place).read_text())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:8]


def _temporary(path: Path, ending: str) -> Path:
    """A name beside `path` that no other process uses and that says whose it is; see `_remove_abandoned`."""
    return path.with_name(f".{path.name}.{_origin()}{os.getpid():08x}{uuid.uuid4().hex[:4]}.{ending}")


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left while they wrote `path`: theirs are the names whose process is no more.

    Those of other machines and earlier boots are taken for abandoned when nothing has touched them for a day.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = _TEMPORARY.fullmatch(leftover.name)
        if found is None or leftover.name != f".{path.name}.{found[1]}{found[2]}{found[3]}.{found[4]}":
            continue
        with contextlib.suppress(OSError):
            if found[1] == _origin():
                abandoned = not _is_running(int(found[2], 16))
            else:
                abandoned = time.time() - leftover.stat().st_mtime > _FOREIGN_SECONDS
            if abandoned and leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif abandoned:
                leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _behind_link(path: Path) -> Path:
    """Where a link leads, else the path itself: the temporary name must be on the disk that the link was made for."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed, on failure removed.

    A link stays one: what it points to is written.
    """
    path = _behind_link(path)
    partial = _temporary(path, "partial")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            yield partial
            _fsync_path(partial)
            os.replace(partial, path)
            _fsync_path(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success its files are fsynced and it takes that name.

    An older directory of that name is replaced: a reader sees the old one or the new one, never a mixture, and never
    none but (for one instant) on a file system that cannot exchange names. A link stays one: what it points to is
    replaced.
    """
    path = _behind_link(path)
    partial = _temporary(path, "partial")
    with disk_errors(path):
        try:
            _remove_abandoned(path)
            partial.mkdir(parents=True)
            yield partial
            publish_directory(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish_directory(partial: Path, path: Path) -> None:
    """fsync every file of `partial` and rename it to `path`, replacing what was there."""
    with disk_errors(path):
        for entry in sorted(partial.rglob("*")):
            _fsync_path(entry)
        _fsync_path(partial)
        replaced = None
        if not path.exists():
            os.replace(partial, path)
        elif exchange(partial, path):
            replaced = partial
        else:
            replaced = _temporary(path, "replaced")
            os.replace(path, replaced)
            try:
                os.replace(partial, path)
            except OSError:
                os.replace(replaced, path)  # the old one is still what this name stands for
                raise
        try:
            _fsync_path(path.parent)
        finally:
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one instant, so that neither is ever missing; False where the file system cannot, as NFS.

    renameat2(2) with RENAME_EXCHANGE, of Linux 3.15.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def remove_directory(path: Path) -> None:
    """Remove a directory with all that is in it, in one instant: it first gets a temporary name.

    Of a link to a directory, or a directory on which a file system is mounted, what is in there is removed, so that it
    can be filled anew.
    """
    _remove_abandoned(path)
    if not path.is_dir():
        return
    with disk_errors(path):
        if not path.is_symlink():
            removed = _temporary(path, "replaced")
            try:
                os.replace(path, removed)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                shutil.rmtree(removed, ignore_errors=True)
                return
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                remove_directory(entry)
            else:
                entry.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
