"""What `kernel_compile.py` compiles: calls of the launchers, as training makes them, on tensors of a few rows.

A case is a call; every kernel that it launches is compiled with exactly the types, strides, alignment and options of
that launch, so what is checked is what would run. A module with more kernels brings a list and traits of its own and
is named in `kernel_compile.REGISTRIES`.
"""

# Shapes in this file: B sequences, T positions, D student width, N supervised rows, V vocabulary, A spans, E teacher
# width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pst_dist.kernels import triton_backend

A, B, T, N, C = 5, 3, 40, 7, 4
"""Rows do not enter a compiled kernel, unless they are 1."""


@dataclass(frozen=True)
class Case:
    """A call that launches kernels."""

    name: str
    call: Callable[[], object]
    aligned: bool = True
    """Whether rows begin at multiples of 16 elements; else loads and stores may be narrow."""


@dataclass(frozen=True)
class Traits:
    """What is asked of a kernel, beyond no spills, shared memory that fits, and no atomics."""

    streams: bool = False
    """It moves much memory and computes little: at least half of an SM's threads must fit."""
    wide_loads: bool = False
    """Aligned cases load 128 bits at a time."""
    wide_stores: bool = False
    """Aligned cases store 128 bits at a time, where they write their input's rows."""
    multiplies: bool = False
    """It has matrix products: they run on tensor cores."""


TRAITS = {
    "chunk_sums": Traits(streams=True, wide_loads=True),
    "span_means": Traits(streams=True, wide_loads=True),
    "hidden_gradient_rows": Traits(streams=True, wide_loads=True, wide_stores=True),
    "row_distances": Traits(wide_loads=True),
    "row_distance_gradients": Traits(wide_loads=True, wide_stores=True),
    "softmax_rows": Traits(streams=True, wide_loads=True, wide_stores=True),
}


def span_mean(
    width: int, longest: int, dtype: torch.dtype = torch.bfloat16, *, batch: int = B, length: int = T
) -> None:
    """Pool spans of at most `longest` positions."""
    index_A = torch.zeros(A, dtype=torch.int64)
    hidden_BTD = torch.zeros(batch, length, width, dtype=dtype)
    triton_backend.span_mean(hidden_BTD, index_A, index_A, index_A, longest)


def hidden_gradient(
    width: int, parts: str, dtype: torch.dtype = torch.bfloat16, *, batch: int = B, length: int = T
) -> None:
    """Write a gradient of the named parts, out of `base rows spans`."""
    index_A, map_R = torch.zeros(A, dtype=torch.int64), torch.zeros(batch * length, dtype=torch.int32)
    hidden_BTD = torch.zeros(batch, length, width, dtype=dtype)
    triton_backend.hidden_gradient(
        hidden_BTD,
        base_BTD=hidden_BTD if "base" in parts else None,
        rows_gradient_ND=torch.zeros(N, width, dtype=dtype) if "rows" in parts else None,
        rows_upstream=torch.ones(()) if "rows" in parts else None,
        slots_R=map_R if "rows" in parts else None,
        spans_gradient_AD=torch.zeros(A, width) if "spans" in parts else None,
        lengths_A=index_A,
        owner_R=map_R,
    )


def row_distance(width: int, kind: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The distance of rows to float32 teachers, and its gradient."""
    student_AE, teacher_AE = torch.zeros(A, width, dtype=dtype), torch.zeros(A, width)
    distance_A, _, statistics_A3 = triton_backend.row_distance(student_AE, teacher_AE, kind, 1e-8)
    triton_backend.row_distance_gradient(student_AE, teacher_AE, statistics_A3, distance_A, kind, 1e-8)


def softmax_nll(classes: int, dtype: torch.dtype = torch.bfloat16, *, learns: bool = True) -> None:
    """Likelihoods of a vocabulary, with their gradient if it learns."""
    index_C = torch.zeros(C, dtype=torch.int64)
    triton_backend.softmax_nll(torch.zeros(C, classes, dtype=dtype), index_C, torch.ones(C) if learns else None)


def contrastive_nll(keys: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Likelihoods of the own key among keys in groups."""
    index_C, groups_G = torch.zeros(C, dtype=torch.int64), torch.zeros(keys, dtype=torch.int64)
    triton_backend.contrastive_nll(torch.zeros(C, keys, dtype=dtype), index_C, index_C, groups_G, torch.ones(C))


def sizes_of_one() -> None:
    """Triton compiles arguments that are 1 as constants: everything must still compile."""
    span_mean(1, 1000, batch=1, length=1)
    hidden_gradient(1, "base rows spans", batch=1, length=1)
    row_distance(1, "smooth_l1")
    softmax_nll(1)


CASES = [
    *[Case(f"span_mean D={width}", lambda width=width: span_mean(width, 2000)) for width in (64, 128, 768, 5120)],
    Case("span_mean D=768, short spans", lambda: span_mean(768, 20)),
    Case("span_mean D=768 float32", lambda: span_mean(768, 2000, torch.float32)),
    Case("span_mean D=257", lambda: span_mean(257, 2000), aligned=False),
    *[
        Case(f"hidden_gradient D={width}", lambda width=width: hidden_gradient(width, "rows spans"))
        for width in (64, 128, 768)
    ],
    Case("hidden_gradient D=768, added to a base", lambda: hidden_gradient(768, "base spans")),
    Case("hidden_gradient D=768, spans only", lambda: hidden_gradient(768, "spans")),
    Case("hidden_gradient D=768 float32, all", lambda: hidden_gradient(768, "base rows spans", torch.float32)),
    Case("hidden_gradient D=257", lambda: hidden_gradient(257, "rows spans"), aligned=False),
    Case("row_distance cosine E=384", lambda: row_distance(384, "cosine")),
    Case("row_distance cosine E=1024", lambda: row_distance(1024, "cosine")),
    Case("row_distance smooth_l1 E=4096", lambda: row_distance(4096, "smooth_l1")),
    *[
        Case(f"softmax_nll V={classes}", lambda classes=classes: softmax_nll(classes))
        for classes in (512, 4096, 16384, 50257, 151936)
    ],
    Case("softmax_nll V=151936, no gradient", lambda: softmax_nll(151936, learns=False)),
    Case("softmax_nll V=151936 float32", lambda: softmax_nll(151936, torch.float32)),
    *[
        Case(f"softmax_nll V={classes} float32", lambda classes=classes: softmax_nll(classes, torch.float32))
        for classes in (50257, 128259)
    ],
    Case("softmax_nll V=128259", lambda: softmax_nll(128259)),
    *[
        Case(f"contrastive_nll G={keys}", lambda keys=keys: contrastive_nll(keys))
        for keys in (512, 4096, 16384, 65536, 131072)
    ],
    Case("contrastive_nll G=20001 float32", lambda: contrastive_nll(20001, torch.float32)),
    Case("all sizes 1", sizes_of_one, aligned=False),
]
