"""Defines when a kernel agrees: its error against float64, absolute and relative to the error of plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VALUES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENTS = VALUES | {torch.float32: 1e-5}
TINY = 2e-7
"""About two roundings of float32: what the rule leaves where PyTorch happens to be exact."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor; the plain norm where that is zero."""
    scale = float(exact.double().norm())
    return float((found.double() - exact.double()).norm()) / (scale or 1.0)


def assert_agrees(found: Tensor, exact: Tensor, own: Tensor, *, gradient: bool = False) -> None:
    """Assert that `found` is as near to `exact` (float64) as its dtype allows, and at most twice as far as `own`.

    `own` is the same thing by plain PyTorch operators and autograd in the dtype of the inputs.
    """
    assert found.shape == exact.shape == own.shape
    error, torchs = relative_error(found, exact), relative_error(own, exact)
    limit = (GRADIENTS if gradient else VALUES)[found.dtype]
    assert error <= limit, f"relative error {error:.2e}, {limit:.0e} are allowed"
    assert error <= 2 * torchs + TINY, f"relative error {error:.2e}, PyTorch's own is {torchs:.2e}"


def exactly(tensor: Tensor) -> Tensor:
    """The same values in float64."""
    return tensor.detach().to(torch.float64)
