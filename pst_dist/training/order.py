"""Which samples, and which of their rationales, each step trains on: a pure function of (seed, epoch, position)."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from pst_dist.data.sample import ReasoningSample


@functools.lru_cache(maxsize=2)
def epoch_order(samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """[samples] int64: the permutation of one epoch, from a counter-based generator keyed by (seed, epoch)."""
    generator = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), epoch]))
    return generator.permutation(samples)


@dataclass(frozen=True)
class OrderPlan:
    """Which samples each optimizer step trains on; the last step of an epoch takes the remainder."""

    samples: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that use every sample exactly once."""
        return -(-self.samples // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> np.ndarray:
        """Sample indices of one step, in order, over all ranks."""
        within = step % self.steps_per_epoch
        order = epoch_order(self.samples, seed=self.seed, epoch=self.epoch_of(step))
        return order[within * self.global_batch_size : (within + 1) * self.global_batch_size]

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
    if len(sample.rationales) < 2:
        return 0
    start = int.from_bytes(hashlib.sha256(f"{seed}/{sample.id}".encode()).digest()[:4], "big")
    return (start + epoch) % len(sample.rationales)
