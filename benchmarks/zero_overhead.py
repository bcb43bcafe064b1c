"""What our DeepSpeed engine costs over PyTorch's own DistributedDataParallel, at equal ranks, on CPU ranks (gloo).

    python benchmarks/zero_overhead.py [--rounds 5] [--steps 2] [--rows 8] [--layers 4] [--width 256] [--output FILE]

Starts its own ranks (two, one thread each), which hold all contenders in one process group: `ddp` is the same student
under DistributedDataParallel with AdamW and gradient clipping, written as PyTorch's documentation does; zero0 to zero3
are `engine.DeepSpeedEngine` with our profiles, and zero3_modules is zero3 as DeepSpeed runs it by default, with hooks
around every module instead of every transformer block. Rows have the lengths of GSM8K, token ids are random. Every
contender starts from the same weights, and after the first step all must agree with ddp about the loss to 1e-5 and the
gradient norm to 1e-4, or the benchmark fails. Within a round all run, in an order that rotates; ratios to ddp are taken
within a round, and their median is given. `cpu` are the seconds that all ranks together computed, which say more on a
busy machine; `wall` those that passed on rank zero.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import compared, machine
from step_cases import SETTINGS, make_problem, make_student
from torch import nn

from pst_dist.config.schema import TrainConfig
from pst_dist.config.zero import find_deepspeed_json
from pst_dist.distributed.ranks import Ranks, all_sum, barrier, leave, process_group
from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import write_json
from pst_dist.training.engines.deepspeed_engine import DeepSpeedEngine
from pst_dist.training.engines.optimizer import parameter_groups

DDP = "ddp"
BY_MODULE = "zero3_modules"
STAGES = ("zero0", "zero1", "zero2", "zero3", BY_MODULE)
_SETTING = SETTINGS["rationale_token"]
Step = Callable[[], tuple[float, float]]
"""One optimizer step; gives this rank's share of the loss and the global gradient norm."""


def ddp_step(args: argparse.Namespace, ranks: Ranks, train: TrainConfig) -> Step:
    """The student under DistributedDataParallel."""
    student = make_student(_SETTING, vocabulary=args.vocab, layers=args.layers, width=args.width)
    model = nn.parallel.DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(parameter_groups(student, train.weight_decay), lr=train.learning_rate)
    problem = make_problem(_SETTING, rows=args.rows, vocabulary=args.vocab, seed=ranks.rank)
    scales = problem.scales / ranks.world_size

    def step() -> tuple[float, float]:
        loss = model(problem.batch, scales).loss
        (loss * ranks.world_size).backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    return step


def zero_step(args: argparse.Namespace, ranks: Ranks, train: TrainConfig, stage: str) -> Step:
    """The same student in our engine."""
    student = make_student(_SETTING, vocabulary=args.vocab, layers=args.layers, width=args.width)
    with tempfile.TemporaryDirectory() as folder:
        if stage == BY_MODULE:
            stage = str(Path(folder) / "by_module.json")
            zero = json.loads(find_deepspeed_json("zero3").read_text())["zero_optimization"]
            write_json(Path(stage), {"zero_optimization": {**zero, "leaf_module": {"classes": []}}})
        engine = DeepSpeedEngine(student, train.model_copy(update={"deepspeed": stage}), ranks)
    problem = make_problem(_SETTING, rows=args.rows, vocabulary=args.vocab, seed=ranks.rank)
    scales = problem.scales / ranks.world_size

    def step() -> tuple[float, float]:
        loss = engine.forward(problem.batch, scales).loss
        engine.backward(loss, last=True)
        return float(loss.detach()), engine.step(train.learning_rate)

    return step


def measure(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Seconds of every contender, and the losses of the first step."""
    train = TrainConfig(per_device_train_batch_size=args.rows)
    steps: dict[str, Step] = {}
    first = {}
    for name in (DDP, *STAGES):
        steps[name] = ddp_step(args, ranks, train) if name == DDP else zero_step(args, ranks, train, name)
        loss, norm = steps[name]()
        first[name] = (float(all_sum(torch.tensor(loss, dtype=torch.float64))), norm)
    for name, (loss, norm) in first.items():
        if abs(loss - first[DDP][0]) > 1e-5 or abs(norm / first[DDP][1] - 1) > 1e-4:
            sys.exit(
                f"{name} has loss {loss:.6f} and norm {norm:.6f}, {DDP} {first[DDP][0]:.6f} and {first[DDP][1]:.6f}"
            )
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in steps}
    names = list(steps)
    for number in range(args.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        gc.collect()
        for name in order if number % 2 == 0 else reversed(order):
            barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                steps[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            total = float(all_sum(torch.tensor(cpu, dtype=torch.float64)))
            seconds[name]["wall"].append(wall / args.steps)
            seconds[name]["cpu"].append(total / args.steps)
    parameters = sum(
        value.numel()
        for value in make_student(_SETTING, vocabulary=args.vocab, layers=args.layers, width=args.width).parameters()
    )
    return {
        "parameters": parameters,
        "loss_and_norm": first,
        "results": _over_ddp(seconds),
    }


def _over_ddp(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Contender -> clock -> its median, and the median and range of its time over DDP's in the same round."""
    clocks = {
        clock: compared({name: found[clock] for name, found in seconds.items()}, DDP, label="over_ddp")
        for clock in seconds[DDP]
    }
    return {name: {clock: table[name] for clock, table in clocks.items()} for name in seconds}


def print_table(report: dict[str, Any]) -> None:
    """One line a contender."""
    print(f"{'':14}{'cpu s':>8}{'ratio':>7}{'range':>15}{'wall s':>8}{'ratio':>7}")
    for name, result in report["results"].items():
        cpu, wall = result["cpu"], result["wall"]
        low, high = cpu["over_ddp_min_max"]
        print(
            f"{name:14}{cpu['seconds_median']:>8}{cpu['over_ddp']:>7}{f'{low} to {high}':>15}"
            f"{wall['seconds_median']:>8}{wall['over_ddp']:>7}"
        )


def main() -> None:
    """Start the ranks; in a rank measure, and on rank zero print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a contender in a round")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step on each rank")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("zero_overhead.json"))
    args = parser.parse_args()
    if "RANK" not in os.environ:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        sys.exit(subprocess.run([sys.executable, *launch, *sys.argv], env=environment).returncode)
    quiet_libraries()
    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    with process_group(ranks, with_deepspeed=True):
        report = measure(args, ranks)
        if ranks.is_main:
            settings = {name: value for name, value in vars(args).items() if name != "output"}
            report = {"machine": machine(torch.device("cpu")), "settings": settings, **report}
            print_table(report)
            write_json(args.output, report)
        dist.barrier()


if __name__ == "__main__":
    main()
    leave(0)
