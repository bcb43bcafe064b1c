"""Who may work in a directory: locks of the kernel, which vanish with their process however it ends.

The package filelock takes the same kernel lock (flock) but cannot say who holds it, does not notice a lock file that
was removed, and needs the right to write to it; so these are our own. On NFS the server keeps the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pst_dist.errors import EnvironmentFault, LockedError
from pst_dist.storage.atomic import disk_errors

_NOTE = re.compile(r"process (\d+) on (\S+)")


@contextlib.contextmanager
def directory_lock(directory: Path, *, wait_seconds: float = 0.0, name: str = ".lock") -> Iterator[None]:
    """Hold `directory/.lock` for this process; raises LockedError when another process holds it.

    The lock is the kernel's (flock), so it vanishes with its process however that ends. `wait_seconds` is for whoever
    knows that the holder is about to end.
    """
    patient_until = time.monotonic() + wait_seconds
    while True:
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        descriptor = _open(directory / name)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < patient_until:
                    time.sleep(0.1)
                    continue
                raise LockedError(
                    f"in use by {_owner(descriptor)}", "wait for it to end or choose another directory", path=directory
                ) from error
            except OSError as error:  # NFS takes no lock on a file that may only be read
                raise EnvironmentFault(
                    f"cannot take the lock: {error.strerror}",
                    "ask its owner for permission to write, or choose another directory",
                    path=directory / name,
                ) from error
            if not _is_at(descriptor, directory / name):
                continue  # a directory in which nothing was made was removed meanwhile, and its lock with it
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            note = f"process {os.getpid()} on {os.uname().nodename} since {since} UTC"
            with contextlib.suppress(OSError):  # a full disk: the note is for people, the lock is held without it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, note.encode(), 0)
            yield
            return
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    """Open a lock file, creating it; raises EnvironmentFault naming it and its mode when that is not allowed.

    A colleague's lock file that may only be read serves as well: the kernel's lock needs no right to write (except on
    NFS, where taking it is refused).
    """
    try:
        with disk_errors(path):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except EnvironmentFault as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mode = f"its mode is {path.stat().st_mode & 0o7777:04o}"
        except OSError:
            mode = f"the mode of its directory is {path.parent.stat().st_mode & 0o7777:04o}"
        raise EnvironmentFault(
            f"cannot open the lock file: Permission denied; {mode}",
            "ask its owner for permission to write, or choose another directory",
            path=path,
        ) from error


def _owner(descriptor: int) -> str:
    """What the holder of a lock says of itself: it may have only just taken it, so its note may not be there yet."""
    for _ in range(20):
        note = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        found = _NOTE.match(note)
        if found is not None and (found[2] != os.uname().nodename or Path(f"/proc/{found[1]}").exists()):
            return note
        time.sleep(0.05)
    return "another process"  # the note is of an earlier holder: this one may not write to the file


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def lock_holder(directory: Path) -> str | None:
    """Who holds `directory/.lock`, as `directory_lock` wrote it there; None when nobody does. Changes nothing."""
    try:
        stream = (directory / ".lock").open("r")
    except OSError:
        return None
    with stream:
        try:
            # Shared, and for an instant only; a lock that is held is exclusive and refuses it.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "another process"
    return None


@contextlib.contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for this process, waiting for it; the kernel's, as `directory_lock` is."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
