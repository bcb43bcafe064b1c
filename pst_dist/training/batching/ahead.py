"""Prepares the batches of the next step in a thread while the current step computes.

The thread runs only inside `StepsAhead.preparing_next`, which joins it. So tokenizer, shards, embeddings and their
caches are never used by two threads at once, and nothing runs beside a validation or a save, nor after an error.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from pst_dist.training.batching.batches import PSTBatch


class StepsAhead:
    """The batches of one step after another, of which at most one is prepared in advance."""

    def __init__(self, steps: Iterator[list[PSTBatch]], *, in_thread: bool) -> None:
        """Without `in_thread` nothing is prepared in advance, as for `steps` that have processes of their own."""
        self._steps, self._in_thread = steps, in_thread
        self._prepared: list[list[PSTBatch] | None] = []
        self._error: BaseException | None = None
        self._joining_seconds = 0.0
        self.waited_seconds = 0.0
        """How long the training waited for the step that `take` returned last, in the block before it included."""

    def take(self) -> list[PSTBatch] | None:
        """The batches of the next step, or None after the last; raises what preparing them raised."""
        started = time.monotonic()
        if not self._prepared:
            self._prepare()
        if self._error is not None:
            raise self._error
        batches = self._prepared.pop()
        self.waited_seconds = self._joining_seconds + time.monotonic() - started
        self._joining_seconds = 0.0
        return batches

    @contextlib.contextmanager
    def preparing_next(self) -> Iterator[None]:
        """Prepare the next step within this block, at whose end the thread has ended too.

        An error of the preparation is raised by `take`, so the step that is computed here counts.
        """
        if not self._in_thread:
            yield
            return
        thread = threading.Thread(target=self._prepare, name="next batch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            started = time.monotonic()
            thread.join()
            self._joining_seconds = time.monotonic() - started

    def _prepare(self) -> None:
        try:
            self._prepared.append(next(self._steps, None))
        except BaseException as error:
            self._error = error
            self._prepared.append(None)
