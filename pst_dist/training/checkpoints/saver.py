"""Saving checkpoints: in the foreground, or in a thread while training continues.

A background save copies this rank's state to host memory at the step boundary, so it captures exactly that moment; a
thread writes and hashes the copy. Ranks communicate in their main threads only: they publish together at a later step
boundary, when every rank has finished writing; a foreground save publishes at once. At most one save is in flight, and
code that needs the newest checkpoint calls `settle` first.
`training.checkpoints.checkpoint` defines what a checkpoint is and how it stays complete or absent.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.distributed.progress import at
from pst_dist.training.checkpoints.checkpoint import checkpoint_path, prepare_checkpoint, publish_checkpoint, write_part
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.engines.engine import Engine


@dataclass(frozen=True)
class Saved:
    """A checkpoint that all ranks have just written, as passed to the observer."""

    path: Path
    state: RunState
    total: int
    """Steps of the whole training."""
    loss: float
    """The weighted loss of its last step, over the global batch."""


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that is still being written."""

    partial: Path
    state: RunState
    loss: float
    written: Callable[[], dict[str, dict[str, Any]]]
    """Waits for this rank's files, or writes them now, and describes them."""
    thread: Future[Any] | None


class Saver:
    """Saves the checkpoints of one training; a context manager that leaves no thread behind."""

    def __init__(
        self,
        engine: Engine,
        root: Path,
        *,
        keep: int,
        total: int,
        in_background: bool,
        observer: Callable[[Saved], None] | None = None,
    ) -> None:
        self.engine, self.root, self.keep, self.total = engine, root, keep, total
        self.in_background, self.observer = in_background, observer
        self._flight: _Flight | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pst-checkpoint")

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: Any) -> None:
        # Other ranks may be lost, so nothing is published here; the next save removes the partial checkpoint.
        self._writer.shutdown(wait=True)

    @property
    def pending(self) -> bool:
        """Whether a save is in flight, the same on every rank."""
        return self._flight is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        thread = self._flight.thread if self._flight is not None else None
        return thread is not None and not thread.done()

    def save(self, state: RunState, loss: float) -> None:
        """Save the engine's state; a background save only makes the copy here. Collective.

        `loss` is that of the last step, for the observer. Raises DivergedError when a weight or moment is not finite.
        """
        self.settle()
        partial, part = prepare_checkpoint(self.engine, self.root, state, copy=self.in_background)
        if self.in_background:
            thread = self._writer.submit(write_part, partial, part)
            self._flight = _Flight(partial, state, loss, thread.result, thread)
        else:
            self._flight = _Flight(partial, state, loss, lambda: write_part(partial, part), None)
            self.settle()

    def settle(self) -> None:
        """Publish the save in flight, waiting until it is written; collective.

        Raises what the writing raised, so a full disk gives the same message in the background and the foreground.
        """
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        at("checkpoint", flight.state.step)
        publish_checkpoint(self.engine.ranks, flight.partial, flight.written, flight.state, keep=self.keep)
        if self.observer is not None:
            path = checkpoint_path(self.root, flight.state.step)
            self.observer(Saved(path, flight.state, self.total, flight.loss))
