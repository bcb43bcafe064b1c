"""The kernels in plain PyTorch: the definition of each kernel, and the implementation for CPUs.

Every function here has a Triton counterpart of the same name and arguments in `triton_backend`; `dispatch` selects one
of the two modules. float64 inputs give float64 results, to which tests compare the kernels; every other dtype is summed
in float32. Nothing here builds an autograd graph: gradients are separate functions, connected in `ops` and `head`.
"""

# Shapes in this file: B sequences, T positions, D student width, N supervised rows, V vocabulary, A spans,
# E teacher width, C rows of a chunk, G keys

from __future__ import annotations

import torch
from torch import Tensor

from pst_dist.kernels.spans import NOWHERE

name = "reference"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for itself, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def span_mean(hidden_BTD: Tensor, rows_A: Tensor, starts_A: Tensor, lengths_A: Tensor, longest: int) -> Tensor:
    """[A, D] means over spans, float32 (float64 for float64); positions outside every span are never read.

    A span of length 0 gives zeros. `longest` is the largest length; only kernels need it.
    """
    owner = torch.repeat_interleave(torch.arange(len(rows_A), device=rows_A.device), lengths_A)
    first = torch.cumsum(lengths_A, 0) - lengths_A
    positions = torch.arange(len(owner), device=rows_A.device) - first[owner] + starts_A[owner]
    picked = hidden_BTD[rows_A[owner], positions].to(wide(hidden_BTD.dtype))
    # Spans are summed one by one in a fixed order: no atomics, and the same bits however the batch is packed.
    sums = torch.segment_reduce(picked, "sum", lengths=lengths_A, unsafe=True, initial=0)
    return sums / lengths_A.clamp(min=1)[:, None]


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
    """[B, T, D] of `like`'s dtype: the gradient of the hidden state, each position written once.

    Position t receives base[t] + rows_upstream * rows_gradient[slots[t]] + spans_gradient[owner[t]] / lengths[owner[t]]
    summed in the wide dtype; parts that are None or NOWHERE contribute nothing. `rows_upstream` is a [] tensor. Only
    shape, dtype and device of `like` are used.
    """
    shape, dtype = like_BTD.shape, wide(like_BTD.dtype)
    width = shape[-1]
    if base_BTD is None:
        gradient = torch.zeros(shape, dtype=like_BTD.dtype, device=like_BTD.device).view(-1, width)
    else:
        gradient = base_BTD.to(like_BTD.dtype, copy=True).contiguous().view(-1, width)
    touched = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
    if rows_gradient_ND is not None and slots_R is not None:
        touched |= slots_R != NOWHERE
    if spans_gradient_AD is not None and len(lengths_A):
        touched |= owner_R != NOWHERE
    places = touched.nonzero()[:, 0]
    values = gradient[places].to(dtype)
    if rows_gradient_ND is not None and slots_R is not None and len(rows_gradient_ND):
        slot = slots_R[places].long()
        scaled = rows_gradient_ND.to(dtype) if rows_upstream is None else rows_gradient_ND.to(dtype) * rows_upstream
        values += torch.where((slot != NOWHERE)[:, None], scaled[slot.clamp(min=0)], 0)
    if spans_gradient_AD is not None and len(lengths_A):
        span = owner_R[places].long()
        share = spans_gradient_AD.to(dtype) / lengths_A.clamp(min=1)[:, None]
        values += torch.where((span != NOWHERE)[:, None], share[span.clamp(min=0)], 0)
    gradient[places] = values.to(gradient.dtype)
    return gradient.view(shape)


def softmax_nll(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor | None) -> Tensor:
    """[C] negative log likelihoods in nats, in the wide dtype.

    With weights the logits are overwritten by the gradient of sum(weights * nll) to them, in their own dtype.
    """
    scores = logits_CV.to(wide(logits_CV.dtype))
    if weights_C is None:
        return torch.logsumexp(scores, -1) - scores.gather(1, targets_C[:, None])[:, 0]
    normaliser = torch.logsumexp(scores, -1)
    nll = normaliser - scores.gather(1, targets_C[:, None])[:, 0]
    weights = weights_C.to(scores.dtype)
    probabilities = scores.sub_(normaliser[:, None]).exp_().mul_(weights[:, None])
    probabilities.scatter_add_(1, targets_C[:, None], -weights[:, None])
    if probabilities.data_ptr() != logits_CV.data_ptr():
        logits_CV.copy_(probabilities)
    return nll


