"""The state of a training run: what a checkpoint contains besides weights and moments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class RunState:
    """Training progress; together with the seed it determines every later batch."""

    fingerprint: str
    """Digest of everything that shapes the training: settings, shards, embeddings."""
    engine: str
    world_size: int
    step: int = 0
    """Optimizer steps done."""
    best_value: float | None = None
    """Validation metric of the best student so far."""
    best_step: int | None = None
    improved_step: int | None = None
    """The last step whose validation was better than all before it; a tie moves `best_step`, but not this."""
    seconds: float = 0.0
    """Training time so far, in seconds, over all starts."""
    tokens: int = 0
    """Tokens of target and prompt seen so far, over all ranks."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that shape the training (`fingerprint.training_settings`); their digest is the fingerprint."""
    skipped_steps: list[int] = field(default_factory=list)
    """Bad steps, counted from 1, that moved no weight (`training.bad_steps`)."""
    rollbacks: list[list[int]] = field(default_factory=list)
    """One [checkpoint, step] pair per rollback: the steps after `checkpoint`, up to and including `step`, are void."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last good steps, oldest first; empty unless `train.spike_factor` is set."""
    alignment_ratio: float | None = None
    """What the alignment weight follows from (`training.share`); None unless `loss.alignment_share` is set."""
    loss_scaling: list[float] | None = None
    """Scale of the losses, and steps since it changed (`Engine.scaling`); None unless `train.fp16` is set."""


def advanced(state: RunState, **changes: Any) -> RunState:
    """A state with some fields changed."""
    return replace(state, **changes)
