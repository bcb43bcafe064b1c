"""Which samples, and which of their rationales, each step trains on: a pure function of (seed, epoch, position)."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from pst_dist.data.sample import ReasoningSample


@functools.lru_cache(maxsize=2)
def epoch_order(samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """[samples] int32, or int64 for 2^31 and more: the permutation of one epoch, by (seed, epoch).

    The generator is counter-based. Every rank has the orders of two epochs in memory, hence the narrow type.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), epoch]))
    return generator.permutation(samples).astype(_kind_for(samples))


@functools.lru_cache(maxsize=2)
def mixed_epoch(parts: tuple[tuple[int, float], ...], *, seed: int, epoch: int) -> np.ndarray:
    """[slots] int32 or int64: the samples of one epoch of a mixture, source after source.

    `parts` are (rows, weight) of each.

    A source has round(weight * rows) slots, at least one. Over the epochs it walks through one permutation of its rows
    after another, so no row is used more than once more than any other of its source, whatever the weight.
    """
    chosen, first = [], 0
    for number, (rows, weight) in enumerate(parts):
        slots = slots_of(rows, weight)
        start, stop = epoch * slots, (epoch + 1) * slots
        for turn in range(start // rows, (stop - 1) // rows + 1):
            generator = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), (number + 1 << 40) + turn]))
            begun = turn * rows
            chosen.append(first + generator.permutation(rows)[max(0, start - begun) : stop - begun])
        first += rows
    return np.concatenate(chosen).astype(_kind_for(first))


def _kind_for(samples: int) -> type:
    return np.int32 if samples < 2**31 else np.int64


def slots_of(rows: int, weight: float) -> int:
    """How many samples an epoch takes from a source."""
    return max(1, round(weight * rows))


@dataclass(frozen=True)
class OrderPlan:
    """Which samples each optimizer step trains on; the last step of an epoch takes the remainder."""

    samples: int
    global_batch_size: int
    seed: int
    parts: tuple[tuple[int, float], ...] = ()
    """(rows, weight) of each source of a mixture, in the order of the samples; empty without one."""

    @property
    def slots(self) -> int:
        """Samples that an epoch uses, counted as often as they are used."""
        return sum(slots_of(rows, weight) for rows, weight in self.parts) if self.parts else self.samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, which uses every sample exactly once, or as often as its weight says."""
        return -(-self.slots // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> np.ndarray:
        """Sample indices of one step, in order, over all ranks."""
        within = step % self.steps_per_epoch
        epoch = self.epoch_of(step)
        order = epoch_order(self.slots, seed=self.seed, epoch=epoch)
        batch = order[within * self.global_batch_size : (within + 1) * self.global_batch_size].astype(np.int64)
        return mixed_epoch(self.parts, seed=self.seed, epoch=epoch)[batch].astype(np.int64) if self.parts else batch

    def others(self, step: int, count: int) -> np.ndarray:
        """Up to `count` sample indices outside a step's global batch, drawn anew each step."""
        batch = self.global_batch(step)
        generator = np.random.Generator(np.random.Philox(key=[self.seed & (2**64 - 1), 2**63 + step]))
        drawn = generator.choice(self.samples, min(self.samples, count + len(batch)), replace=False)
        return drawn[~np.isin(drawn, batch)][:count]

    def micro_batches(self, step: int, *, rank: int, world_size: int, size: int) -> list[np.ndarray]:
        """This rank's forward passes; every rank gets the same number, with an empty one where samples run out."""
        indices = self.global_batch(step)
        passes = -(-len(indices[::world_size]) // size)
        mine = indices[rank::world_size]
        return [mine[k * size : (k + 1) * size] for k in range(passes)]


def rationale_of(sample: ReasoningSample, *, seed: int, epoch: int) -> int:
    """Index of the rationale an epoch uses: epochs cycle through all of them, starting at one that the id decides."""
    return turn_of(sample.id, len(sample.rationales), seed=seed, epoch=epoch)


def turn_of(sample_id: str, rationales: int, *, seed: int, epoch: int) -> int:
    """`rationale_of` a sample with this id and number of rationales."""
    if rationales < 2:
        return 0
    start = int.from_bytes(hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()[:4], "big")
    return (start + epoch) % rationales
