"""Nothing that is not finite is ever published: a look at every tensor before a checkpoint, student or export.

A finite loss says nothing about a weight that the last step has made infinite, or about Adam's second moment, which is
a square. The look takes one pass over the values and no memory; what happens to a run that fails it is `divergence`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pst_dist.errors import DivergedError

LOWER_THE_RATE = "go on from the last checkpoint with train.accept_changes=true and a lower train.learning_rate"
"""What to do when numbers have grown beyond all bounds."""


def is_finite(values: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity; an empty one does not."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    # NaN goes through minimum and maximum, and infinity is one of them: no mask of the tensor's size is made.
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def refuse_non_finite(named: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Raises DivergedError, naming the first tensor that is not finite, before `path` is published."""
    for name, values in named:
        if not is_finite(values):
            raise DivergedError(
                f"{name} is not finite; this was not written",
                LOWER_THE_RATE,
                path=path,
            )
