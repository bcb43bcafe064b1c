"""Small trainings in processes of their own, to be sent signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import small_config

STEPS = 24


def config_file(data: Path, output: Path, **changes: Any) -> Path:
    """A config of a run of STEPS steps, in a file beside its output directory."""
    config = small_config(data, output, train__max_steps=STEPS, train__eval_steps=STEPS, **changes)
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def started(path: Path, *launcher: str) -> subprocess.Popen:
    """A training of that config in a process of its own, with its standard error in a pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, "-m", "pst_dist.train", str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def after_some_steps(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Wait until a run has logged that many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count('"loss"') >= steps:
            return
        time.sleep(0.02)
    pytest.fail(f"the run stopped or took too long before that step: {process.communicate()[1]}")
