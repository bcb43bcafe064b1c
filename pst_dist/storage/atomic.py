"""Atomic writes: files and directories are written under a temporary name, synced, and renamed into place.

Published files have the mode that the umask gives. `leftovers` removes the temporary files of killed writers,
`manifest` lists the files of an artefact with their digests, and `locks` decides who may write.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from pst_dist.errors import EnvironmentFault, PstError
from pst_dist.storage.leftovers import remove_leftovers, temporary_name

_FULL = ("No space left on device", "PytorchStreamWriter failed writing", "file write failed")
_WORDED = re.compile(r"\(os error (\d+)\)")
OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILING = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.EREMOTEIO, errno.ENOTCONN)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's headers


def fsync_path(path: Path) -> None:
    """Write a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors into an EnvironmentFault with path and remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PstError):
            raise  # already reported, with the path of the file
        if not isinstance(error, OSError):
            # safetensors and torch write files themselves and raise their own exceptions.
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
    """The EnvironmentFault for an operating system error that the user can fix, else None."""
    if error.errno in OUT_OF_ROOM:
        remedy = _make_room(path)
    elif error.errno in FAILING:
        remedy = "the disk or network share is failing: repair it, then run the same command again"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "choose a directory that this user may write to"
    elif error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
        remedy = "no file can be created there: choose another path"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        remedy = "something else has that name: move it or choose another directory"
    elif error.errno in (errno.EBUSY, errno.EXDEV):
        remedy = "another file system is mounted there: mount it on a parent directory, or make this path a link to it"
    else:
        return None
    return EnvironmentFault(f"cannot write: {error.strerror}", remedy, path=path)


def nearest_existing(path: Path) -> Path:
    """The path itself, or its deepest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _make_room(path: Path) -> str:
    free = shutil.disk_usage(nearest_existing(path)).free
    return f"{free / 2**20:.0f} MiB are free: free some space and run the same command again"


def _behind_link(path: Path) -> Path:
    """The target of a link, else the path itself: the temporary file must be on the same file system as the target."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


@contextlib.contextmanager
def atomic_path(path: Path, *, follow_links: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is fsynced and renamed, on failure removed.

    A symbolic link is kept and its target is written; without `follow_links` the link itself is replaced.
    """
    path = _behind_link(path) if follow_links else path
    partial = temporary_name(path, "partial")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, glob.escape(path.name))
            yield partial
            _give_usual_modes([partial], temporary_name(path, "partial"))
            fsync_path(partial)
            os.replace(partial, path)
            fsync_path(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory in the folder of `path`; on success its files are fsynced and it is renamed.

    An older directory of that name is replaced. A reader sees the old one or the new one, never a mixture; only on a
    file system that cannot exchange names is the directory missing for an instant. A symbolic link is kept: its target
    is replaced.
    """
    path = _behind_link(path)
    partial = temporary_name(path, "partial")
    with disk_errors(path):
        try:
            remove_leftovers(path.parent, glob.escape(path.name))
            partial.mkdir(parents=True)
            yield partial
            publish_directory(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish_directory(partial: Path, path: Path) -> None:
    """fsync every file of `partial` and rename it to `path`, replacing any older directory."""
    with disk_errors(path):
        entries = [*sorted(partial.rglob("*")), partial]
        _give_usual_modes(entries, partial / ".mode")
        for entry in entries:
            fsync_path(entry)
        replaced = None
        if not path.exists():
            os.replace(partial, path)
        elif exchange(partial, path):
            replaced = partial
        else:
            replaced = temporary_name(path, "replaced")
            os.replace(path, replaced)
            try:
                os.replace(partial, path)
            except OSError:
                os.replace(replaced, path)  # give the old directory its name back
                raise
        try:
            fsync_path(path.parent)
        finally:
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)


def _give_usual_modes(paths: list[Path], probe: Path) -> None:
    """Give files and directories the mode of newly created ones: 0666 and 0777 less the umask.

    Some libraries create private files (safetensors writes weights as 0600), which nobody else could load. A default
    ACL of the directory overrides the umask, so the mode is read from a newly created file, `probe`.
    """
    umask = _umask()
    odd = []
    for path in paths:
        found = path.lstat()
        usual = 0o777 if stat.S_ISDIR(found.st_mode) else 0o666
        if not stat.S_ISLNK(found.st_mode) and (umask is None or found.st_mode & 0o777 != usual & ~umask):
            odd.append((path, stat.S_ISDIR(found.st_mode)))
    if not odd:
        return
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    file_mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    probe.mkdir(0o777)
    directory_mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path, is_directory in odd:
        with contextlib.suppress(OSError):  # a file system without modes, or one that maps them
            path.chmod(directory_mode if is_directory else file_mode)


def _umask() -> int | None:
    """This process's umask; None when it cannot be read from /proc (os.umask would change it for all threads)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return None


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False when the file system cannot (such as NFS).

    Uses renameat2(2) with RENAME_EXCHANGE, available since Linux 3.15.
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
    """Remove a directory and its contents; it gets a temporary name first, so the name disappears atomically.

    A link to a directory, or a mount point, is kept and only emptied, so that it can be filled again.
    """
    remove_leftovers(path.parent, glob.escape(path.name))
    if not path.is_dir():
        return
    with disk_errors(path):
        if not path.is_symlink():
            removed = temporary_name(path, "replaced")
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
    """Write a text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
