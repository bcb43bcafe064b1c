"""The training's metrics in Ray's own exporter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import time, urllib.request

from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.config.schema import RayConfig


def report():
    from pathlib import Path

    from pst_dist.clusters.ray.metrics import RayMetrics
    from pst_dist.training.reporting.trackers import TrackedRun

    tracker = RayMetrics()
    tracker.start(TrackedRun(Path("runs/one"), "one", 0), {"arm": "pst"})
    tracker.log(7, {"validation/loss": 1.25})
    time.sleep(60)


with ray_cluster(RayConfig()) as ray:
    ray.remote(report).remote()
    port = ray.nodes()[0]["MetricsExportPort"]
    host = ray.nodes()[0]["NodeManagerAddress"]
    found = {}
    deadline = time.monotonic() + 90
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10).read().decode()
        for line in text.splitlines():
            if line.startswith("ray_pst_") and 'run="one"' in line and 'arm="pst"' in line:
                found[line.partition("{")[0]] = float(line.rpartition(" ")[2])
    print(found)
"""


@pytest.mark.ray
def test_ray_serves_the_gauges_of_a_training():
    pytest.importorskip("ray", reason="needs ray")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "{'ray_pst_step': 7.0, 'ray_pst_validation_loss': 1.25}" in done.stdout or (
        "'ray_pst_validation_loss': 1.25" in done.stdout and "'ray_pst_step': 7.0" in done.stdout
    )
