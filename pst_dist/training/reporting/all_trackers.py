"""Reports metrics to all trackers of a training. A tracker that fails is left out, and the training continues.

`train.report_to` names them. Your own package can add a tracker through an entry point of the group
`pst_dist.trackers` that names a subclass of `Tracker`. Only rank zero reports.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.config.schema_train import TRACKERS_GROUP
from pst_dist.errors import PstError, first_line
from pst_dist.text.redaction import redact, redact_values
from pst_dist.training.reporting.tracker_backends import TRACKERS
from pst_dist.training.reporting.trackers import TrackedRun, Tracker

log = logging.getLogger(__name__)

PROMETHEUS = "prometheus"


class Trackers:
    """All trackers of a training behind one interface; a failing tracker never ends the training."""

    def __init__(
        self, names: Sequence[str], run: TrackedRun, config: Config, own: Mapping[str, Tracker] | None = None
    ) -> None:
        """Start the trackers of these names, and `own`, the launcher's own trackers by name."""
        self._running: dict[str, Tracker] = {}
        values = redact_values(config.model_dump(mode="json"))
        for name in (*names, *(own or {})):
            try:
                tracker = own[name] if own and name in own else _load(name)
                tracker.start(run, values)
                self._running[name] = tracker
            except Exception as error:
                self._give_up(name, error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report the finite numbers among the values."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(step, numbers))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Report a distribution, if it has values."""
        if values:
            self._each(lambda tracker: tracker.histogram(step, name, values))

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report rows of text, if there are any."""
        if rows:
            self._each(lambda tracker: tracker.text(step, name, rows))

    def _each(self, report: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                report(tracker)
            except Exception as error:
                self._give_up(name, error)

    def finish(self, *, failed: bool) -> None:
        """Finish all trackers."""
        for name, tracker in list(self._running.items()):
            try:
                tracker.finish(failed)
            except Exception as error:
                self._give_up(name, error)
        self._running.clear()

    def _give_up(self, name: str, error: Exception) -> None:
        self._running.pop(name, None)
        if isinstance(error, ModuleNotFoundError) and name in (*TRACKERS, PROMETHEUS):
            extra = "train" if name == "tensorboard" else name
            reason = f"the package {error.name} is not installed: pip install 'pst-dist[{extra}]'"
        elif isinstance(error, PstError):
            reason = first_line(error, 200)
        else:
            reason = f"{type(error).__name__}: {first_line(error, 200)}"
        log.warning("tracker %s failed and receives no more metrics; training continues (%s)", name, redact(reason))


def _load(name: str) -> Tracker:
    if name in TRACKERS:
        return TRACKERS[name]()
    (point,) = importlib.metadata.entry_points(group=TRACKERS_GROUP, name=name)
    found = point.load()
    tracker = found() if isinstance(found, type) else found
    if not isinstance(tracker, Tracker):
        raise TypeError(f"{point.value} is not a pst_dist.training.reporting.trackers.Tracker")
    return tracker
