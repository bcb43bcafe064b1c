"""What a checkpoint that is whole or absent costs over a plain `torch.save`, and what writing in the background saves.

    python benchmarks/checkpoint_price.py [--vocab 50257] [--layers 6] [--width 384] [--rows 2] [--interval 234]
                                          [--steps 4] [--rounds 7] [--threads 1] [--folder DIR] [--output FILE]

Within a round four contenders take turns, in an order that rotates, each with `--steps` optimizer steps of one student:
`none` saves nothing; `torch_save` writes weights and AdamW's state by torch.save after the first step, and no more;
`transaction` saves our checkpoint there (finite check, sha256, fsync, manifest, rename, the elder removed);
`background` saves the same in a thread while the other steps go on, and waits at the end if it must. A save's cost is
the contender's time less that of `none` in the same round. The price of safety is what `transaction` costs more than
`torch_save`, over the time of as many steps as lie between two saves (`--interval`; by default a run saves once an
epoch, and 234 steps of 32 rows are an epoch of GSM8K; steps of fewer rows than a run's make the price look higher).
Given are medians over rounds, of wall time and of CPU time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, machine
from step_cases import SETTINGS, make_problem, make_student

from pst_dist.checkpoint import RunState
from pst_dist.config import TrainConfig
from pst_dist.distributed import Ranks
from pst_dist.engine import SingleProcessEngine
from pst_dist.libraries import quiet_libraries
from pst_dist.saving import Saver
from pst_dist.storage import bytes_below, write_json

_SETTING = SETTINGS["rationale_token"]
CONTENDERS = ("none", "torch_save", "transaction", "background")


class Bench:
    """One student under training, and every way of saving it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.saves = args, folder, 0
        student = make_student(_SETTING, vocabulary=args.vocab, layers=args.layers, width=args.width)
        self.engine = SingleProcessEngine(student, TrainConfig(per_device_train_batch_size=args.rows), Ranks())
        self.problem = make_problem(_SETTING, rows=args.rows, vocabulary=args.vocab)
        self.parameters = sum(value.numel() for value in student.parameters())
        self.step()  # Adam's moments are there from now on

    def step(self) -> None:
        """One optimizer step."""
        self.engine.backward(self.engine.forward(self.problem.batch, self.problem.scales).loss, last=True)
        self.engine.step(1e-5)

    def none(self) -> None:
        """Steps, nothing else."""
        for _ in range(self.args.steps):
            self.step()

    def torch_save(self) -> None:
        """A save as a simple script does it."""
        self.step()
        state = {"model": self.engine.student.state_dict(), "optimizer": self.engine.optimizer.state_dict()}
        torch.save(state, self.folder / "plain.pt")
        for _ in range(self.args.steps - 1):
            self.step()

    def transaction(self) -> None:
        """Our checkpoint, at once."""
        self._ours(in_background=False)

    def background(self) -> None:
        """Our checkpoint, beside the next steps."""
        self._ours(in_background=True)

    def _ours(self, *, in_background: bool) -> None:
        root = self.folder / "checkpoints"
        total = self.args.steps
        with Saver(self.engine, root, keep=2, total=total, in_background=in_background) as saver:
            self.step()
            self.saves += 1
            saver.save(RunState("f" * 64, "single", 1, step=self.saves), 0.0)
            for _ in range(self.args.steps - 1):
                if saver.pending and not saver.busy:
                    saver.settle()
                self.step()
            saver.settle()


def measure(bench: Bench, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contender in each round, by clock."""
    seconds: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in CLOCKS} for name in CONTENDERS}
    for number in range(rounds + 1):
        first = number % len(CONTENDERS)
        order = CONTENDERS[first:] + CONTENDERS[:first]
        gc.collect()
        for name in order if number % 2 == 0 else reversed(order):
            run: Callable[[], None] = getattr(bench, name)
            begins = {clock: read() for clock, read in CLOCKS.items()}
            run()
            for clock, read in CLOCKS.items():
                if number:  # the first round only warms up
                    seconds[name][clock].append(read() - begins[clock])
            time.sleep(0.3)  # let the kernel write what a save without fsync has left it
    return seconds


def priced(seconds: dict[str, dict[str, list[float]]], steps: int, interval: int) -> dict[str, Any]:
    """Seconds of a step and of each save, and the price of safety in percent of training, by clock."""
    found: dict[str, Any] = {}
    for clock in CLOCKS:
        none = seconds["none"][clock]
        step = statistics.median(none) / steps
        costs = {
            name: [mine - base for mine, base in zip(seconds[name][clock], none, strict=True)]
            for name in CONTENDERS
            if name != "none"
        }
        more = [ours - plain for ours, plain in zip(costs["transaction"], costs["torch_save"], strict=True)]
        found[clock] = {
            "step_seconds": round(step, 4),
            "save_seconds": {name: round(statistics.median(values), 4) for name, values in costs.items()},
            "save_seconds_min_max": {name: [round(min(v), 4), round(max(v), 4)] for name, v in costs.items()},
            "save_percent": {
                name: round(100 * statistics.median(values) / (step * interval), 3) for name, values in costs.items()
            },
            "safety_percent": round(100 * statistics.median(more) / (step * interval), 3),
        }
    return found


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--interval", type=int, default=234, help="steps between two saves")
    parser.add_argument("--steps", type=int, default=4, help="steps of a contender in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary directory when not given")
    parser.add_argument("--output", type=Path, default=Path("checkpoint_price.json"))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(args, Path(folder))
        result = priced(measure(bench, args.rounds), args.steps, args.interval)
        size = bytes_below(Path(folder) / "checkpoints" / f"checkpoint-{bench.saves}")
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "folder")}
    report = {"machine": machine(torch.device("cpu")), "settings": settings, "parameters": bench.parameters}
    report |= {"checkpoint_bytes": size, "results": result}
    print(
        f"{bench.parameters / 1e6:.1f} million parameters, checkpoint {size / 1e6:.1f} MB, every {args.interval} steps"
    )
    print(f"{'':6}{'step s':>9}" + "".join(f"{name + ' s':>16}" for name in CONTENDERS[1:]) + f"{'safety %':>10}")
    for clock, found in result.items():
        costs = "".join(f"{found['save_seconds'][name]:>16}" for name in CONTENDERS[1:])
        print(f"{clock:6}{found['step_seconds']:>9}{costs}{found['safety_percent']:>10}")
    write_json(args.output, report)


if __name__ == "__main__":
    main()
