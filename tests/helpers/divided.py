"""Builds students whole and divided in one process group: `torchrun … tests/helpers/divided.py cases.json`.

Each case is a config; for each, rank zero writes how far the divided weights are from the whole ones. For the case
named `large` each rank writes how much memory it took to build the divided student and to collect its weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pst_dist.config.schema import Config
from pst_dist.distributed.ranks import Ranks, barrier, leave, process_group
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.engines.deepspeed_engine import DeepSpeedEngine
from pst_dist.training.engines.dividing import holding_of
from pst_dist.training.module import build_student

WIDTH = 8


def launch(cases: dict[str, dict[str, Any]], folder: Path, ranks: int = 2) -> None:
    """Build the cases, configs by name, on ranks started by torchrun; results are NAME.json or NAME-RANK.json."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # glibc keeps freed pieces of several megabytes for later; without them, what is measured is what is held.
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__]
    done = subprocess.run(
        [*command, str(folder / "cases.json")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


class Peak:
    """The most anonymous memory of this process within a block, over what it had before, in bytes.

    Pages of mapped files do not count: the system takes them back whenever it needs them.
    """

    def __enter__(self) -> Peak:
        self.before = self.most = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def added(self) -> int:
        """Bytes above those before the block."""
        return self.most - self.before

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, _anonymous_bytes())
            time.sleep(0.002)


def _anonymous_bytes() -> int:
    pages = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(pages["RssAnon"].split()[0]) * 1024


def differences(config: Config, ranks: Ranks) -> dict[str, float]:
    """Largest difference of each weight of the divided student from the whole one, built from the same seed."""
    tokenizer = build_tokenizer(config.student, [])
    made = []
    for holding in (
        holding_of(config.train.model_copy(update={"deepspeed": None}), ranks),
        holding_of(config.train, ranks),
    ):
        torch.manual_seed(7)
        made.append((holding, build_student(config, tokenizer, WIDTH, holding)))
    (_, whole), (divided, student) = made
    assert divided.divides and all(hasattr(weight, "ds_id") for weight in student.parameters())
    trained = [name for name, weight in whole.named_parameters() if weight.requires_grad]
    assert trained == [name for name, weight in student.named_parameters() if weight.requires_grad]
    found = {}
    for (name, one), (other_name, other) in zip(whole.named_parameters(), student.named_parameters(), strict=True):
        assert name == other_name
        with divided.gathered([other]):
            wanted = one.to(other.dtype)
            same = wanted.shape == other.shape and (other.dtype == torch.bfloat16) == bool(config.train.bf16)
            found[name] = float((wanted.float() - other.float()).abs().max()) if same else float("inf")
    buffers = dict(student.named_buffers())
    for name, value in whole.named_buffers():
        found[name] = float((value.float() - buffers[name].float()).abs().max())
    return found


def memory(config: Config, ranks: Ranks) -> dict[str, float]:
    """Bytes of the weights, and what this rank adds to them while building and while its weights are collected."""
    tokenizer = build_tokenizer(config.student, [])
    torch.manual_seed(7)
    with Peak() as building:
        student = build_student(config, tokenizer, WIDTH, holding_of(config.train, ranks))
    size = 4 * sum(weight.ds_numel for weight in student.parameters())
    engine = DeepSpeedEngine(student, config.train, ranks)
    with tempfile.TemporaryDirectory() as folder, Peak() as collecting:
        weights = engine.full_weights(Path(folder))
        held = sum(4 * weight.numel() for weight in weights.values())
        assert held == (size if ranks.is_main else 0)
    # Not ru_maxrss, which begins with the size of the process that started this one.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    most = int(peak.split()[1]) * 1024
    return {"model": size, "building": building.added, "collecting": collecting.added, "process": most}


def main() -> None:
    """Build every case of the file."""
    ranks, path = Ranks.from_environment(), Path(sys.argv[1])
    with process_group(ranks, with_deepspeed=True):
        for name, raw in json.loads(path.read_text()).items():
            config = Config.model_validate(raw)
            if name.startswith("large"):
                path.with_name(f"{name}-{ranks.rank}.json").write_text(json.dumps(memory(config, ranks)))
                continue
            found = differences(config, ranks)
            if ranks.is_main:
                path.with_name(f"{name}.json").write_text(json.dumps(found))
            barrier()


if __name__ == "__main__":
    main()
    leave(0)
