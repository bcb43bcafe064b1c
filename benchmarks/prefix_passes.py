"""What a step of the arm `prefix` costs when its short and its long sequences go through the student apart.

    python benchmarks/prefix_passes.py [--vocab 512] [--layers 4] [--width 128] [--rows 16] [--steps 4] [--rounds 7]
                                       [--threads 1] [--output FILE]

Each row gives "predict:" with the answer and "explain:" with the rationale, of the lengths of GSM8K's. `apart` has two
forward passes, as `forward_passes` cuts them; `together` one, where an answer is padded to the longest rationale.
Two students that differ in nothing else take some optimizer steps each round, in an order that rotates. Given are
medians over rounds of CPU seconds a step and of the ratio, positions of padding, and each first loss, which says that
both compute the same.
"""

from __future__ import annotations

import argparse
import math
import random

import numpy as np
import torch
from cpu_steps import Contender, sized
from measuring import CLOCKS, compared, machine, paired_rounds
from step_cases import ROWS, SETTINGS, make_student

from pst_dist.arms import ARMS, Segment
from pst_dist.config.schema import LossConfig
from pst_dist.storage.manifest import write_json
from pst_dist.student.layout import Sequence, forward_passes
from pst_dist.training.batching.batches import Collator
from pst_dist.training.loss import TermWeights

_APART, _TOGETHER = "apart", "together"


def laid_out(rows: int, vocabulary: int) -> list[list[Sequence]]:
    """The two sequences of each row, token ids drawn at random."""
    rng, ids = random.Random(0), np.random.default_rng(0)
    samples = []
    for index in range(rows):
        prompt, answer, rationale = rng.choice(ROWS)
        sample = []
        for segment, length in ((Segment.ANSWER, answer), (Segment.RATIONALE, rationale)):
            draw = ids.integers(0, vocabulary, prompt + length).tolist()
            sample.append(Sequence(str(index), 0, draw[:prompt], draw[prompt:], [segment] * length, False))
        samples.append(sample)
    return samples


def contender(args: argparse.Namespace, passes: list[list[Sequence]]) -> Contender:
    """A student whose global batch is cut into these passes."""
    loss = LossConfig(denominator="per_token")
    collate = Collator(loss=loss, pad_id=0)
    batches = [collate(sequences) for sequences in passes]
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    scales = TermWeights.of(loss, "prefix").scales(counts).float()
    student = make_student(SETTINGS["rationale_token"], vocabulary=args.vocab, layers=args.layers, width=args.width)
    return Contender(student, batches, scales, steps=args.steps)


def padding(one: Contender) -> int:
    """Positions of its batches that hold no token."""
    return sum(int((batch.attention_mask == 0).sum()) for batch in one.batches)


def main() -> None:
    """Run and print."""
    args = sized(__doc__, rows=16)
    samples = laid_out(args.rows, args.vocab)
    contenders = {
        _APART: contender(args, forward_passes(ARMS["prefix"], samples)),
        _TOGETHER: contender(args, [[sequence for sample in samples for sequence in sample]]),
    }
    apart, together = (contenders[name].first_loss for name in (_APART, _TOGETHER))
    if not math.isclose(apart, together, rel_tol=1e-5):
        raise SystemExit(f"first loss {apart:.6f} in two passes, {together:.6f} in one")
    table = compared(paired_rounds(contenders, args.rounds, CLOCKS["cpu"]), _APART, "over_apart")
    print(f"{'':9}  CPU s a step   over {_APART}         padding   first loss")
    for name, row in table.items():
        low, high = row["over_apart_min_max"]
        one = contenders[name]
        print(
            f"{name:9}  {row['seconds_median'] / args.steps:12.4f}   {row['over_apart']:5.2f} ({low:.2f}-{high:.2f})"
            f"   {padding(one):7}   {one.first_loss:10.5f}"
        )
    if args.output:
        settings = vars(args) | {"output": None}
        extra = {name: {"padding": padding(one), "first_loss": one.first_loss} for name, one in contenders.items()}
        report = {"settings": settings, "steps": table, "contenders": extra, "machine": machine(torch.device("cpu"))}
        write_json(args.output, report)


if __name__ == "__main__":
    main()
