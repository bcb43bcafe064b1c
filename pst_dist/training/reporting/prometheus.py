"""Metrics for Prometheus: an endpoint on loopback while a training runs (`train.metrics_port`).

A gauge `pst_NAME{run, arm}` for each value that the trackers get. On a Ray cluster Ray's own exporter has the same
gauges (`clusters.ray.metrics`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pst_dist.errors import EnvironmentFault
from pst_dist.training.reporting.trackers import TrackedRun, Tracker

_HERE = "127.0.0.1"


def gauge_name(name: str) -> str:
    """`validation/answer_nll` -> `pst_validation_answer_nll`: letters, digits and underscores, as Prometheus allows."""
    return "pst_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


class Prometheus(Tracker):
    """One HTTP server on 127.0.0.1 that answers /metrics."""

    def __init__(self, port: int) -> None:
        self._port = port

    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Listen; raises EnvironmentFault when the port cannot be had."""
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        self._gauge, self._labels = Gauge, {"run": run.name, "arm": str(config["arm"])}
        self._registry, self._gauges = CollectorRegistry(), dict[str, Any]()
        try:
            self._server, self._thread = start_http_server(self._port, addr=_HERE, registry=self._registry)
        except OSError as error:
            raise EnvironmentFault(
                f"train.metrics_port={self._port}: {error.strerror}", "choose another port"
            ) from error
        self.log(run.first_step, {})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges, and `pst_step`."""
        for name, value in {"step": float(step), **values}.items():
            gauge = self._gauges.get(name)
            if gauge is None:
                text = f"{name} of the training, at its last logged step"
                gauge = self._gauge(gauge_name(name), text, list(self._labels), registry=self._registry)
                self._gauges[name] = gauge
            gauge.labels(**self._labels).set(value)

    def finish(self, failed: bool) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
