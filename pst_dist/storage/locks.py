"""Directory locks: kernel locks (flock), which the kernel releases when their process ends, however it ends.

We do not use the package filelock: it takes the same lock but cannot report the holder, does not notice a removed
lock file, and needs write permission for it. On NFS the server keeps the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pst_dist.errors import EnvironmentFault, LockedError
from pst_dist.logs import LOG_EVERY_SECONDS
from pst_dist.storage.atomic import disk_errors

log = logging.getLogger(__name__)

_NOTE = re.compile(r"process (\d+) on (\S+)")


@contextlib.contextmanager
def directory_lock(directory: Path, *, wait_seconds: float = 0.0, name: str = ".lock") -> Iterator[None]:
    """Hold `directory/.lock` for this process; raises LockedError when another process holds it.

    Pass `wait_seconds` when the holder is known to be about to end.
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
                    f"in use by {_owner(descriptor)}", "wait until it ends or choose another directory", path=directory
                ) from error
            except OSError as error:  # NFS refuses a lock on a read-only file
                raise EnvironmentFault(
                    f"cannot take the lock: {error.strerror}",
                    "ask its owner for permission to write, or choose another directory",
                    path=directory / name,
                ) from error
            if not _is_at(descriptor, directory / name):
                continue  # another process removed the empty directory, and the lock file with it
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            note = f"process {os.getpid()} on {os.uname().nodename} since {since} UTC"
            with contextlib.suppress(OSError):  # a full disk: the note is only for people
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, note.encode(), 0)
            yield
            return
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    """Open or create a lock file; raises EnvironmentFault with its path and mode when permission is denied.

    A colleague's read-only lock file works too: flock needs no write permission (except on NFS, which refuses it).
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
    """The note of a lock's holder; retries, because a new holder may not have written it yet."""
    for _ in range(20):
        note = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        found = _NOTE.match(note)
        if found is not None and (found[2] != os.uname().nodename or Path(f"/proc/{found[1]}").exists()):
            return note
        time.sleep(0.05)
    return "another process"  # the note is an earlier holder's: this one cannot write to the file


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names this open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def lock_holder(directory: Path) -> str | None:
    """Who holds `directory/.lock`, from the note of `directory_lock`; None when nobody does. Changes nothing."""
    try:
        stream = (directory / ".lock").open("r")
    except OSError:
        return None
    with stream:
        try:
            # A shared lock, held for an instant: it fails only while somebody holds the exclusive lock.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "another process"
    return None


@contextlib.contextmanager
def taking_turns(path: Path, waits_for: str = "") -> Iterator[None]:
    """Wait for the lock file `path` and hold it for this process (flock, as in `directory_lock`).

    `waits_for` is what the other process does, for a log line every ten seconds.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    with stream:
        told = -LOG_EVERY_SECONDS
        while waits_for and not _has_taken(stream):
            if time.monotonic() - told >= LOG_EVERY_SECONDS:
                told = time.monotonic()
                log.info("waiting for another process that %s", waits_for)
            time.sleep(0.5)
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _has_taken(stream: TextIO) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
