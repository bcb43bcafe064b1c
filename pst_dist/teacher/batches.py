"""Collects requests that wait at the same time into batches, and gives each batch to a lane that is free.

A lane is a model: the one in this process, or one replica of many. The first request of a batch waits a moment for
further ones, so that a lane never works on a batch of one while others wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from pst_dist.teacher.messages import Reply, Request

Lane = Callable[[list[Request]], Awaitable[list[Reply]]]
_GATHER_SECONDS = 0.02


class Batcher:
    """Hands requests to lanes, `size` at most in a batch."""

    def __init__(self, lanes: Sequence[Lane], size: int) -> None:
        self._free, self._size = list(lanes), size
        self._waiting: deque[tuple[Request, asyncio.Future[Reply]]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def ask(self, request: Request) -> Reply:
        """The reply to one request; raises what its lane raises."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._free:
            task = asyncio.create_task(self._run(self._free.pop()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await future

    async def _run(self, lane: Lane) -> None:
        try:
            while True:
                await asyncio.sleep(_GATHER_SECONDS)
                batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
                if not batch:
                    return
                await _answer(lane, batch)
        finally:
            self._free.append(lane)


async def _answer(lane: Lane, batch: list[tuple[Request, asyncio.Future[Reply]]]) -> None:
    try:
        replies = await lane([request for request, _ in batch])
    except Exception as error:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)
        return
    for (_, future), reply in zip(batch, replies, strict=True):
        if not future.done():  # its worker was cancelled
            future.set_result(reply)
