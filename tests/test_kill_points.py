"""A stage killed at any system call that touches a file leaves nothing torn; the same command ends with the same bytes.

`kill_points.py` does it, in a process of its own. Here every so-manieth point is tried; PST_TEST_ALL_KILL_POINTS=1
tries all of them, and 200 random kills of the whole pipeline.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_points import can_trace

ALL = "PST_TEST_ALL_KILL_POINTS" in os.environ
EVERY = {"shard": 19, "embed": 17, "train": 73, "train-background": 73, "export": 13}
POINTS = {"shard": 150, "embed": 80, "train": 250, "train-background": 250, "export": 40}
"""Fewer than this and the tracer has not seen the stage at work."""
pytestmark = [pytest.mark.slow, pytest.mark.encoder, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    if not can_trace():
        pytest.skip("needs Linux on x86-64 and the right to trace a child")
    words = [f"{stage}={1 if ALL else every}" for stage, every in EVERY.items()]
    done = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("kill_points.py")), str(tmp_path_factory.mktemp("kills"))),
            *words,
            f"random={200 if ALL else 6}",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=2900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
    return {row["stage"]: row for row in rows}


@pytest.mark.parametrize("stage", EVERY)
def test_a_stage_killed_at_a_system_call_and_started_again_ends_with_the_same_bytes(results, stage):
    result = results[stage]
    assert result["trouble"] == []
    assert result["points"] >= POINTS[stage] and result["calls"]["fsync"] > 10
    assert result["killed"] >= result["points"] // (1 if ALL else EVERY[stage])


def test_the_whole_pipeline_killed_at_random_moments_ends_with_the_same_bytes(results):
    assert results["random"]["trouble"] == []
    assert results["random"]["killed"] >= 6 and results["random"]["ends"] >= 1
