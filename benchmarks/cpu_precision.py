"""What a training step costs on a CPU in float32 and in bfloat16, with torch's fused attention and with it spelled out.

    python benchmarks/cpu_precision.py [--vocab 512] [--layers 4] [--width 128] [--rows 32] [--steps 4] [--rounds 7]
                                       [--threads 1] [--output FILE]

Four students that differ in nothing else take some optimizer steps each round, in an order that rotates; rows have the
lengths of GSM8K's. Given are medians over rounds of CPU seconds a step and of each contender's ratio to what the
overlay `+cpu_bf16` asks for, and each first loss, which says that all four compute the same. A processor without
bfloat16 instructions (lscpu: avx512_bf16, amx_bf16) emulates them, and bfloat16 is then the slower one.
"""

from __future__ import annotations

import argparse
import math

import torch
from cpu_steps import Contender, sized
from measuring import CLOCKS, compared, machine, paired_rounds
from step_cases import SETTINGS, make_problem, make_student

from pst_dist.storage.manifest import write_json

_SETTING = SETTINGS["rationale_token"]
_OURS = "bfloat16, eager"
_LOSS_TOLERANCE = 0.01
"""Relative; bfloat16 keeps 8 bits of a product's factors."""


def contender(args: argparse.Namespace, *, bf16: bool, attention: str) -> Contender:
    """One of the four."""
    problem = make_problem(_SETTING, rows=args.rows, vocabulary=args.vocab)
    student = make_student(_SETTING, vocabulary=args.vocab, layers=args.layers, width=args.width)
    student.model.set_attn_implementation(attention)
    return Contender(student, [problem.batch], problem.scales, steps=args.steps, bf16=bf16)


def main() -> None:
    """Run and print."""
    args = sized(__doc__, rows=32)
    contenders = {
        f"{precision}, {attention}": contender(args, bf16=precision == "bfloat16", attention=attention)
        for precision in ("float32", "bfloat16")
        for attention in ("sdpa", "eager")
    }
    losses = {name: one.first_loss for name, one in contenders.items()}
    for name, loss in losses.items():
        if not math.isclose(loss, losses["float32, sdpa"], rel_tol=_LOSS_TOLERANCE):
            raise SystemExit(f"{name}: first loss {loss:.4f}, in float32 {losses['float32, sdpa']:.4f}")
    table = compared(paired_rounds(contenders, args.rounds, CLOCKS["cpu"]), _OURS, "over_bf16_eager")
    print(f"{'':16}  CPU s a step   over {_OURS}   first loss")
    for name, row in table.items():
        low, high = row["over_bf16_eager_min_max"]
        ratio = f"{row['over_bf16_eager']:5.2f} ({low:.2f}-{high:.2f})"
        print(f"{name:16}  {row['seconds_median'] / args.steps:12.4f}   {ratio:>20}   {losses[name]:10.4f}")
    if args.output:
        report = {"settings": vars(args) | {"output": None}, "losses": losses, "steps": table}
        write_json(args.output, report | {"machine": machine(torch.device("cpu"))})


if __name__ == "__main__":
    main()
