"""Order: what is trained on does not depend on ranks, workers or resumes.

The loader alone, with the real layout and collator, over 997 samples: one after the other with 1, 2, 4, 3 and 1 ranks,
resumed again and again inside an epoch, at its end and before its first step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

from chaos.goal import Result, measured

_SAMPLES, _EPOCHS = 997, 3
_WORLDS = (1, 2, 4, 3, 1, 2, 3, 4)


def order(folder: Path, full: bool) -> Iterator[Result]:
    """One trial a chain of starts: a batch size, a seed and a number of workers."""
    from tiny import ROWS, Tiny

    from pst_dist.config.schema import LossConfig
    from pst_dist.training.batching.batches import Collator
    from pst_dist.training.batching.order import OrderPlan
    from pst_dist.training.batching.step_batches import step_batches

    rows = [
        ROWS[number % len(ROWS)].__class__(**{**vars(ROWS[number % len(ROWS)]), "id": f"r-{number}"})
        for number in range(_SAMPLES)
    ]
    tiny, collate = Tiny(), Collator(loss=LossConfig(), pad_id=0)

    def ids(plan: OrderPlan, first: int, last: int, world: int, workers: int) -> list[list[str]]:
        """The ids of each step over all ranks, sorted; a rank without samples runs a pass that counts nothing."""
        steps: list[list[str]] = [[] for _ in range(first, last)]
        for rank in range(world):
            batches = step_batches(
                plan, rows, tiny.layout, collate, first_step=first, last_step=last, rank=rank, world_size=world,
                micro_batch_size=5, workers=workers,
            )  # fmt: skip
            for step, parts in zip(steps, batches, strict=True):
                step += [key for batch in parts if batch.counts.sum() for key in batch.sample_ids]
        return [sorted(step) for step in steps]

    with measured("each sample once an epoch, over resumes and world sizes") as result:
        starts = 0
        for seed, batch in product(range(4), (32, 61, 100, 997)) if full else [(0, 61)]:
            plan = OrderPlan(_SAMPLES, batch, seed)
            total = _EPOCHS * plan.steps_per_epoch
            alone = ids(plan, 0, total, 1, 0)
            for workers in (0, 1, 3) if full else ((0, 3) if batch == 61 else (0,)):
                chance = random.Random(seed * 100 + workers)
                # In one epoch as many resumes as it has room for, at its end, and one before the first step.
                inside = [chance.randint(1, plan.steps_per_epoch) for _ in range(6)]
                cuts = sorted([0, 0, plan.steps_per_epoch, *inside, total])
                chain: list[list[str]] = []
                for number, (first, last) in enumerate(pairwise(cuts)):
                    chain += ids(plan, first, last, _WORLDS[number % len(_WORLDS)], workers)
                    starts += 1
                trouble = [] if chain == alone else ["a global batch is not that of one rank"]
                for epoch in range(_EPOCHS):
                    part = chain[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
                    counts = Counter(key for step in part for key in step)
                    if len(counts) != _SAMPLES or set(counts.values()) != {1}:
                        trouble.append(f"epoch {epoch}: {len(counts)} ids, each {sorted(set(counts.values()))} times")
                result.trial(*(f"seed {seed}, batch {batch}, {workers} workers: {line}" for line in trouble))
        result.note = f"{_SAMPLES} samples, {_EPOCHS} epochs, {starts} starts"
    yield result
