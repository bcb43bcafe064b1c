"""Who may work in a directory: locks of the kernel, which vanish with their process however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pst_dist.errors import LockedError
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
            descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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


def _owner(descriptor: int) -> str:
    """What the holder of a lock says of itself; it may have just come, and its note may still be a dead one's."""
    note = ""
    for _ in range(20):
        note = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        found = _NOTE.match(note)
        if found is not None and (found[2] != os.uname().nodename or Path(f"/proc/{found[1]}").exists()):
            break
        time.sleep(0.05)
    return note or "another process"


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
