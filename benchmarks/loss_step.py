"""One optimizer step with our loss path against what a user would write or install instead, on a CPU.

    python benchmarks/loss_step.py [--vocab 50257] [--batch 4] [--rounds 3] [--threads 2] [--layers 12] [--output FILE]

The full table (an hour on two cores; 9 GiB of memory, for the full logits of 152k words):

    python benchmarks/loss_step.py --vocab 50257 151936 --batch 8 --memory-batch 16 --rounds 5

The student is GPT-2 small with random weights and tied embeddings. Rows are answer-first, of the real lengths in
`step_cases`; their token ids are random. Four settings: cross-entropy on the answer alone or on the rationale as well,
and the cosine alignment at one semantic token or over the rationale's span. A row holds its rationale only where the
setting reads it, as our layout does. Both cross-entropies share one denominator here, because a labels tensor cannot
say more. All contenders get the same rows, weights and optimizer (AdamW, gradients clipped), and must give the same
loss to 1e-4 and the same gradient norm to 1e-3, or the benchmark fails.

`step` is forward, backward, clip and AdamW; `path` is the loss alone: hidden states, a leaf, to loss and backward.
Within a round all contenders run, in a rotating order, and ratios are taken per round. `no_head` has no cross-entropy
at all: its ratio is what the best possible head could gain. `memory` is the path's peak, each contender in a process of
its own: the growth of the kernel's high-water mark of resident pages (VmHWM, reset through /proc/self/clear_refs after
a run at a small size) over what was resident before. The gradients that all must hand over are in it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import MAKERS, cross_entropies
from measuring import (
    CLOCKS,
    compared,
    forget_peak,
    in_a_process_of_its_own,
    machine,
    paired_rounds,
    processor_ceilings,
    resident_megabytes,
)
from step_cases import FLOOR, OURS, SETTINGS, Setting, make_problem, make_student, path_contenders, step_losses
from torch import Tensor, nn

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import write_json
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.module import Student


def check_equal(losses: dict[str, Callable[[], Tensor]], parameters: list[nn.Parameter]) -> dict[str, float]:
    """Each contender's loss; exits when one differs from ours by more than 1e-4, or its gradient's norm by 1e-3."""
    values, norms = {}, {}
    for name, loss in losses.items():
        for parameter in parameters:
            parameter.grad = None
        value = loss()
        value.backward()
        values[name] = value.item()
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms[name] = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))
    for name in losses:
        if name == FLOOR:
            continue
        if abs(values[name] - values[OURS]) > 1e-4 * abs(values[OURS]):
            raise SystemExit(f"{name} has loss {values[name]:.6f}, ours is {values[OURS]:.6f}")
        if abs(norms[name] - norms[OURS]) > 1e-3 * norms[OURS]:
            raise SystemExit(f"{name} has a gradient of norm {norms[name]:.6f}, ours has {norms[OURS]:.6f}")
    return values


def measure_setting(setting: Setting, names: list[str], vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Step and path of all contenders in one setting."""
    problem = make_problem(setting, rows=args.batch, vocabulary=vocabulary)
    student = make_student(setting, vocabulary=vocabulary, layers=args.layers, width=args.width).train()
    losses = step_losses(student, problem, [*names, FLOOR])
    values = check_equal(losses, list(student.parameters()))
    steps = paired_rounds(_whole_steps(student, losses, setting.config.train), args.rounds, CLOCKS[args.clock])
    del student, losses
    path = path_contenders(setting, problem, names, vocabulary, args.width)
    for run in path.values():
        run()
    paths = paired_rounds(path, args.rounds, CLOCKS[args.clock])
    positions = problem.batch.input_ids.numel()
    return {
        "rows": args.batch,
        "positions": positions,
        "supervised": problem.tokens,
        "loss": {name: round(value, 6) for name, value in values.items() if name != FLOOR},
        "step": compared(steps, OURS),
        "path": compared(paths, OURS),
        "head_GFLOP_needed": round(6 * problem.tokens * vocabulary * args.width / 1e9, 1),
    }


def _whole_steps(
    student: Student, losses: dict[str, Callable[[], Tensor]], train: TrainConfig
) -> dict[str, Callable[[], None]]:
    """Each loss with the backward pass, the clipping and the update of the trainer's own engine."""
    engine = SingleProcessEngine(student, train, Ranks())

    def one_step(loss: Callable[[], Tensor]) -> None:
        engine.backward(loss(), last=True)
        engine.step(1e-5)

    one_step(losses[OURS])  # the optimizer makes its moments here
    return {name: functools.partial(one_step, loss) for name, loss in losses.items()}


