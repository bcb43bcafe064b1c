"""Contenders that take optimizer steps on a CPU, and the words that size a benchmark of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.logs import quiet_libraries
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.module import Student


def sized(doc: str | None, *, rows: int) -> argparse.Namespace:
    """The command line of a benchmark, `rows` being its default; torch has the threads that it asks for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocab", 512), ("layers", 4), ("width", 128), ("rows", rows), ("steps", 4), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    return args


class Contender:
    """A student that takes some optimizer steps on one global batch, in one forward pass or several."""

    def __init__(
        self, student: Student, batches: Sequence[PSTBatch], scales: Tensor, *, steps: int, bf16: bool = False
    ) -> None:
        """`scales` [3] float32 are those of the global batch. The first step is taken here."""
        self.batches, self.scales, self.steps = batches, scales, steps
        self.engine = SingleProcessEngine(student, TrainConfig(bf16=bf16), Ranks())
        self.first_loss = self.step()

    def step(self) -> float:
        """One optimizer step; its loss before it."""
        total = 0.0
        for index, batch in enumerate(self.batches):
            loss = self.engine.forward(batch, self.scales).loss
            self.engine.backward(loss, last=index == len(self.batches) - 1)
            total += float(loss.detach())
        self.engine.step(1e-5)
        return total

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.step()
