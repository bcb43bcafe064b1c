"""InfoNCE with candidates from all ranks: gathering with the correct gradient, and both directions of the loss.

Student to teacher: each local student is compared with the teachers of the whole global batch (and any further keys,
such as a bank). These are frozen and available on every rank, so nothing is communicated and the gradient is exact.
Teacher to student: each local student's own teacher is compared with the students of all ranks. These must be gathered
with their gradient, because a rank's students are also candidates in the losses of other ranks.

Every loss here belongs to a local row. Summed over ranks, losses and gradients are those of the global batch: a rank's
loss is its share of the global one. Engines that average over ranks (DDP, DeepSpeed) must undo the averaging, as ours
do. Two common alternatives get this wrong and are not offered. Gathering without a gradient misses the other ranks'
part. Splicing the local rows into a gathered batch and computing the global loss on every rank gives each rank only the
gradient of its own rows, which averaging then divides by the number of ranks.
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
    """([G, E] rows of all ranks in rank order, [G] bool, false for padding), differentiable.

    Each rank's part is padded with zeros to `capacity` rows, the same on all ranks and known on the host, so that no
    sync with the device is needed; a rank may have fewer rows or none. The gradient of a local row is the sum over all
    ranks' losses. With a single rank or no process group, the rows are returned unchanged.

    Collective, and so is its backward pass: if rows require a gradient on one rank, they must on every rank (even an
    empty tensor), and every rank must run backward. Raises ValueError for more rows than capacity, on that rank only.
    """
    if len(rows_AE) > capacity:
        raise ValueError(f"{len(rows_AE)} rows exceed the capacity of {capacity} rows per rank")
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
        # Summed in the wide dtype, since there is one term per rank. Our part of the sum is a slice; a reduce-scatter
        # would move half as much data, but gloo has none in some versions of torch.
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

    Student to teacher, row i's candidates are all K keys: the teachers of the whole global batch, in the same order on
    all ranks (own_A are this rank's), and any further keys. Teacher to student, its candidates are the students that
    the ranks pass to this call: with gradient accumulation those of one micro-batch. So this direction, unlike the
    first, depends on how a batch is split. Both exclude candidates of a row's own group, except its own.

    The keys are frozen. Pass unit vectors as for `info_nce`; ranks, capacity and backward pass are as in `gather_rows`.
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
    """[W * rows, ...]: the tensors of all ranks, which must have the same shape, concatenated in rank order."""
    everyone = rows.new_empty(dist.get_world_size(), *rows.shape)
    dist.all_gather(list(everyone.unbind()), rows.contiguous())
    return everyone.flatten(0, 1)
