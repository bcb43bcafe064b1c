"""Where this rank is, and signs that it makes progress: what its watcher reports to the other ranks.

`at` and `alive` are called by the code that trains, also between the rows or files of a long section. Native code that
reports nothing (reading weights, training a tokenizer, building an engine) runs inside `working`, where the CPU time
of this process counts as progress. `peer_watch` sends what is recorded here, `peer_verdict` defines a place.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pst_dist.distributed.peer_verdict import Place

WINDOW_SECONDS = 2.0
LEAST_SHARE = 0.02
"""Within `working`, a window in which the process used at least this share of one core counts as progress. A process
that waits for ever uses none; background threads, such as a Ray worker's, use less than a hundredth."""

_place = Place()
# Apart from the place, because other threads may add to it: at worst one of two signs at the same time is lost.
_signs = 0
_blocks = 0
_since, _cpu = 0.0, 0.0


def at(section: str, step: int | None = None) -> None:
    """Record that this rank enters a section ("backward", step 41); cheap: sends nothing and waits for nothing."""
    global _place
    _place = Place(section, step, _place.entered + 1)
    alive()


def alive() -> None:
    """Record progress inside a long section, so that it does not count as a hang; from any thread."""
    global _signs
    _signs += 1


def place() -> Place:
    """Where this rank is, with all signs so far."""
    return _place._replace(signs=_signs)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Count CPU time as progress within this block, for work that cannot call `alive`.

    The time in which the training thread waits in a collective does not count (`note_work`). A loop that never ends is
    not noticed in such a block, so it must contain only work that ends.
    """
    global _blocks
    alive()
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        alive()


def note_work(*, waiting: bool) -> None:
    """Turn CPU time since the last window into a sign; the watcher calls this at each beat, from its own thread."""
    global _since, _cpu
    now, cpu = time.monotonic(), time.process_time() - time.thread_time()
    if _blocks == 0 or waiting or _since == 0.0:
        _since, _cpu = now, cpu
    elif now - _since >= WINDOW_SECONDS:
        if cpu - _cpu >= LEAST_SHARE * (now - _since):
            alive()
        _since, _cpu = now, cpu
