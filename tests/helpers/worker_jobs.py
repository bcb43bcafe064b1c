"""Jobs that worker processes can import."""

from __future__ import annotations

import os
import signal
import time

from pst_dist.errors import DataError


def doubled(number: int) -> int:
    return 2 * number


def own_process(seconds: float = 0) -> int:
    time.sleep(seconds)
    return os.getpid()


def refused(number: int) -> int:
    raise DataError(f"row {number} is bad", "fix it", path="rows.jsonl", line=number)


def broken() -> int:
    return [][0]


def chatty() -> int:
    print("a library prints")
    os.write(1, b"and writes")
    return 1


def killed() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
