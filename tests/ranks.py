"""Trains a list of configs one after the other in one process group: `torchrun … tests/ranks.py configs.json`.

Starting ranks costs far more than eight steps of a tiny student, so one launch serves many cases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pst_dist.config import Config
from pst_dist.distributed import Ranks, leave, process_group
from pst_dist.trainer import train


def main() -> None:
    """Train each config of the file; a refusal is written to the run directory as refusal.txt."""
    ranks = Ranks.from_environment()
    with process_group(ranks, with_deepspeed=True):
        for raw in json.loads(Path(sys.argv[1]).read_text()):
            config = Config.model_validate(raw)
            try:
                train(config)
            except Exception as error:
                (Path(config.output_dir) / f"refusal-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
    leave(0)
