"""Writes golden_losses.txt anew, after a change that is meant to move losses.

Run it as `python tests/training/golden_update.py`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

from golden import CASES, GOLDEN
from run_files import losses
from small_run import make_small_data, small_config

from pst_dist.training.trainer import train


def main() -> None:
    """Train every case and write its losses, one line a case."""
    lines = [
        "# Losses of eight steps of a tiny student over 32 generated rows, one line a case (cases: helpers/golden.py).",
        "# A change that moves them must say why; then: python tests/training/golden_update.py",
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = make_small_data(Path(folder) / "data")
        for case, settings in CASES.items():
            run = Path(folder) / case
            train(small_config(data, run, **settings))
            lines.append(" ".join([f"{case:16s}", *(f"{value:.4f}" for value in losses(run))]))
    GOLDEN.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
