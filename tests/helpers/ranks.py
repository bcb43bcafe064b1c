"""Trains a list of configs one after the other in one process group: `torchrun … tests/helpers/ranks.py configs.json`.

Starting ranks takes far longer than eight steps of a tiny student, so one launch runs many cases. A config may name a
run and a step (`"resume": [run, step]`): it then resumes from that run's checkpoint, as if it had been stopped there.
`"inject": {step: fault}` makes steps of the last rank fail (see `injections`).
For runs in a folder `held-…` each rank writes how many bytes its tensors take just before and after the first optimizer
step.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from injections import injected

from pst_dist.config.schema import Config
from pst_dist.distributed.ranks import Ranks, barrier, leave, process_group
from pst_dist.training.engines.deepspeed_engine import DeepSpeedEngine
from pst_dist.training.trainer import train


def launch(cases: Sequence[Config | dict[str, Any]], folder: Path, ranks: int = 2) -> None:
    """Train configs on several ranks started by torchrun; they end with it."""
    path = folder / "configs.json"
    raws = [case if isinstance(case, dict) else case.model_dump(mode="json") for case in cases]
    path.write_text(json.dumps(raws))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *command, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def stop_at(source: Path, step: int, target: Path) -> None:
    """Make `target` what a run like `source` leaves when it is killed after the checkpoint of that step."""
    (target / "checkpoints").mkdir(parents=True)
    shutil.copytree(source / "checkpoints" / f"checkpoint-{step}", target / "checkpoints" / f"checkpoint-{step}")
    shutil.copytree(source / "best", target / "best")
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines))


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
            stopped, faults = raw.pop("resume", None), raw.pop("inject", {})
            config = Config.model_validate(raw)
            if stopped and ranks.is_main:
                stop_at(Path(stopped[0]), int(stopped[1]), Path(config.output_dir))
            barrier()
            if Path(config.output_dir).name.startswith("held-"):
                watch_memory(config, ranks.rank)
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            injecting = injected(
                Path(config.output_dir), {int(step): fault for step, fault in faults.items()}, ranks.world_size - 1
            )
            try:
                with injecting if faults else contextlib.nullcontext():
                    train(config)
            except Exception as error:
                (Path(config.output_dir) / f"refusal-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
    leave(0)
