"""Who may work in a directory: locks of the kernel, which vanish with their process however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pst_dist.atomic import disk_errors
from pst_dist.errors import LockedError


@contextlib.contextmanager
def directory_lock(directory: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold `directory/.lock` for this process; raises LockedError when another process holds it.

    The lock is the kernel's (flock), so it vanishes with its process however that ends. `wait_seconds` is for whoever
    knows that the holder is about to end.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / ".lock").open("a+")
    with stream:
        patient_until = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < patient_until:
                    time.sleep(0.1)
                    continue
                stream.seek(0)
                owner = stream.read().strip() or "another process"
                raise LockedError(
                    f"in use by {owner}", "wait for it to end or choose another directory", path=directory
                ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {os.uname().nodename}")
        stream.flush()
        yield


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
