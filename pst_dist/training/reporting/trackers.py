"""The interface of an experiment tracker, which receives the metrics of a training, and the run that it sees.

`training.reporting.tracker_backends` has the trackers that come with this package, and
`training.reporting.all_trackers` calls them.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.storage.atomic import write_text

_IDS = "trackers.json"
"""File in the run directory with this run's id in each tracker, so that a resumed training continues the same run."""


@dataclass(frozen=True)
class TrackedRun:
    """The run as trackers see it."""

    path: Path
    """The run directory; a tracker's local files go into it."""
    name: str
    first_step: int
    """Optimizer steps done before this start; 0 for a new training."""

    def known_id(self, tracker: str) -> str | None:
        """The id that an earlier start of this training has in a tracker; None for a new training."""
        return self._ids().get(tracker) if self.first_step else None

    def keep_id(self, tracker: str, value: str) -> None:
        """Store an id for the next start."""
        write_text(self.path / _IDS, json.dumps(self._ids() | {tracker: value}, sort_keys=True) + "\n")

    def _ids(self) -> dict[str, str]:
        try:
            found = json.loads((self.path / _IDS).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


class Tracker(abc.ABC):
    """One destination for metrics. An exception in any method ends the reporting, not the training."""

    @abc.abstractmethod
    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Begin, or resume after `run.first_step`; `config` is the resolved config, nested, without passwords."""

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report finite numbers of an optimizer step, counted from 1; steps never decrease."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:  # noqa: B027  optional
        """Report a distribution, such as the lengths of the sequences since the last validation."""

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027  optional
        """Report rows of text, such as sample answers; all have the same keys."""

    @abc.abstractmethod
    def finish(self, failed: bool) -> None:
        """Close the run; `failed` when an error or an interrupt ended the training."""
