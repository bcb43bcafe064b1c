"""InfoNCE whose candidates come from all ranks: gathering with the right gradient, and both directions of the loss.

Student to teacher, each local student is compared with the teachers of the whole global batch (and any more keys,
say of a bank). Those are frozen and at hand on every rank, so nothing is communicated, and the gradient is exact.
Teacher to student, each local student's own teacher is compared with the students of all ranks. They must be gathered
with their gradient, as a rank's students are candidates of the other ranks' losses too.

Every loss here belongs to a local row. Added up over ranks the losses are the global batch's, and so are the
gradients: a rank's loss is its share of the global one. Engines that average over ranks (DDP, DeepSpeed) must have
that undone, as ours do. Two customs that fail this are not offered: gathering without a gradient misses the other
ranks' part of it; splicing the local rows into a gathered batch and computing the global loss on every rank gives
each rank its rows' gradient only, which averaging then divides by the number of ranks.
"""

# Shapes in this file: A local rows, W ranks, G = W * capacity gathered rows, K keys, E width

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pst_dist.kernels.contrastive import info_nce
from pst_dist.kernels.reference import wide


def gather_rows(rows_AE: Tensor, *, capacity: int) -> tuple[Tensor, Tensor]:
    """([G, E] rows of all ranks in rank order, [G] bool whether one is there), differentiable.

    Each rank's part is padded with zeros to `capacity` rows, one number on all ranks and known on the host, so that
    nothing waits for the device; a rank may have fewer rows or none. The gradient of a local row is the sum of what
    all ranks' losses say about it. Without a process group, or alone in one, the rows come back as they are.

    Collective, and so is its backward pass: if rows require a gradient anywhere they must on every rank (an empty
    tensor may), and every rank must run backward. Raises ValueError for more rows than capacity, on that rank alone.
    """
    if len(rows_AE) > capacity:
        raise ValueError(f"{len(rows_AE)} rows do not fit a capacity of {capacity} rows a rank")
    if _ranks() == 1:
        return rows_AE, torch.ones(len(rows_AE), dtype=torch.bool, device=rows_AE.device)
    count = torch.full((1,), len(rows_AE), dtype=torch.int64, device=rows_AE.device)
    valid_WC = torch.arange(capacity, device=rows_AE.device)[None, :] < _gathered(count)[:, None]
    return _GatherRows.apply(rows_AE, capacity), valid_WC.flatten()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_AE: Tensor, capacity: int) -> Tensor:
        ctx.rows, ctx.first = len(rows_AE), dist.get_rank() * capacity
        return _gathered(_padded(rows_AE, capacity))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_GE: Tensor) -> tuple[Tensor, None]:
        # Added up in the wide dtype, as there are as many terms as ranks. Of the sum a slice is ours; a reduce-scatter
        # would move half as much, but gloo has none in some versions of torch.
        total_GE = gradient_GE.to(wide(gradient_GE.dtype), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total_GE)
        return total_GE[ctx.first : ctx.first + ctx.rows].to(gradient_GE.dtype), None


def symmetric_info_nce(
    students_AE: Tensor,
    keys_KE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_K: Tensor,
    *,
    temperature: float,
    capacity: int,
) -> Tensor:
    """[A] half the sum of both directions for each local row, float32 (float64 for float64); collective.

    Student to teacher, row i's candidates are all K keys: the teachers of the whole global batch, in one order on all
    ranks, of which own_A are this rank's, and perhaps more. Teacher to student, its candidates are the students that
    the ranks pass to this very call: with gradient accumulation those of one micro-batch, so that direction, unlike
    the first, depends on how a batch is cut. In both, candidates of a row's own group are left out, its own excepted.

    The keys are frozen; unit vectors as in `info_nce`; ranks, capacity and the backward pass as in `gather_rows`.
    """
    to_teachers_A = info_nce(students_AE, keys_KE.detach(), own_A, groups_A, key_groups_K, temperature=temperature)
    candidates_GE, valid_G = gather_rows(students_AE, capacity=capacity)
    alone = _ranks() == 1
    candidate_groups_G = groups_A if alone else _gathered(_padded(groups_A, capacity))
    first = 0 if alone else dist.get_rank() * capacity
    to_students_A = info_nce(
        keys_KE.detach()[own_A],
        candidates_GE,
        first + torch.arange(len(students_AE), device=students_AE.device),
        groups_A,
        candidate_groups_G,
        temperature=temperature,
        valid_G=None if alone else valid_G,
    )
    return 0.5 * (to_teachers_A + to_students_A)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _padded(rows: Tensor, capacity: int) -> Tensor:
    padded = rows.new_zeros(capacity, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _gathered(rows: Tensor) -> Tensor:
    """[W * rows, ...]: a tensor of one shape on all ranks, one rank's after the other's."""
    everyone = rows.new_empty(dist.get_world_size(), *rows.shape)
    dist.all_gather(list(everyone.unbind()), rows.contiguous())
    return everyone.flatten(0, 1)
