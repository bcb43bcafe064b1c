"""Where a training is: what a checkpoint holds besides weights and moments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class RunState:
    """Where training stands; with the seed it determines every later batch."""

    fingerprint: str
    """Digest of everything that shapes the training: settings, shards, embeddings."""
    engine: str
    world_size: int
    step: int = 0
    """Optimizer steps done."""
    best_value: float | None = None
    """The metric on validation of the best student so far."""
    best_step: int | None = None
    seconds: float = 0.0
    """Training time so far, in seconds, over all starts."""
    tokens: int = 0
    """Tokens of target and prompt seen so far, over all ranks."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the training depends on by name (`training_settings`); their digest is the fingerprint."""
    skipped_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, that moved no weight because they were bad (`divergence`)."""
    rollbacks: list[list[int]] = field(default_factory=list)
    """[checkpoint, step] of each time that training went back: the steps after the one up to the other do not count."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last good steps, oldest first; empty unless a jump of the loss is looked for."""


def advanced(state: RunState, **changes: Any) -> RunState:
    """A state with some fields changed."""
    return replace(state, **changes)
