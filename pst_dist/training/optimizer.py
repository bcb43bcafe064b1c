"""The optimizer: AdamW with its parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pst_dist.config.schema import TrainConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, biases and norms do not."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = [parameter for _, parameter in named if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2]
    plain = [parameter for _, parameter in named if len(getattr(parameter, "ds_shape", parameter.shape)) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(student: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(student, train.weight_decay),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )


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
