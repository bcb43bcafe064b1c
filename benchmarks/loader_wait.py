"""The time that training steps lose to their batches, in real trainings of a config.

    python benchmarks/loader_wait.py demo gsm8k,data.root=FOLDER,data.max_rows=600 [--steps 16] [--rounds 7]
                                     [--threads 1] [--contenders thread,…] [--output FILE]

A training is written as a config and its overrides, separated by commas. Its shards and embeddings are made once; then
every contender trains from the start in every round, in turn, with no validation and one checkpoint at the end:

    thread         the default: a thread prepares the next batch while the step computes
    no thread      each batch is prepared between two steps
    2 processes    train.dataloader_num_workers=2
    in advance     all batches are prepared before the first step, so preparing them costs nothing; the control

The share is `data_wait` of metrics.jsonl: seconds of waiting over those of waiting and of the step. A thread can also
slow down the step beside it, which this share does not show; so the time per step is compared with the control's in the
same round. The first two steps are left out. `wall` is used, so other programs on the machine count for all. Given are
the median over rounds of the mean share, and of the time per step over the control's, with its lowest and highest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import machine

from pst_dist import pipeline
from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import read_lines, write_json
from pst_dist.training import trainer
from pst_dist.training.ahead import StepsAhead
from pst_dist.training.batches import PSTBatch, step_batches
from pst_dist.training.trainer import train

STARTING = 2
"""Steps that are left out."""
THREAD, NO_THREAD, PROCESSES, CONTROL = "thread", "no thread", "2 processes", "in advance"
Ahead = Callable[..., StepsAhead]


def config_of(words: list[str], folder: Path, run: str, settings: dict[str, Any]) -> Config:
    """The config of one training, whose data all runs share."""
    own = {"output_dir": folder / run, "data_dir": folder / "data", "train.logging_steps": 1, "train.report_to": "none"}
    given = [f"{key}={value}" for key, value in (own | settings).items()]
    return load_config(words[0], [*words[1:], *given])


def without_thread(steps: Iterator[list[PSTBatch]], *, in_thread: bool) -> StepsAhead:
    """`StepsAhead` that prepares nothing beside a step."""
    return StepsAhead(steps, in_thread=False)


def in_advance(*args: Any, **settings: Any) -> Iterator[list[PSTBatch]]:
    """`step_batches`, all prepared before the first is returned."""
    return iter(list(step_batches(*args, **settings)))


def steps_of(config: Config, contender: str) -> tuple[list[float], list[float]]:
    """`data_wait` and wall seconds of each step of a training that is run here."""
    ahead = StepsAhead if contender == THREAD else without_thread
    batches = in_advance if contender == CONTROL else step_batches
    with mock.patch.object(trainer, "StepsAhead", ahead), mock.patch.object(trainer, "step_batches", batches):
        train(config)
    rows = [row for row in read_lines(run_dir(config).metrics) if "data_wait" in row and row["step"] > STARTING]
    return [row["data_wait"] for row in rows], [row["tokens"] / row["tokens_per_second"] for row in rows]


def table_of(found: dict[str, list[tuple[list[float], list[float]]]]) -> dict[str, dict[str, Any]]:
    """The row of each contender, from its rounds."""
    table = {}
    for contender, rounds in found.items():
        totals = [sum(seconds) for _, seconds in rounds]
        row: dict[str, Any] = {
            "share": round(statistics.median(statistics.mean(shares) for shares, _ in rounds), 5),
            "step_seconds": round(statistics.median(sum(seconds) / len(seconds) for _, seconds in rounds), 4),
        }
        if CONTROL in found:
            control = [sum(seconds) for _, seconds in found[CONTROL]]
            ratios = [own / other for own, other in zip(totals, control, strict=True)]
            row["over_control"] = round(statistics.median(ratios), 4)
            row["over_control_min_max"] = [round(min(ratios), 4), round(max(ratios), 4)]
        table[contender] = row
    return table


def main() -> None:
    """Run all in turn, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="+", help="config,key=value,…")
    for name, default in (("steps", 16), ("rounds", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    names = [THREAD, NO_THREAD, PROCESSES, CONTROL]
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=names, help="separated by commas")
    parser.add_argument("--output", type=Path, default=Path("loader_wait.json"))
    args = parser.parse_args()
    quiet_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the `pst` command does
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':20}{'':14}{'share':>9}{'ms per step':>13}{'over control':>14}{'lowest to highest':>20}")
    for training in args.trainings:
        words = training.split(",")
        with tempfile.TemporaryDirectory(prefix="pst-loader-") as temporary:
            folder = Path(temporary)
            steps = {"train.max_steps": args.steps, "train.eval_steps": args.steps, "train.num_threads": args.threads}
            pipeline.make_shards(config_of(words, folder, "data-only", steps))
            pipeline.make_embeddings(config_of(words, folder, "data-only", steps))
            found: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in args.contenders}
            for number in range(args.rounds):
                first = number % len(args.contenders)
                for contender in args.contenders[first:] + args.contenders[:first]:
                    settings = steps | {"train.dataloader_num_workers": 2 if contender == PROCESSES else 0}
                    run = f"run-{contender.replace(' ', '-')}-{number}"
                    found[contender].append(steps_of(config_of(words, folder, run, settings), contender))
        results[training] = table_of(found)
        for contender, row in results[training].items():
            low, high = row.get("over_control_min_max", (float("nan"), float("nan")))
            print(
                f"{words[0]:20}{contender:14}{100 * row['share']:>7.2f} %{1000 * row['step_seconds']:>13.1f}"
                f"{row.get('over_control', float('nan')):>14.3f}{f'{low:.3f} to {high:.3f}':>20}"
            )
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    write_json(args.output, {"machine": machine(torch.device("cpu")), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
