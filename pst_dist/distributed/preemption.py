"""Being told to stop: the first signal asks for an end at the next step boundary, the second ends at once.

Slurm, Kubernetes and spot machines announce an end by a signal and wait for a while. What happens at the boundary is
the trainer's; all ranks must learn of it there, also when one alone was told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from pst_dist.errors import PeerLostError, PreemptedError

log = logging.getLogger(__name__)

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm's --signal is told to send before the time limit."""


ONE_REQUEST_SECONDS = 2.0
"""A signal to a whole process group also comes from the launcher, which passes on its own: that is one request."""


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal that arrived; 0 when none did."""
        self._since = 0.0

    def _arrived(self, number: int, _: FrameType | None) -> None:
        if self.signal and time.monotonic() - self._since < ONE_REQUEST_SECONDS:
            return
        if self.signal:
            # Asked twice: no more patience. What was being written stays under its temporary name.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal, self._since = number, time.monotonic()
        log.warning("%s: stopping after this step; once more ends at once", signal.Signals(number).name)


def end_as_told(number: int, what: str) -> NoReturn:
    """End in the way that a signal asks for: KeyboardInterrupt for SIGINT, else PreemptedError with `what` was done."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise PreemptedError(f"told to stop: {what}", "the same command goes on")


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen to SIGTERM, SIGINT and SIGUSR1 within this block; earlier handlers are back after it.

    After PeerLostError, with which a process ends, SIGTERM stays unheard.

    Only a process's main thread may listen: elsewhere (a Ray worker runs training in a thread) nothing is asked.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._arrived) for number in ASKING}
    try:
        yield request
    except PeerLostError:
        # A launcher that saw the loss too ends the ranks that are left by SIGTERM: not before they have said why.
        before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:  # None was set outside Python, by a program that embeds it, and cannot be set again
                signal.signal(number, handler)