def peak_of(name: str, setting: Setting, rows: int, vocabulary: int, width: int, threads: int) -> dict[str, float]:
    """Loss and peak of one contender's path in this process, which must have computed nothing before; MiB."""
    torch.set_num_threads(threads)
    small = make_problem(setting, rows=2, vocabulary=512)
    path_contenders(setting, small, [name], 512, width)[name]()  # libraries and threads are there from now on
    problem = make_problem(setting, rows=rows, vocabulary=vocabulary)
    run = path_contenders(setting, problem, [name], vocabulary, width)[name]
    forget_peak()
    before, _ = resident_megabytes()
    loss = run()
    after, peak = resident_megabytes()
    return {"loss": loss, "peak_MiB": round(peak - before, 1), "left_MiB": round(after - before, 1)}


def measure_memory(setting: Setting, names: list[str], vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Peak of each contender's path, one process each."""
    rows = args.batch if args.memory_batch is None else args.memory_batch
    if rows == 0:
        return {"rows": 0, "contenders": {}}
    found: dict[str, Any] = {}
    for name in [OURS, *names]:
        found[name] = in_a_process_of_its_own(peak_of, name, setting, rows, vocabulary, args.width, args.threads)
        if "failed" in found[name]:
            continue
        if abs(found[name]["loss"] - found[OURS]["loss"]) > 1e-4 * abs(found[OURS]["loss"]):
            raise SystemExit(f"{name}: loss {found[name]['loss']} in its own process, ours {found[OURS]['loss']}")
        found[name]["over_ours"] = round(found[name]["peak_MiB"] / max(found[OURS]["peak_MiB"], 0.1), 2)
    peaks = ", ".join(f"{name} {item.get('peak_MiB', 'failed')}" for name, item in found.items())
    print(f"peak of {rows} rows in MiB, vocabulary {vocabulary}, {setting.name}: {peaks}", flush=True)
    return {"rows": rows, "contenders": found}


def print_setting(title: str, result: dict[str, Any], memory: dict[str, Any]) -> None:
    """One table on the terminal."""
    print(f"\n{title}: {result['positions']} positions, {result['supervised']} supervised", flush=True)
    print(f"{'':16}{'step s':>9}{'ratio':>8}{'path s':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
    for name in result["step"]:
        cells = [result[part].get(name, {}) for part in ("step", "path")]
        line = "".join(f"{c.get('seconds_median', ''):>9}{c.get('over_ours', ''):>8}" for c in cells)
        peak = memory["contenders"].get(name, {})
        line += f"{peak.get('peak_MiB', peak.get('failed', '')):>10}{peak.get('over_ours', ''):>8}"
        print(f"{name:16}{line}", flush=True)


def main() -> None:
    """Measure every vocabulary and setting, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257])
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--memory-batch", type=int, help="rows when memory is measured; default --batch, 0: do not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine, one thread")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--output", type=Path, default=Path("loss_step.json"))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--others", nargs="+", choices=list(MAKERS), default=list(MAKERS), help="contenders")
    args = parser.parse_args()
    quiet_libraries()
    names, absent = cross_entropies(torch.device("cpu"), args.others)
    for name, reason in absent.items():
        print(f"{name}: not run ({reason})")
    gc.freeze()  # the collections before each timing need not look through what the imports made
    settings = {name: SETTINGS[name] for name in args.settings}
    # First, while this process has computed nothing: see `in_a_process_of_its_own`.
    peaks = {
        (vocabulary, name): measure_memory(setting, names, vocabulary, args)
        for vocabulary in args.vocab
        for name, setting in settings.items()
    }
    torch.set_num_threads(args.threads)
    report = {
        "machine": machine(torch.device("cpu"), ("trl", "accelerate")),
        "ceilings": processor_ceilings(),
        "student": {"architecture": "gpt2", "layers": args.layers, "width": args.width, "dtype": "float32"},
        "rounds": args.rounds,
        "clock": args.clock,
        "not_run": absent,
        "results": {},
    }
    for (vocabulary, name), memory in peaks.items():
        result = measure_setting(settings[name], names, vocabulary, args)
        report["results"][f"{vocabulary} {name}"] = result | {"memory": memory}
        print_setting(f"vocabulary {vocabulary}, {name}", result, memory)
        write_json(args.output, report)  # after each setting: an interrupted run keeps what it has
    print(json.dumps({key: report[key] for key in ("machine", "ceilings", "not_run")}, indent=2))


if __name__ == "__main__":
    main()
