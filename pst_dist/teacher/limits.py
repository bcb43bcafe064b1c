"""How fast requests may be sent: two token buckets, and a pause that the server asks for.

A bucket holds what six seconds allow and fills continuously, because many servers also count shorter times than a
minute. A request takes 1 from the bucket of requests and its estimated tokens from the other; the difference to its
real tokens is given back, or taken, when it has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

Clock = Callable[[], float]
_BURST_MINUTES = 0.1
_LEAST_SECONDS = 1e-6


class Bucket:
    """Units that refill at a constant rate; may be overdrawn by one request that is larger than the bucket."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self._size, self._rate, self._clock = max(1.0, per_minute * _BURST_MINUTES), per_minute / 60, clock
        self._level, self._at = self._size, clock()

    def seconds_until(self, amount: float) -> float:
        """How long to wait before `amount` can be taken; 0 if at once."""
        self._fill()
        wanted = min(amount, self._size)  # a larger request waits for a full bucket
        return max(0.0, (wanted - self._level) / self._rate)

    def take(self, amount: float) -> None:
        """Take an amount (negative: give it back)."""
        self._fill()
        self._level = min(self._size, self._level - amount)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now


class Pace:
    """Both buckets and the pause. Requests pass one after the other, in the order in which they came."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self._clock = clock
        self._requests = Bucket(requests_per_minute, clock) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, clock) if tokens_per_minute else None
        self._until = 0.0
        self._turn = asyncio.Lock()
        self.waited_seconds = 0.0
        """Time for which the limits held requests back, all of them together."""

    def pause(self, seconds: float) -> None:
        """Send nothing for so long, because the server said so; a longer pause that is under way stays."""
        self._until = max(self._until, self._clock() + seconds)

    @property
    def paused_seconds(self) -> float:
        """What is left of the pause."""
        return max(0.0, self._until - self._clock())

    async def ready(self, tokens: float) -> None:
        """Wait until a request of so many tokens may be sent, and count it."""
        started = self._clock()
        async with self._turn:
            # The last bit of a division must not make a caller wait again for nothing.
            while (seconds := self._wait(tokens)) > _LEAST_SECONDS:
                await asyncio.sleep(seconds)
            if self._requests is not None:
                self._requests.take(1)
            if self._tokens is not None:
                self._tokens.take(tokens)
        self.waited_seconds += self._clock() - started

    def correct(self, estimated: float, real: float) -> None:
        """Replace the estimate of a request by what it really used."""
        if self._tokens is not None:
            self._tokens.take(real - estimated)

    def _wait(self, tokens: float) -> float:
        waits = [self.paused_seconds]
        if self._requests is not None:
            waits.append(self._requests.seconds_until(1))
        if self._tokens is not None:
            waits.append(self._tokens.seconds_until(tokens))
        return max(waits)
