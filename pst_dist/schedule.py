"""The learning rate of each step."""

from __future__ import annotations

import math

from pst_dist.config import TrainConfig


def learning_rate_at(step: int, total: int, train: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then constant, linear or cosine to zero."""
    warmup = math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    progress = (step - warmup) / max(1, total - warmup)
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * (1 - progress)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
