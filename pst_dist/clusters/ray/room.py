"""One line that says which resources a job, a rank or an actor is waiting for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

_FIRST_SECONDS = 10.0
_AGAIN_SECONDS = 60.0


def lacking(what: str, needs: Mapping[str, float], total: Mapping[str, float], free: Mapping[str, float]) -> str | None:
    """`2 ranks need 64 CPU, the cluster has 2`, with what is free where others use the rest; None when all fits.

    Resources by Ray's names (CPU, GPU, …) in Ray's units; `needs` may contain zeros.
    """
    short = [name for name, amount in needs.items() if amount > 0 and amount > free.get(name, 0) + 1e-6]
    if not short:
        return None
    wanted = ", ".join(f"{needs[name]:g} {name}" for name in short)
    has = ", ".join(
        f"{total.get(name, 0):g}" + (f" ({free.get(name, 0):g} free)" if total.get(name, 0) >= needs[name] else "")
        for name in short
    )
    return (
        f"{what} need{'' if what[:1].isdigit() and not what.startswith('1 ') else 's'} {wanted}, the cluster has {has}"
    )


class Waiting:
    """Reports for what something waits: after ten seconds, whenever that changes, and once a minute."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.begin()

    def begin(self) -> None:
        """Start counting the time since the last success."""
        self._next = time.monotonic() + _FIRST_SECONDS
        self._said, self._repeat = "", 0.0

    def look(self, reason: Callable[[], str]) -> None:
        """Say the reason if it is time to; `reason` is only called then."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _FIRST_SECONDS
        words = reason()
        if words != self._said or now >= self._repeat:
            self._said, self._repeat = words, now + _AGAIN_SECONDS
            self._say(words)
