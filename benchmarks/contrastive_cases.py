"""What `kernel_compile.py` compiles of InfoNCE's fused pass: every launch, in both half precisions."""

# Shapes in this file: A rows, G keys, E width

from __future__ import annotations

import torch
from kernel_cases import Case, Traits

from pst_dist.kernels.contrastive_kernels import contrastive_pass

A, G = 3, 5
"""Rows and keys do not enter the compiled kernel."""

TRAITS = {"contrastive_rows": Traits(wide_loads=True, wide_stores=True, multiplies=True)}


def fused_pass(width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Losses and gradients of a few rows."""
    queries_AE, keys_GE = torch.zeros(A, width, dtype=dtype), torch.zeros(G, width, dtype=dtype)
    index_A, groups_G = torch.zeros(A, dtype=torch.int64), torch.zeros(G, dtype=torch.int64)
    contrastive_pass(queries_AE, keys_GE, index_A, index_A, groups_G, 20.0)


CASES = [
    *[Case(f"info_nce E={width}", lambda width=width: fused_pass(width)) for width in (16, 128, 256, 384, 512)],
    Case("info_nce E=384 float16", lambda: fused_pass(384, torch.float16)),
]