def is_smooth_l1(kind: str) -> bool:
    """True for `smooth_l1`, False for `cosine`, the two row distances. Raises ValueError for any other name."""
    if kind not in ("cosine", "smooth_l1"):
        raise ValueError(f"unknown row distance {kind!r}: use 'cosine' or 'smooth_l1'")
    return kind == "smooth_l1"


def row_distance(student_AE: Tensor, teacher_AE: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(distances [A], cosines [A], statistics [A, 3]) of rows and their teachers, in the wide dtype.

    Vectors are divided by max(norm, eps) first. `cosine`: 1 - cos; `smooth_l1`: Huber distance with beta 1, summed
    over E. The statistics are (cosine, 1 / norm of the student, 1 / norm of the teacher), for the gradient. Raises
    ValueError for any other kind.
    """
    smooth_l1 = is_smooth_l1(kind)
    student, teacher = student_AE.to(wide(student_AE.dtype)), teacher_AE.to(wide(student_AE.dtype))
    # Clamped after the division, so that a short vector has exactly 1 / eps, by which the gradient recognises it.
    inverse_student = (1 / torch.linalg.vector_norm(student, dim=-1)).clamp(max=1 / eps)
    inverse_teacher = (1 / torch.linalg.vector_norm(teacher, dim=-1)).clamp(max=1 / eps)
    unit_student, unit_teacher = student * inverse_student[:, None], teacher * inverse_teacher[:, None]
    cosine = (unit_student * unit_teacher).sum(-1)
    if smooth_l1:
        gap = (unit_student - unit_teacher).abs()
        distance = torch.where(gap < 1, 0.5 * gap * gap, gap - 0.5).sum(-1)
    else:
        distance = 1 - cosine
    return distance, cosine, torch.stack([cosine, inverse_student, inverse_teacher], -1)


def row_distance_gradient(
    student_AE: Tensor, teacher_AE: Tensor, statistics_A3: Tensor, upstream_A: Tensor, kind: str, eps: float
) -> Tensor:
    """[A, E] of the student's dtype: gradient of sum(upstream * distance) to the student's vectors.

    A student shorter than eps is divided by the constant eps, so its gradient has no component along the vector. Raises
    ValueError for an unknown kind.
    """
    smooth_l1 = is_smooth_l1(kind)
    dtype = wide(student_AE.dtype)
    inverse_student, inverse_teacher = statistics_A3[:, 1:2], statistics_A3[:, 2:3]
    unit_student, unit_teacher = student_AE.to(dtype) * inverse_student, teacher_AE.to(dtype) * inverse_teacher
    pull = (unit_student - unit_teacher).clamp(-1, 1) if smooth_l1 else -unit_teacher
    along = (pull * unit_student).sum(-1, keepdim=True) * (inverse_student < 1 / eps)
    gradient = (pull - along * unit_student) * inverse_student * upstream_A.to(dtype)[:, None]
    return gradient.to(student_AE.dtype)


def contrastive_nll(
    scores_CG: Tensor, own_C: Tensor, groups_C: Tensor, key_groups_G: Tensor, weights_C: Tensor | None
) -> Tensor:
    """[C] negative log likelihoods of each row's own key among the keys; `softmax_nll` with a group mask.

    Keys of a row's own group, except its own key, are excluded (they are paraphrases, not negatives). The mask
    overwrites `scores`; with weights, the gradient of sum(weights * nll) overwrites them.
    """
    others = key_groups_G[None, :] == groups_C[:, None]
    others.scatter_(1, own_C[:, None], False)
    return softmax_nll(scores_CG.masked_fill_(others, float("-inf")), own_C, weights_C)
