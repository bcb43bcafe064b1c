"""What a checkpoint that is whole or absent costs over a plain `torch.save`, and what writing in the background saves.

    python benchmarks/checkpoint_price.py [--vocab 50257] [--layers 6] [--width 384] [--rows 2] [--interval 234]
                                          [--steps 4] [--rounds 7] [--threads 1] [--folder DIR] [--output FILE]

Within a round four contenders take turns, in an order that rotates: `step`, some optimizer steps of one student;
`torch_save`, weights and AdamW's state by torch.save and no more; `transaction`, our checkpoint (finite check, sha256,
fsync, manifest, rename, the elder removed); `background`, the same by a thread beside `--steps` steps. What is timed of
the last is the time in which training stands still, and the CPU time beyond that of the steps. The price of safety is
what `transaction` takes more than `torch_save` in the same round, over the time of as many steps as lie between two
saves (`--interval`; by default a run saves once an epoch, and 234 steps of 32 rows are an epoch of GSM8K; steps of
fewer rows than a run's make the price look higher). Given are medians over rounds, of wall time and of CPU time.
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

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import bytes_below, write_json
from pst_dist.training.checkpoints.saver import Saver
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.engines.single_engine import SingleProcessEngine

_SETTING = SETTINGS["rationale_token"]
CONTENDERS = ("step", "torch_save", "transaction", "background")
Seconds = dict[str, float]
"""By clock."""


class Bench:
    """One student under training, and every way of saving it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.saves = args, folder, 0
        student = make_student(_SETTING, vocabulary=args.vocab, layers=args.layers, width=args.width)
        self.engine = SingleProcessEngine(student, TrainConfig(per_device_train_batch_size=args.rows), Ranks())
        self.problem = make_problem(_SETTING, rows=args.rows, vocabulary=args.vocab)
        self.parameters = sum(value.numel() for value in student.parameters())
        self.one_step()  # Adam's moments are there from now on

    def one_step(self) -> None:
        """One optimizer step."""
        self.engine.backward(self.engine.forward(self.problem.batch, self.problem.scales).loss, last=True)
        self.engine.step(1e-5)

    def step(self) -> Seconds:
        """Of one step among several."""
        found = timed(lambda: [self.one_step() for _ in range(self.args.steps)])
        return {clock: seconds / self.args.steps for clock, seconds in found.items()}

    def torch_save(self) -> Seconds:
        """A save as a simple script does it."""

        def save() -> None:
            state = {"model": self.engine.student.state_dict(), "optimizer": self.engine.optimizer.state_dict()}
            torch.save(state, self.folder / "plain.pt")

        return timed(save)

    def transaction(self) -> Seconds:
        """Our checkpoint, at once."""
        with self._saver(in_background=False) as saver:
            return timed(lambda: saver.save(self._next_state(), 0.0))

    def background(self) -> Seconds:
        """Our checkpoint, beside the next steps; one torch thread, so what the steps take is this thread's CPU time."""
        still = stepping = 0.0
        cpu = time.process_time()
        with self._saver(in_background=True) as saver:
            still += timed(lambda: saver.save(self._next_state(), 0.0))["wall"]
            for _ in range(self.args.steps):
                if saver.pending and not saver.busy:
                    still += timed(saver.settle)["wall"]
                begin = time.thread_time()
                self.one_step()
                stepping += time.thread_time() - begin
            still += timed(saver.settle)["wall"]
        return {"wall": still, "cpu": time.process_time() - cpu - stepping}

    def _saver(self, *, in_background: bool) -> Saver:
        return Saver(self.engine, self.folder / "checkpoints", keep=2, total=1, in_background=in_background)

    def _next_state(self) -> RunState:
        self.saves += 1
        return RunState("f" * 64, "single", 1, step=self.saves)


def timed(work: Callable[[], object]) -> Seconds:
    """Seconds that some work takes."""
    begins = {clock: read() for clock, read in CLOCKS.items()}
    work()
    return {clock: read() - begins[clock] for clock, read in CLOCKS.items()}


def measure(bench: Bench, rounds: int) -> dict[str, list[Seconds]]:
    """What each contender took in each round."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        first = number % len(CONTENDERS)
        order = CONTENDERS[first:] + CONTENDERS[:first]
        gc.collect()
        for name in order if number % 2 == 0 else reversed(order):
            taken = getattr(bench, name)()
            if number:  # the first round only warms up
                seconds[name].append(taken)
    return seconds


def priced(seconds: dict[str, list[Seconds]], interval: int) -> dict[str, Any]:
    """Seconds of a step and of each save, and the price of safety in percent of training, by clock."""
    found: dict[str, Any] = {}
    for clock in CLOCKS:
        taken = {name: [row[clock] for row in rows] for name, rows in seconds.items()}
        medians = {name: statistics.median(values) for name, values in taken.items()}
        training = medians["step"] * interval
        more = [ours - plain for ours, plain in zip(taken["transaction"], taken["torch_save"], strict=True)]
        found[clock] = {
            "seconds": {name: round(value, 4) for name, value in medians.items()},
            "seconds_min_max": {name: [round(min(v), 4), round(max(v), 4)] for name, v in taken.items()},
            "save_percent": {name: round(100 * medians[name] / training, 3) for name in CONTENDERS[1:]},
            "safety_percent": round(100 * statistics.median(more) / training, 3),
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
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed together, and beside a save")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch; CPU figures need 1")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary directory when not given")
    parser.add_argument("--output", type=Path, default=Path("checkpoint_price.json"))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(args, Path(folder))
        result = priced(measure(bench, args.rounds), args.interval)
        size = bytes_below(Path(folder) / "checkpoints" / f"checkpoint-{bench.saves}")
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "folder")}
    report = {"machine": machine(torch.device("cpu")), "settings": settings, "parameters": bench.parameters}
    report |= {"checkpoint_bytes": size, "results": result}
    print(
        f"{bench.parameters / 1e6:.1f} million parameters, checkpoint {size / 1e6:.1f} MB, every {args.interval} steps"
    )
    print(f"{'':6}" + "".join(f"{name + ' s':>16}" for name in CONTENDERS) + f"{'safety %':>10}")
    for clock, found in result.items():
        cells = "".join(f"{found['seconds'][name]:>16}" for name in CONTENDERS)
        print(f"{clock:6}{cells}{found['safety_percent']:>10}")
    write_json(args.output, report)


if __name__ == "__main__":
    main()
