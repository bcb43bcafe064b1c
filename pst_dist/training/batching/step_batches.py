"""The batches of each step of a training, from a loader whose whole state is a step number.

The order of samples is a pure function of (seed, epoch, position), see `training.batching.order`: step k's global batch
is a slice of the epoch's permutation, which `training.batching.passes` cuts into forward passes. So resuming needs no
replay, and the number of ranks never changes what is trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from pst_dist.data.sample import ReasoningSample, question_group
from pst_dist.data.shards import SplitReader
from pst_dist.student.layout import Layout, forward_passes
from pst_dist.student.layout import Sequence as TokenSequence
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.batching.order import OrderPlan, turn_of
from pst_dist.training.batching.passes import ByLength, length_passes

_MOST_CACHED = 20_000
"""Rows whose tokens stay in memory, up to about 100 MB. Tokenising again in each epoch would take a tenth of a small
student's step."""


class _Steps(Dataset[list[PSTBatch]]):
    """Step number -> this rank's micro-batches; runs in the loader's workers."""

    def __init__(
        self,
        plan: OrderPlan,
        samples: Sequence[ReasoningSample],
        layout: Layout,
        collate: Collator,
        *,
        rank: int,
        world_size: int,
        size: int,
        by_length: ByLength | None,
    ) -> None:
        self.plan, self.samples, self.layout, self.collate = plan, samples, layout, collate
        self.rank, self.world_size, self.size, self.by_length = rank, world_size, size, by_length
        self._sample = functools.lru_cache(maxsize=plan.global_batch_size)(samples.__getitem__)
        # A row whose tokens are cached is not read again: its id and number of rationales say which rationale it uses.
        self._named = functools.lru_cache(maxsize=_MOST_CACHED)(self._read_name)
        self._sequences: dict[tuple[int, int], list[TokenSequence]] = {}

    def __getitem__(self, step: int) -> list[PSTBatch]:
        epoch, indices = self.plan.epoch_of(step), self.plan.global_batch(step).tolist()
        keys, groups = self._candidates(step, indices, epoch)
        if self.by_length is not None:
            passes = self._length_passes(self.by_length, self._laid_out(indices, epoch))
        else:
            passes = self._drawn_passes(step, indices, epoch)
        return [self.collate(sequences, keys=keys, key_groups=groups, muted=muted) for sequences, muted in passes]

    def _read_name(self, index: int) -> tuple[str, int]:
        sample = self._sample(index)
        return sample.id, len(sample.rationales)

    def _laid_out(self, indices: list[int], epoch: int) -> list[list[TokenSequence]]:
        """The sequences of each row; rows that are not cached are encoded together."""
        chosen = [(index, turn_of(*self._named(index), seed=self.plan.seed, epoch=epoch)) for index in indices]
        new = [row for row in dict.fromkeys(chosen) if row not in self._sequences]
        made = self.layout.many([(self._sample(index), rationale) for index, rationale in new])
        self._sequences |= zip(new, made, strict=True)
        found = [self._sequences[row] for row in chosen]
        while len(self._sequences) > _MOST_CACHED:
            del self._sequences[next(iter(self._sequences))]
        return found

    def _drawn_passes(self, step: int, indices: list[int], epoch: int) -> Iterator[tuple[list[TokenSequence], bool]]:
        """This rank's passes as (sequences, muted), over rows in the order in which they are drawn."""
        cut = {"rank": self.rank, "world_size": self.world_size, "size": self.size}
        for part in self.plan.micro_batches(step, **cut):
            chosen = self._laid_out(part.tolist() or indices[:1], epoch)
            for sequences in forward_passes(self.layout.arm, chosen):
                yield sequences, len(part) == 0

    def _length_passes(
        self, cut: ByLength, batch: list[list[TokenSequence]]
    ) -> Iterator[tuple[list[TokenSequence], bool]]:
        """This rank's passes over rows sorted by length; every rank tokenises the whole global batch for it."""
        sizes = [[self.collate.size_of(sequence) for sequence in own] for own in batch]
        for ranks in length_passes(self.layout.arm, sizes, cut, world_size=self.world_size, rows=self.size):
            mine = ranks[self.rank]
            # An empty pass still needs a sequence: one of the shortest of the pass.
            chosen = mine or [max(ranks, key=len)[-1]]
            yield [batch[sample][place] for sample, place in chosen], not mine

    def _candidates(self, step: int, indices: list[int], epoch: int) -> tuple[list[tuple[str, int]], list[int]]:
        """InfoNCE's keys and their question groups: the global batch, then `loss.negatives` further rows."""
        loss = self.collate.loss
        if self.collate.teacher is None or loss.alignment != "info_nce":
            return [], []
        further = self.plan.others(step, loss.negatives).tolist() if loss.negatives else []
        names, counts, groups = self._known(indices + further)
        turns = (
            turn_of(name, count, seed=self.plan.seed, epoch=epoch) for name, count in zip(names, counts, strict=True)
        )
        return list(zip(names, turns, strict=True)), groups

    def _known(self, indices: list[int]) -> tuple[list[str], list[int], list[int]]:
        """(ids, numbers of rationales, question groups) of some rows; shards have them in an index."""
        if isinstance(self.samples, SplitReader):
            return self.samples.candidates.many(indices)
        found = [self.samples[index] for index in indices]
        groups = [question_group(sample.question) for sample in found]
        return [sample.id for sample in found], [len(sample.rationales) for sample in found], groups


def step_batches(
    plan: OrderPlan,
    samples: Sequence[ReasoningSample],
    layout: Layout,
    collate: Collator,
    *,
    first_step: int,
    last_step: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    by_length: ByLength | None = None,
    workers: int = 0,
) -> Iterator[list[PSTBatch]]:
    """This rank's micro-batches for steps first_step … last_step - 1, one list per step.

    A micro-batch has at most `micro_batch_size` samples; with `by_length` it is also cut by length. `workers` processes
    prepare the batches, or this one for 0.
    """
    cut: dict[str, Any] = {"rank": rank, "world_size": world_size, "size": micro_batch_size, "by_length": by_length}
    dataset = _Steps(plan, samples, layout, collate, **cut)
    loader: Any = DataLoader(
        dataset,
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
