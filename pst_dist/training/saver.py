"""When a checkpoint is written: at once, or by a thread while training goes on.

In the background a save copies this rank's state to host memory at the step boundary, so its bits are those of the
moment it was asked for; a thread writes and hashes the copy. Ranks talk to one another in their main threads only: at a
later step boundary, when every rank has written, they publish together, as a save in the foreground does at once. At
most one save is in flight, and whoever needs the newest checkpoint settles it first.
What a checkpoint is, and what makes it whole or absent, is `checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.distributed.peer_watch import at
from pst_dist.training.checkpoint import checkpoint_path, prepare_checkpoint, publish_checkpoint, write_part
from pst_dist.training.engines import Engine
from pst_dist.training.state import RunState


@dataclass(frozen=True)
class Saved:
    """A checkpoint that all ranks have just written: what an observer is told."""

    path: Path
    state: RunState
    total: int
    """Steps of the whole training."""
    loss: float
    """The weighted loss of its last step, over the global batch."""


@dataclass(frozen=True)
class _Flight:
    """A checkpoint of which this rank's part is being written."""

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
        # Other ranks may be lost, so nothing is published here: what lies there is removed by the next save.
        self._writer.shutdown(wait=True)

    @property
    def pending(self) -> bool:
        """Whether a save is in flight, on every rank the same."""
        return self._flight is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        thread = self._flight.thread if self._flight is not None else None
        return thread is not None and not thread.done()

    def save(self, state: RunState, loss: float) -> None:
        """Save the engine's state; in the background only the copy is made here. Collective.

        `loss` is the last step's, for the observer. Raises DivergedError when a weight or a moment is not finite.
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
        """Publish what is in flight, waiting for it where that must be; collective.

        Raises what writing it raised, so a full disk is told in the same words by either way of saving.
        """
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        at("checkpoint", flight.state.step)
        publish_checkpoint(self.engine.ranks, flight.partial, flight.written, flight.state, keep=self.keep)
        if self.observer is not None:
            path = checkpoint_path(self.root, flight.state.step)
            self.observer(Saved(path, flight.state, self.total, flight.loss))
