"""A small experiment, for tests: three variants of the demo's task, two seeds, six steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

SMALL = {
    "name": "small",
    "settings": {
        "task": "last_letter_concatenation",
        "data": {"test": "gen:last_letters?rows=12&words=2", "validation_size": 8},
        "student.fresh": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
        "train": {"max_steps": 6, "global_batch_size": 8, "per_device_train_batch_size": 8, "eval_steps": 3},
        "train.report_to": "none",
        "evaluate": {"latency_rows": 1, "explain_rows": 0, "max_new_tokens": 12},
    },
    "tasks": {"letters": {"data.train": "gen:last_letters?rows=40&words=2"}},
    "variants": {
        "answer_only": {"arm": "answer_only"},
        "pre_thinking": {"arm": "pre_thinking"},
        "no alignment": {"arm": "pst", "loss.alignment_weight": 0},
    },
    "seeds": [0, 1],
}


def write(path: Path, **changes) -> Path:
    """The small experiment's file, its output beside it."""
    tree = SMALL | {"output_dir": str(path.with_suffix(""))} | changes
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def pst(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pst_dist.cli", "experiment", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def accuracies(file: Path) -> list[list[float]]:
    groups = json.loads((file.with_suffix("") / "results.json").read_text())["groups"]
    return [group["accuracies"] for group in groups]
