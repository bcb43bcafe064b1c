"""The share of a training step for which it waits for its batches, in real trainings of a config.

    python benchmarks/loader_wait.py demo gsm8k,data.root=FOLDER,data.max_rows=600 [--steps 12] [--workers 0 2]
                                     [--rounds 3] [--threads 1] [--output FILE]

A training is written as a config and its overrides, separated by commas. Its shards and embeddings are made once; then
each number of loader processes (`train.dataloader_num_workers`) trains from the start in every round, in turn, with no
validation and one checkpoint at the end. The share is `data_wait` of metrics.jsonl: seconds of waiting over those of
waiting and of the step. The first two steps are left out: they start the loader. `wall` is used, so other programs on
the machine count for both. Given are the median over rounds of the mean share, and the lowest and highest step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import machine

from pst_dist import pipeline
from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import read_lines, write_json
from pst_dist.training.trainer import train

STARTING = 2
"""Steps that are left out."""


def config_of(words: list[str], folder: Path, run: str, settings: dict[str, Any]) -> Config:
    """The config of one training, whose data all runs share."""
    own = {"output_dir": folder / run, "data_dir": folder / "data", "train.logging_steps": 1, "train.report_to": "none"}
    given = [f"{key}={value}" for key, value in (own | settings).items()]
    return load_config(words[0], [*words[1:], *given])


def shares(config: Config) -> list[float]:
    """`data_wait` of each step of a training that is run here."""
    train(config)
    rows = [row for row in read_lines(run_dir(config).metrics) if "data_wait" in row]
    return [row["data_wait"] for row in rows if row["step"] > STARTING]


def main() -> None:
    """Run all in turn, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="+", help="config,key=value,…")
    for name, default in (("steps", 12), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--output", type=Path, default=Path("loader_wait.json"))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':20}{'workers':>8}{'share':>9}{'range of steps':>20}")
    for training in args.trainings:
        words = training.split(",")
        with tempfile.TemporaryDirectory(prefix="pst-loader-") as temporary:
            folder = Path(temporary)
            steps = {"train.max_steps": args.steps, "train.eval_steps": args.steps, "train.num_threads": args.threads}
            pipeline.make_shards(config_of(words, folder, "data-only", steps))
            pipeline.make_embeddings(config_of(words, folder, "data-only", steps))
            found: dict[int, list[list[float]]] = {workers: [] for workers in args.workers}
            for number in range(args.rounds):
                for workers in args.workers if number % 2 == 0 else reversed(args.workers):
                    settings = steps | {"train.dataloader_num_workers": workers}
                    config = config_of(words, folder, f"run-{workers}-{number}", settings)
                    found[workers].append(shares(config))
        for workers, rounds in found.items():
            every = [share for steps_of_round in rounds for share in steps_of_round]
            row = {
                "share": round(statistics.median(map(statistics.mean, rounds)), 5),
                "step_min_max": [round(min(every), 5), round(max(every), 5)],
            }
            results.setdefault(training, {})[str(workers)] = row
            low, high = row["step_min_max"]
            print(
                f"{words[0]:20}{workers:>8}{100 * row['share']:>7.2f} %{f'{100 * low:.2f} to {100 * high:.2f} %':>20}"
            )
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    write_json(args.output, {"machine": machine(torch.device("cpu")), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
