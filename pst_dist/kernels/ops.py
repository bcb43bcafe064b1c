"""The kernels as `torch.library` operators for `torch.compile` and autograd.

Each operator picks its backend by the device of its tensors, has a fake for tracing, and causes no graph breaks. The
raw ones (`hidden_gradient`, `linear_nll`) have no autograd formula; `head` composes them.
"""

# Shapes in this file: B sequences, T positions, D student width, N supervised rows, V vocabulary, A spans, E teacher
# width

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pst_dist.kernels.dispatch import backend_for
from pst_dist.kernels.reference import is_smooth_l1, wide
from pst_dist.kernels.spans import Spans

# Bytes for the logits of one chunk: large enough that its matrix product runs at full speed, small compared with a
# student's activations.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


def chunk_rows(vocabulary: int, width: int, itemsize: int, device: torch.device) -> int:
    """Supervised rows whose logits are in memory at a time; at least 64, a multiple of 64."""
    room = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    if device.type == "cuda":
        # Each further chunk reads and writes the head's float32 gradient once more, so allow as many bytes as it takes.
        room = max(room, 4 * vocabulary * width)
    return max(64, room // max(1, vocabulary * itemsize) // 64 * 64)


def span_mean(hidden_BTD: Tensor, spans: Spans) -> Tensor:
    """[A, D] means of the hidden states over spans, float32 (float64 for float64); differentiable.

    Positions outside every span are never read, so a NaN there affects neither value nor gradient. The sum of a span is
    bitwise the same however the batch is packed.
    """
    pooled, _ = torch.ops.pst.span_mean(hidden_BTD, spans.rows, spans.starts, spans.lengths, spans.owner, spans.longest)
    return pooled


@torch.library.custom_op("pst::span_mean", mutates_args=())
def _span_mean(
    hidden_BTD: Tensor, rows_A: Tensor, starts_A: Tensor, lengths_A: Tensor, owner_R: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """The means, and an empty tensor that carries the hidden state's dtype to the gradient."""
    pooled = backend_for(hidden_BTD.device).span_mean(hidden_BTD, rows_A, starts_A, lengths_A, longest)
    return pooled, hidden_BTD.new_empty(0)


@_span_mean.register_fake
def _(
    hidden_BTD: Tensor,
    rows_A: Tensor,
    starts_A: Tensor,
    lengths_A: Tensor,
    owner_R: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor]:
    shape = (rows_A.shape[0], hidden_BTD.shape[-1])
    return hidden_BTD.new_empty(shape, dtype=wide(hidden_BTD.dtype)), hidden_BTD.new_empty(0)


def _span_mean_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[3], inputs[4], output[1])
    ctx.shape = inputs[0].shape


def _span_mean_backward(ctx: Any, gradient_AD: Tensor, _: Any) -> tuple[Any, ...]:
    lengths, owner, kind = ctx.saved_tensors
    like = kind.new_empty(1).expand(ctx.shape)
    return torch.ops.pst.hidden_gradient(like, None, None, None, None, gradient_AD, lengths, owner), *[None] * 5


_span_mean.register_autograd(_span_mean_backward, setup_context=_span_mean_setup)


@torch.library.custom_op("pst::hidden_gradient", mutates_args=())
def hidden_gradient(
    like_BTD: Tensor,
    base_BTD: Tensor | None,
    rows_gradient_ND: Tensor | None,
    rows_upstream: Tensor | None,
    slots_R: Tensor | None,
    spans_gradient_AD: Tensor | None,
    lengths_A: Tensor,
    owner_R: Tensor,
) -> Tensor:
    """[B, T, D] gradient of the hidden state; see `reference.hidden_gradient`."""
    return backend_for(like_BTD.device).hidden_gradient(
        like_BTD,
        base_BTD=base_BTD,
        rows_gradient_ND=rows_gradient_ND,
        rows_upstream=rows_upstream,
        slots_R=slots_R,
        spans_gradient_AD=spans_gradient_AD,
        lengths_A=lengths_A,
        owner_R=owner_R,
    )


@hidden_gradient.register_fake
def _(
    like_BTD: Tensor,
    base_BTD: Tensor | None,
    rows_gradient_ND: Tensor | None,
    rows_upstream: Tensor | None,
    slots_R: Tensor | None,
    spans_gradient_AD: Tensor | None,
    lengths_A: Tensor,
    owner_R: Tensor,
) -> Tensor:
    return like_BTD.new_empty(like_BTD.shape)


def row_distance(student_AE: Tensor, teacher_AE: Tensor, *, kind: str, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """(distances [A] with gradient to the student, cosines [A] without), float32 (float64 for float64).

    `kind` is `cosine` or `smooth_l1`; see `reference.row_distance`. The teacher is frozen and gets no gradient. Raises
    ValueError for any other kind.
    """
    is_smooth_l1(kind)  # before the operator, which does not run during tracing
    distance, cosine, _ = torch.ops.pst.row_distance(student_AE, teacher_AE.detach(), kind, eps)
    return distance, cosine.detach()


@torch.library.custom_op("pst::row_distance", mutates_args=())
def _row_distance(student_AE: Tensor, teacher_AE: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return backend_for(student_AE.device).row_distance(student_AE, teacher_AE, kind, eps)


@_row_distance.register_fake
def _(
    student_AE: Tensor,
    teacher_AE: Tensor,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = student_AE.shape[0], wide(student_AE.dtype)
    distances_A, cosines_A = student_AE.new_empty(rows, dtype=dtype), student_AE.new_empty(rows, dtype=dtype)
    return distances_A, cosines_A, student_AE.new_empty((rows, 3), dtype=dtype)


@torch.library.custom_op("pst::row_distance_gradient", mutates_args=())
def _row_distance_gradient(
    student_AE: Tensor, teacher_AE: Tensor, statistics_A3: Tensor, upstream_A: Tensor, kind: str, eps: float
) -> Tensor:
    backend = backend_for(student_AE.device)
    return backend.row_distance_gradient(student_AE, teacher_AE, statistics_A3, upstream_A, kind, eps)


@_row_distance_gradient.register_fake
def _(
    student_AE: Tensor,
    teacher_AE: Tensor,
    statistics_A3: Tensor,
    upstream_A: Tensor,
    kind: str,
    eps: float,
) -> Tensor:
    return student_AE.new_empty(student_AE.shape)


def _row_distance_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[2])
    ctx.kind, ctx.eps = inputs[2:]


def _row_distance_backward(ctx: Any, upstream_A: Tensor, _cosine: Any, _statistics: Any) -> tuple[Any, ...]:
    student, teacher, statistics = ctx.saved_tensors
    gradient = torch.ops.pst.row_distance_gradient(student, teacher, statistics, upstream_A, ctx.kind, ctx.eps)
    return gradient, None, None, None


_row_distance.register_autograd(_row_distance_backward, setup_context=_row_distance_setup)


@torch.library.custom_op("pst::linear_nll", mutates_args=())
def linear_nll(
    rows_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    chunk: int,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nll [N], rows' gradient [N, D], weight's [V, D], bias's [V]) of a linear language-model head.

    `rows` and `weight` have the same dtype, in which the matrix products run; likelihoods and the gradients of weight
    and bias are summed in the wide dtype. The gradients are those of sum(weights * nll), computed chunk by chunk, so
    that at most `chunk` rows of logits exist at a time. Without weights only the likelihoods are computed; without
    `with_weight` the head is frozen. Results that are not computed are returned empty.
    """
    rows, vocabulary, dtype = len(rows_ND), len(weight_VD), wide(rows_ND.dtype)
    backend = backend_for(rows_ND.device)
    likelihoods = rows_ND.new_empty(rows, dtype=dtype)
    learns, moves = weights_N is not None, weights_N is not None and with_weight
    rows_gradient = torch.empty_like(rows_ND) if learns else rows_ND.new_empty(0)
    weight_gradient = weight_VD.new_empty((vocabulary, rows_ND.shape[1]) if moves else 0, dtype=dtype)
    if not rows:
        weight_gradient.zero_()
    bias_gradient = weight_VD.new_zeros(vocabulary if moves and bias_V is not None else 0, dtype=dtype)
    buffer = rows_ND.new_empty(min(chunk, rows), vocabulary)
    for start in range(0, rows, chunk):
        here = slice(start, min(start + chunk, rows))
        logits, hidden = buffer[: here.stop - start], rows_ND[here]
        if bias_V is None:
            torch.mm(hidden, weight_VD.T, out=logits)
        else:
            torch.addmm(bias_V, hidden, weight_VD.T, out=logits)
        weights = None if weights_N is None else weights_N[here]
        likelihoods[here] = backend.softmax_nll(logits, targets_N[here], weights)
        if learns:
            torch.mm(logits, weight_VD, out=rows_gradient[here])
        if moves:
            _add_product(weight_gradient, logits, hidden, first=start == 0)
        if bias_gradient.numel():
            bias_gradient += logits.sum(0, dtype=dtype)
    return likelihoods, rows_gradient, weight_gradient, bias_gradient


def _add_product(total_VD: Tensor, left_CV: Tensor, right_CD: Tensor, *, first: bool) -> None:
    """total += left^T @ right, accumulated in the total's dtype; the first product overwrites the total."""
    dtype, kept = total_VD.dtype, 0 if first else 1
    if left_CV.dtype == dtype:
        total_VD.addmm_(left_CV.T, right_CD, beta=kept)
    elif left_CV.is_cuda and first and hasattr(torch.ops.aten.mm, "dtype_out"):  # torch >= 2.8
        torch.ops.aten.mm.dtype_out(left_CV.T, right_CD, dtype, out=total_VD)
    elif left_CV.is_cuda and _adds_in_float32(left_CV.dtype, left_CV.device):
        torch.ops.aten.addmm.dtype_out(total_VD, left_CV.T, right_CD, dtype, beta=kept, out=total_VD)
    elif first:
        total_VD.copy_(left_CV.T @ right_CD)
    elif left_CV.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
        total_VD += torch.mm(left_CV.T, right_CD, out_dtype=dtype)
    else:
        total_VD += left_CV.T @ right_CD


@functools.lru_cache(maxsize=64)
def _adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch's addmm accepts a float32 summand with half-precision factors; tested once.

    If not, every chunk of logits costs a second matrix as large as the head and three passes over it.
    """
    try:
        total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
        torch.ops.aten.addmm.dtype_out(total, ones, ones, torch.float32, out=total)
        return bool((total == 17).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


@linear_nll.register_fake
def _(
    rows_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    chunk: int,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = rows_ND.shape[0], wide(rows_ND.dtype)
    moves = weights_N is not None and with_weight
    return (
        rows_ND.new_empty(rows, dtype=dtype),
        rows_ND.new_empty(rows_ND.shape if weights_N is not None else (0,)),
        weight_VD.new_empty(weight_VD.shape if moves else (0,), dtype=dtype),
        weight_VD.new_empty((weight_VD.shape[0] if moves and bias_V is not None else 0,), dtype=dtype),
    )
