"""Refuse to publish non-finite values: checks every tensor before writing a checkpoint, student or export.

The loss can be finite although the last step made a weight infinite, or although Adam's second moment, a square,
overflowed. The check takes one pass over the values and no extra memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pst_dist.errors import DivergedError

LOWER_THE_RATE = "resume from the last checkpoint with train.accept_changes=true and a lower train.learning_rate"
"""The remedy when the training has diverged."""


def is_finite(values: Tensor) -> bool:
    """Whether a floating-point tensor contains no NaN and no infinity; true for an empty one."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    # Minimum and maximum propagate NaN, and any infinity is one of them; so no mask of the tensor's size is needed.
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def refuse_non_finite(named: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Raises DivergedError, naming the first tensor that is not finite, before `path` is published."""
    for name, values in named:
        if not is_finite(values):
            raise DivergedError(
                f"{name} is not finite; nothing was written here",
                LOWER_THE_RATE,
                path=path,
            )
