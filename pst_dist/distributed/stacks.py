"""The Python stacks of every thread of a rank, written when the ranks end because one of them hangs.

A thread that holds Python's lock in native code stops the watcher too. For that case faulthandler's own timer, which
needs no lock, writes to standard error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
from pathlib import Path


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return folder / f"rank-{rank:05d}.txt"


def write_stacks(folder: Path, rank: int, heading: str) -> Path | None:
    """Write the stacks of all threads under a heading, replacing earlier ones; None when the disk takes no file.

    The folder is created. Only system calls are made, since the blocked threads may hold any lock.
    """
    path = stack_file(folder, rank)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, f"{heading}\n\n".encode())
            faulthandler.dump_traceback(descriptor, all_threads=True)
        finally:
            os.close(descriptor)
        return path
    return None


def expect_a_beat(seconds: float) -> None:
    """Start the timer, or start it again: without a further call within `seconds`, stacks go to standard error.

    That is the case when a thread keeps Python's lock. Does nothing where standard error has no descriptor.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.dump_traceback_later(seconds, file=2)


def expect_nothing() -> None:
    """Stop the timer."""
    faulthandler.cancel_dump_traceback_later()
