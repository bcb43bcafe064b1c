"""Trains a list of configs one after the other in one process group: `torchrun … tests/ranks.py configs.json`.

Starting ranks costs far more than eight steps of a tiny student, so one launch serves many cases. Of runs in a folder
`held-…` each rank writes how many bytes its tensors take just before the first optimizer step and after it.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from pst_dist.config import Config
from pst_dist.distributed import Ranks, leave, process_group
from pst_dist.engine import DeepSpeedEngine
from pst_dist.trainer import train


def tensor_bytes() -> int:
    """Bytes of every tensor that this process holds, each storage once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and not value.is_meta:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def watch_memory(config: Config, rank: int) -> None:
    """Let the engine's first step write `held-<rank>.json`, over what was held before the student was made."""
    before, step = tensor_bytes(), DeepSpeedEngine.step

    def watched(engine: DeepSpeedEngine, learning_rate: float) -> float:
        DeepSpeedEngine.step = step
        gradients = tensor_bytes() - before
        norm = step(engine, learning_rate)
        path = Path(config.output_dir) / f"held-{rank}.json"
        path.write_text(json.dumps({"before_step": gradients, "after_step": tensor_bytes() - before}))
        return norm

    DeepSpeedEngine.step = watched


def main() -> None:
    """Train each config of the file; a refusal is written to the run directory as refusal.txt."""
    ranks = Ranks.from_environment()
    with process_group(ranks, with_deepspeed=True):
        for raw in json.loads(Path(sys.argv[1]).read_text()):
            config = Config.model_validate(raw)
            if Path(config.output_dir).name.startswith("held-"):
                watch_memory(config, ranks.rank)
            try:
                train(config)
            except Exception as error:
                (Path(config.output_dir) / f"refusal-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
    leave(0)
