"""The time that training steps lose to their batches, in a real training of a config.

    python benchmarks/loader_wait.py demo gsm8k,data.root=FOLDER,data.max_rows=2400 [--steps 72] [--threads 1]
                                     [--output FILE]

A training is written as a config and its overrides, separated by commas. It runs once, and its steps take turns in how
they prepare the batch of the step after them:

    thread       the default: a thread prepares it while the step computes
    no thread    it is prepared between the two steps
    in advance   it costs nothing, because its time is left out; the control

`wait` is the share that `data_wait` of metrics.jsonl reports: the time between two steps for which no batch is there.
A thread also slows down the step beside it, which this share does not show. So a step and the wait after it are
compared with those of the control, per position of the step's passes, within each turn of three steps: the median over
turns, and its quartiles. Wall time is used, so other programs on the machine count for all. Only a first epoch reads
and tokenises each row, so there should be enough rows for all steps.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import machine

from pst_dist import pipeline
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import write_json
from pst_dist.training import parts
from pst_dist.training.batching.ahead import StepsAhead
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.trainer import train

THREAD, NO_THREAD, CONTROL = WAYS = ("thread", "no thread", "in advance")
STARTING = 3
"""Steps that are left out."""


@dataclass
class Step:
    """One step and the wait after it."""

    way: str
    positions: int
    took: float = 0.0
    waited: float = 0.0
    prepared: float = 0.0
    """CPU seconds of preparing the next batch, where they can be told from those of the step."""


class TakingTurns(StepsAhead):
    """`StepsAhead` whose steps take turns in how the next batch is prepared."""

    def __init__(self, steps: Iterator[list[PSTBatch]], *, in_thread: bool) -> None:
        super().__init__(steps, in_thread=in_thread)
        self.steps: list[Step] = []
        self._batches: list[PSTBatch] = []
        MADE.append(self)

    def take(self) -> list[PSTBatch] | None:
        """The next batches; the time of the control is left out."""
        cpu = time.thread_time()
        batches = super().take()
        if self.steps:
            step = self.steps[-1]
            if step.way != THREAD:
                step.prepared = time.thread_time() - cpu
            step.waited = 0.0 if step.way == CONTROL else self.waited_seconds
        self._batches = batches or []
        return batches

    @contextlib.contextmanager
    def preparing_next(self) -> Iterator[None]:
        """One step."""
        turn, place = divmod(len(self.steps), len(WAYS))
        # Every order of the three in turn, so that none gains from its place.
        way = list(itertools.permutations(WAYS))[turn % 6][place]
        step = Step(way, sum(int(batch.positions[0]) for batch in self._batches))
        self.steps.append(step)
        self._in_thread = way == THREAD
        started = time.monotonic()
        with super().preparing_next():
            yield
            step.took = time.monotonic() - started


MADE: list[TakingTurns] = []


def config_of(words: list[str], folder: Path, steps: int, threads: int) -> Config:
    """The config of one training."""
    own = {"output_dir": folder / "run", "data_dir": folder / "data", "train.report_to": "none"}
    own |= {"train.max_steps": steps, "train.eval_steps": steps, "train.num_threads": threads}
    return load_config(words[0], [*words[1:], *(f"{key}={value}" for key, value in own.items())])


def table_of(steps: list[Step]) -> dict[str, dict[str, Any]]:
    """The row of each way."""
    turns = [steps[first : first + 3] for first in range(STARTING, len(steps) - 3, 3)]
    table = {}
    for way in WAYS:
        own = [step for turn in turns for step in turn if step.way == way]
        ratios = []
        for turn in turns:
            cost = {step.way: (step.took + step.waited) / step.positions for step in turn}
            ratios.append(cost[way] / cost[CONTROL])
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[way] = {
            "wait": round(sum(step.waited for step in own) / sum(step.waited + step.took for step in own), 5),
            "step_seconds": round(statistics.median(step.waited + step.took for step in own), 4),
            "prepare_cpu_ms": round(1000 * statistics.median(step.prepared for step in own), 2),
            "over_control": round(middle, 4),
            "over_control_quartiles": [round(low, 4), round(high, 4)],
        }
    return table


def main() -> None:
    """Run all, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="+", help="config,key=value,…")
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("loader_wait.json"))
    args = parser.parse_args()
    quiet_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the `pst` command does
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':20}{'':12}{'wait':>9}{'ms per step':>13}{'CPU ms':>8}{'over control':>14}{'quartiles':>18}")
    for training in args.trainings:
        words = training.split(",")
        with tempfile.TemporaryDirectory(prefix="pst-loader-") as temporary:
            config = config_of(words, Path(temporary), args.steps, args.threads)
            pipeline.make_shards(config)
            pipeline.make_embeddings(config)
            with mock.patch.object(parts, "StepsAhead", TakingTurns):
                train(config)
        results[training] = table_of(MADE[-1].steps)
        for way, row in results[training].items():
            low, high = row["over_control_quartiles"]
            print(
                f"{words[0]:20}{way:12}{100 * row['wait']:>7.2f} %{1000 * row['step_seconds']:>13.1f}"
                f"{row['prepare_cpu_ms']:>8.1f}{row['over_control']:>14.3f}{f'{low:.3f} to {high:.3f}':>18}",
                flush=True,
            )
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    write_json(args.output, {"machine": machine(torch.device("cpu")), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
