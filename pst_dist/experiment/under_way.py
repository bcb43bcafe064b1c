"""Lines that say how far the runs of an experiment are, read from their own files.

A run may be in another process or, on Ray, on another node; its metrics file is what they share.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pst_dist.config.run_dir import run_dir
from pst_dist.errors import IntegrityError
from pst_dist.experiment.spec import Run
from pst_dist.logs import LOG_EVERY_SECONDS
from pst_dist.storage.json_files import parse_json

log = logging.getLogger(__name__)
_TAIL_BYTES = 8192
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
            log.info("under way: %s%s", "; ".join(states[:_MOST_NAMED]), more)


def state_of(run: Run) -> str:
    """`step 1,410/3,300, loss 0.47` or `scoring`; empty for a run that has not begun."""
    own = run_dir(run.config)
    if own.training.is_file():
        return "scoring"
    last = _last_row(own.metrics)
    if last is None:
        return "starting" if own.path.is_dir() else ""
    total = run.config.train.max_steps
    of = f"/{total:,}" if total else ""
    loss = last.get("loss")
    return f"step {last.get('step', 0):,}{of}" + (f", loss {loss:.3f}" if isinstance(loss, float) else "")


def _last_row(path: Path) -> dict[str, object] | None:
    """The last complete line that has a step; None without one."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):
        try:
            row = parse_json(line, path)
        except IntegrityError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None
