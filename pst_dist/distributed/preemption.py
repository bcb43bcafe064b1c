"""Stop signals: the first requests a stop at the next step boundary, the second ends the process at once.

Slurm, Kubernetes and spot machines announce the end with a signal and then wait for a while. The trainer acts on the
request at the step boundary, where all ranks learn of it even if only one received the signal.
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
"""Our Slurm scripts have Slurm's --signal send SIGUSR1 before the time limit."""


ONE_REQUEST_SECONDS = 2.0
"""A signal to a whole process group arrives twice, because the launcher forwards its own: that is one request."""


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
            # The second request ends the process at once. A file being written keeps its temporary name.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal, self._since = number, time.monotonic()
        log.warning("%s: stopping after this step; a second signal stops at once", signal.Signals(number).name)


def end_as_told(number: int, what: str) -> NoReturn:
    """Raise what a signal asks for: KeyboardInterrupt for SIGINT, else PreemptedError saying `what` was done."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise PreemptedError(f"stopped by a signal: {what}", "run the same command again to resume")


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle SIGTERM, SIGINT and SIGUSR1 within this block; afterwards the earlier handlers are restored.

    After PeerLostError, which ends the process, SIGTERM stays ignored.

    Only a process's main thread can handle signals: in other threads (such as Ray Train's) this does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._arrived) for number in ASKING}
    try:
        yield request
    except PeerLostError:
        # A launcher that noticed the loss too sends the remaining ranks SIGTERM; they must report the reason first.
        before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set outside Python by an embedding program; it cannot be restored
                signal.signal(number, handler)
