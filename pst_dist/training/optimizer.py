"""The optimizer: AdamW with its parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pst_dist.config.schema import TrainConfig

RATE_FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate over `train.learning_rate`, at every step of the schedule."""
HEAD = "head."
"""Beginning of the alignment head's parameter names in `Student`."""


def parameter_groups(module: nn.Module, weight_decay: float, *, head_factor: float = 1.0) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, biases and norms do not; `head_factor` scales the alignment head's learning rate.

    The head has groups of its own only where its factor is not 1.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (factor, decays): [] for factor in dict.fromkeys((1.0, head_factor)) for decays in (True, False)
    }
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            groups[head_factor if name.startswith(HEAD) else 1.0, decays].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, RATE_FACTOR: factor}
        for (factor, decays), parameters in groups.items()
        if parameters
    ]


def adamw(student: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the student's groups, every rate at the peak of its schedule."""
    factor = (train.head_learning_rate or train.learning_rate) / train.learning_rate
    optimizer = torch.optim.AdamW(
        parameter_groups(student, train.weight_decay, head_factor=factor),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )
    set_learning_rate(optimizer.param_groups, train.learning_rate)
    return optimizer


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Give each group its own rate when the body's is `learning_rate`."""
    for group in groups:
        group["lr"] = learning_rate * group[RATE_FACTOR]


def learning_rate_at(step: int, total: int, train: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then the schedule of `train.lr_scheduler_type`.

    After warm-up these are the schedules of `transformers.get_scheduler`; the warm-up itself starts one step earlier,
    because a first step with rate zero teaches nothing.
    """
    warmup = math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    return train.learning_rate * _decayed(step, warmup, total, train)


def _decayed(step: int, warmup: int, total: int, train: TrainConfig) -> float:
    """The rate of a step after warm-up, as a share of the peak."""
    kind = train.lr_scheduler_type
    if kind == "constant":
        return 1.0
    if kind == "inverse_sqrt":
        scale = warmup or total  # transformers' default time scale is the length of the warm-up
        return math.sqrt(scale / (step - warmup + scale))
    if kind == "warmup_stable_decay":
        decay = max(1, math.ceil(train.decay_ratio * total))
        progress = max(0.0, (step - (total - decay)) / decay)
        return train.min_lr_ratio + (1 - train.min_lr_ratio) * _half_cosine(progress)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1 - progress
    lowest = train.min_lr_ratio if kind == "cosine_with_min_lr" else 0.0
    return lowest + (1 - lowest) * _half_cosine(progress)


def _half_cosine(progress: float) -> float:
    """From 1 at `progress` 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
