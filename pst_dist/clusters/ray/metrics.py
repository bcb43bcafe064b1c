"""The training's metrics in Ray's own exporter, which every node of a cluster serves to Prometheus.

The gauges have the names of `training.reporting.prometheus`; Ray puts `ray_` before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pst_dist.training.reporting.prometheus import gauge_name
from pst_dist.training.reporting.trackers import TrackedRun, Tracker


class RayMetrics(Tracker):
    """Gauges of `ray.util.metrics` in the process of rank zero."""

    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Remember the labels; nothing is sent before the first value."""
        self._tags = {"run": run.name, "arm": str(config["arm"])}
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges."""
        from ray.util.metrics import Gauge

        for name, value in {"step": float(step), **values}.items():
            if name not in self._gauges:
                text = f"{name} of the training, at its last logged step"
                self._gauges[name] = Gauge(gauge_name(name), text, tag_keys=tuple(self._tags))
            self._gauges[name].set(value, tags=self._tags)

    def finish(self, failed: bool) -> None:
        """Nothing to close: the gauges end with the process."""
