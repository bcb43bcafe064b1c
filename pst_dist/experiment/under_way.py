"""Log lines about the progress of an experiment's runs, read from the files of the runs.

A run may be in another process or, on Ray, on another node; its `live.json` is what they share.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from pst_dist.config.run_dir import run_dir
from pst_dist.diagnostics.watch import read_live
from pst_dist.experiment.spec import Run
from pst_dist.logs import LOG_EVERY_SECONDS

log = logging.getLogger(__name__)
_MOST_NAMED = 4


class UnderWay:
    """Logs a line every ten seconds for the runs under way."""

    def __init__(
        self, *, every_seconds: float = LOG_EVERY_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._clock, self._last = every_seconds, clock, clock()

    def look(self, runs: Iterable[Run]) -> None:
        """Call this often; it logs when a line is due."""
        if self._clock() - self._last < self._every:
            return
        self._last = self._clock()
        states = [f"{run.name}: {state}" for run in runs if (state := state_of(run))]
        more = f"; {len(states) - _MOST_NAMED} more" if len(states) > _MOST_NAMED else ""
        if states:
            log.info("in progress: %s%s", "; ".join(states[:_MOST_NAMED]), more)


def progress_of(run: Run) -> float:
    """Share of a run's training that is done, from 0 to 1; a run that only has to be scored counts as done."""
    own = run_dir(run.config)
    if own.training.is_file():
        return 1.0
    training = read_live(own.path)
    return training.step / training.total if training is not None and training.total else 0.0


def state_of(run: Run) -> str:
    """`step 1,410/3,300, loss 0.47` or `scoring`; empty for a run that has not begun."""
    own = run_dir(run.config)
    if own.training.is_file():
        return "scoring"
    training = read_live(own.path)
    if training is None:
        return "starting" if own.path.is_dir() else ""
    loss = training.metrics.get("loss")
    words = f", loss {loss:.3f}" if isinstance(loss, float) else ""
    return f"step {training.step:,}/{training.total:,}{words}"
