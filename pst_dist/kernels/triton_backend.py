"""The functions of `reference` on Triton's kernels: same names, arguments and results.

This module turns tensors into pointers, strides and grids; the arithmetic is in `span_kernels`, `row_kernels` and
`softmax_kernels`. A launch needs no sync with the device, so a CUDA graph can capture everything. Tensors may have any
strides; if the last one is not 1, a contiguous copy is read. float64 goes to `reference`, because Triton would sum it
in float32.
"""

# Shapes in this file: B sequences, T positions, R = B * T rows, D student width, N supervised rows, V vocabulary,
# A spans, K chunks of the longest span, E teacher width, C rows of a chunk, G keys

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pst_dist.kernels import reference
from pst_dist.kernels.launch_table import chunk_of, launch_of
from pst_dist.kernels.row_kernels import row_distance_gradients, row_distances
from pst_dist.kernels.softmax_kernels import BODY_GRAIN, softmax_rows
from pst_dist.kernels.span_kernels import chunk_sums, hidden_gradient_rows, span_means

name = "triton"
wide = reference.wide


def span_mean(hidden_BTD: Tensor, rows_A: Tensor, starts_A: Tensor, lengths_A: Tensor, longest: int) -> Tensor:
    """[A, D] float32 means over spans, as `reference.span_mean`.

    `longest` must be at least the largest length; a larger value costs idle programs, a smaller one truncates spans.
    """
    if hidden_BTD.dtype == torch.float64:
        return reference.span_mean(hidden_BTD, rows_A, starts_A, lengths_A, longest)
    hidden_BTD = _rows_dense(hidden_BTD)
    spans, width = len(rows_A), hidden_BTD.shape[-1]
    means_AD = torch.empty(spans, width, dtype=torch.float32, device=hidden_BTD.device)
    if not means_AD.numel():
        return means_AD
    chunk = chunk_of(width)
    chunks = max(1, -(-longest // chunk))
    whole = chunks == 1
    sums_AKD = means_AD if whole else means_AD.new_empty(spans, chunks, width)
    first, second = (launch_of(kernel, width, hidden_BTD.device) for kernel in ("chunk_sums", "span_means"))
    with _on(hidden_BTD):
        chunk_sums[(spans * _blocks(width, first.blocks["WIDTH"]), chunks)](
            hidden_BTD,
            rows_A.contiguous(),
            starts_A.contiguous(),
            lengths_A.contiguous(),
            sums_AKD,
            hidden_BTD.stride(0),
            hidden_BTD.stride(1),
            width,
            chunks,
            CHUNK=chunk,
            WHOLE=whole,
            **first.options,
        )
        if not whole:
            span_means[(spans * _blocks(width, second.blocks["WIDTH"]),)](
                sums_AKD,
                lengths_A.contiguous(),
                means_AD,
                width,
                chunks,
                CHUNK=chunk,
                **second.options,
            )
    return means_AD


def hidden_gradient(
    like_BTD: Tensor,
    *,
    base_BTD: Tensor | None,
    rows_gradient_ND: Tensor | None,
    rows_upstream: Tensor | None,
    slots_R: Tensor | None,
    spans_gradient_AD: Tensor | None,
    lengths_A: Tensor,
    owner_R: Tensor,
) -> Tensor:
    """[B, T, D] contiguous gradient of the hidden state, as `reference.hidden_gradient`: each row is written once."""
    if like_BTD.dtype == torch.float64:
        return reference.hidden_gradient(
            like_BTD,
            base_BTD=base_BTD,
            rows_gradient_ND=rows_gradient_ND,
            rows_upstream=rows_upstream,
            slots_R=slots_R,
            spans_gradient_AD=spans_gradient_AD,
            lengths_A=lengths_A,
            owner_R=owner_R,
        )
    batch, positions, width = like_BTD.shape
    gradient_BTD = torch.empty(like_BTD.shape, dtype=like_BTD.dtype, device=like_BTD.device)
    if not gradient_BTD.numel():
        return gradient_BTD
    has_rows = rows_gradient_ND is not None and slots_R is not None and len(rows_gradient_ND) > 0
    has_spans = spans_gradient_AD is not None and len(lengths_A) > 0
    # A missing part is never accessed, so any pointer will do.
    base = gradient_BTD if base_BTD is None else _rows_dense(base_BTD)
    rows_gradient = _rows_dense(rows_gradient_ND) if has_rows and rows_gradient_ND is not None else gradient_BTD
    slots = slots_R.contiguous() if has_rows and slots_R is not None else gradient_BTD
    spans_gradient = _rows_dense(spans_gradient_AD) if has_spans and spans_gradient_AD is not None else gradient_BTD
    launch = launch_of("hidden_gradient_rows", width, like_BTD.device)
    rows = batch * positions
    with _on(like_BTD):
        hidden_gradient_rows[(_blocks(rows, launch.blocks["TILE"]) * _blocks(width, launch.blocks["WIDTH"]),)](
            gradient_BTD,
            base,
            rows_gradient,
            gradient_BTD if rows_upstream is None else rows_upstream,
            slots,
            spans_gradient,
            owner_R.contiguous() if has_spans else gradient_BTD,
            lengths_A.contiguous() if has_spans else gradient_BTD,
            rows,
            positions,
            width,
            base.stride(0),
            base.stride(1),
            rows_gradient.stride(0),
            spans_gradient.stride(0),
            HAS_BASE=base_BTD is not None,
            HAS_ROWS=has_rows,
            HAS_UPSTREAM=has_rows and rows_upstream is not None,
            HAS_SPANS=has_spans,
            **launch.options,
        )
    return gradient_BTD


def softmax_nll(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor | None) -> Tensor:
    """[C] float32 negative log likelihoods in nats, as `reference.softmax_nll`; with weights, the gradient in place."""
    if logits_CV.dtype == torch.float64:
        return reference.softmax_nll(logits_CV, targets_C, weights_C)
    return _softmax(logits_CV, targets_C, weights_C, None, None)


def row_distance(student_AE: Tensor, teacher_AE: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(distances [A], cosines [A], statistics [A, 3]) in float32, as `reference.row_distance`."""
    huber = reference.is_smooth_l1(kind)
    if student_AE.dtype == torch.float64:
        return reference.row_distance(student_AE, teacher_AE, kind, eps)
    student_AE, teacher_AE = _rows_dense(student_AE), _rows_dense(teacher_AE)
    spans, width = student_AE.shape
    distances_A = torch.empty(spans, dtype=torch.float32, device=student_AE.device)
    cosines_A, statistics_A3 = torch.empty_like(distances_A), distances_A.new_empty(spans, 3)
    if not spans:
        return distances_A, cosines_A, statistics_A3
    launch = launch_of("row_distances", width, student_AE.device)
    with _on(student_AE):
        row_distances[(spans,)](
            student_AE,
            teacher_AE,
            distances_A,
            cosines_A,
            statistics_A3,
            width,
            student_AE.stride(0),
            teacher_AE.stride(0),
            eps,
            1 / eps,
            HUBER=huber,
            **launch.options,
        )
    return distances_A, cosines_A, statistics_A3


def row_distance_gradient(
    student_AE: Tensor, teacher_AE: Tensor, statistics_A3: Tensor, upstream_A: Tensor, kind: str, eps: float
) -> Tensor:
    """[A, E] of the student's dtype, as `reference.row_distance_gradient`; `upstream_A` may be expanded."""
    huber = reference.is_smooth_l1(kind)
    if student_AE.dtype == torch.float64:
        return reference.row_distance_gradient(student_AE, teacher_AE, statistics_A3, upstream_A, kind, eps)
    student_AE, teacher_AE = _rows_dense(student_AE), _rows_dense(teacher_AE)
    spans, width = student_AE.shape
    gradient_AE = torch.empty(spans, width, dtype=student_AE.dtype, device=student_AE.device)
    if not gradient_AE.numel():
        return gradient_AE
    launch = launch_of("row_distance_gradients", width, student_AE.device)
    with _on(student_AE):
        row_distance_gradients[(spans,)](
            student_AE,
            teacher_AE,
            statistics_A3.contiguous(),
            upstream_A,
            gradient_AE,
            width,
            student_AE.stride(0),
            teacher_AE.stride(0),
            upstream_A.stride(0),
            1 / eps,
            HUBER=huber,
            **launch.options,
        )
    return gradient_AE


def contrastive_nll(
    scores_CG: Tensor, own_C: Tensor, groups_C: Tensor, key_groups_G: Tensor, weights_C: Tensor | None
) -> Tensor:
    """[C] float32 negative log likelihoods, as `reference.contrastive_nll`.

    One difference, on which no caller may rely: without weights the scores are left unchanged, not masked.
    """
    if scores_CG.dtype == torch.float64:
        return reference.contrastive_nll(scores_CG, own_C, groups_C, key_groups_G, weights_C)
    return _softmax(scores_CG, own_C, weights_C, groups_C.contiguous(), key_groups_G.contiguous())


def _softmax(
    logits_CV: Tensor,
    targets_C: Tensor,
    weights_C: Tensor | None,
    groups_C: Tensor | None,
    class_groups_V: Tensor | None,
) -> Tensor:
    rows, classes = logits_CV.shape
    nll_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    if not rows:
        return nll_C
    dense_CV = _rows_dense(logits_CV)
    launch = launch_of("softmax_rows" if groups_C is None else "softmax_rows with groups", classes, logits_CV.device)
    with _on(logits_CV):
        softmax_rows[(rows,)](
            dense_CV,
            targets_C.contiguous(),
            nll_C if weights_C is None else weights_C.contiguous(),
            nll_C,
            nll_C if groups_C is None else groups_C,
            nll_C if class_groups_V is None else class_groups_V,
            classes,
            dense_CV.stride(0),
            HAS_WEIGHTS=weights_C is not None,
            HAS_GROUPS=groups_C is not None,
            PEEL=dense_CV.stride(0) % BODY_GRAIN.value != 0,
            **launch.options,
        )
    if dense_CV is not logits_CV and weights_C is not None:
        logits_CV.copy_(dense_CV)
    return nll_C


def _rows_dense(tensor: Tensor) -> Tensor:
    """The tensor if its last dimension is dense, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
