"""Gradients of InfoNCE across ranks, by the ways of gathering: `torchrun … tests/helpers/gather_ranks.py out.pt 5,2 …`.

Each further argument gives the number of rows of each rank; the data comes from `problem`, with that many rows in all.
Rank zero writes {(rows, way): (losses of all rows, gradient)} with the losses in rank order and the gradients of the
one shared weight summed over ranks. Starting ranks is slow, so one launch runs all ways.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pst_dist.distributed.ranks import Ranks, leave, process_group
from pst_dist.kernels.contrastive import info_nce
from pst_dist.kernels.gather import gather_rows, symmetric_info_nce

TEMPERATURE = 0.2
WIDTHS = (6, 4)
"""Of a student's input and of its vectors."""
BANK = 5
"""Teacher keys that are no row's own."""


def problem(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(inputs [N, 6], teacher keys [N + BANK, 4], groups of the keys, weight [4, 6]) in float64, for N rows.

    Row i's own key is key i; some rows share a group with others or with a key of the bank.
    """
    draw = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, WIDTHS[0], generator=draw, dtype=torch.float64)
    keys = F.normalize(torch.randn(rows + BANK, WIDTHS[1], generator=draw, dtype=torch.float64), dim=-1)
    groups = torch.arange(rows + BANK) % max(2, rows - 2)
    return inputs, keys, groups, torch.randn(WIDTHS[1], WIDTHS[0], generator=draw, dtype=torch.float64)


def students(inputs: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(inputs @ weight.T, dim=-1)


class Part:
    """What one rank has: its rows, and a weight of its own to be learnt."""

    def __init__(self, sizes: list[int], rank: int) -> None:
        inputs, self.keys, self.groups, weight = problem(sum(sizes))
        self.first, self.rows, self.rank = sum(sizes[:rank]), sizes[rank], rank
        self.here = slice(self.first, self.first + self.rows)
        self.own = torch.arange(self.first, self.first + self.rows)
        self.weight, self.capacity = weight.requires_grad_(), max(sizes)
        self.inputs, self.total = inputs[self.here], sum(sizes)
        self.students = students(self.inputs, self.weight)


def to_teachers(part: Part) -> Tensor:
    """Student to teacher; the teachers of the batch are gathered, without a gradient."""
    batch_keys, valid = gather_rows(part.keys[part.here], capacity=part.capacity)
    batch_groups, _ = gather_rows(part.groups[part.here], capacity=part.capacity)
    assert not batch_keys.requires_grad
    own = part.rank * part.capacity + torch.arange(part.rows)
    keys = (part.students, batch_keys, own, part.groups[part.here], batch_groups)
    return info_nce(*keys, temperature=TEMPERATURE, valid_G=valid)


def symmetric(part: Part) -> Tensor:
    """Both directions: the right one."""
    return symmetric_info_nce(
        part.students,
        part.keys,
        part.own,
        part.groups[part.here],
        part.groups,
        temperature=TEMPERATURE,
        capacity=part.capacity,
    )


def averaged_by_ddp(part: Part) -> Tensor:
    """Both directions on a module under DistributedDataParallel, whose averaging is undone by a factor."""
    linear = nn.Linear(*WIDTHS, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(part.weight.detach())
    model = nn.parallel.DistributedDataParallel(linear)
    part.students = F.normalize(model(part.inputs), dim=-1)
    losses = symmetric(part)
    (losses.sum() * dist.get_world_size()).backward()
    # Every rank has the whole gradient now; shares of it, to be added up like the others'.
    part.weight.grad = linear.weight.grad / dist.get_world_size()
    return losses.detach()


def without_gradient(part: Part) -> Tensor:
    """WRONG, as open_clip's local loss without gather_with_grad: the other ranks' students are constants."""
    everyone, _ = gather_rows(part.students.detach(), capacity=part.capacity)
    everyone = everyone[: part.total]
    to_students = _full(part.keys[: part.total][part.own], everyone, part.own, part.groups)
    return 0.5 * (_full(part.students, part.keys, part.own, part.groups) + to_students)


def spliced(part: Part) -> Tensor:
    """WRONG, as open_clip's default: every rank computes the whole loss, with its own rows put into a gathered batch.

    Each rank's loss is the global one, not a share; averaged over ranks (the losses are divided here) it is right,
    its gradient is not.
    """
    everyone, _ = gather_rows(part.students.detach(), capacity=part.capacity)
    everyone = torch.cat([everyone[: part.first], part.students, everyone[part.first + part.rows : part.total]])
    own = torch.arange(part.total)
    to_teachers = _full(everyone, part.keys, own, part.groups)
    losses = 0.5 * (to_teachers + _full(part.keys[: part.total], everyone, own, part.groups))
    return losses / dist.get_world_size()


def _full(queries: Tensor, keys: Tensor, own: Tensor, groups: Tensor) -> Tensor:
    scores = queries @ keys.T / TEMPERATURE
    same = groups[own][:, None] == groups[None, : len(keys)]
    same[torch.arange(len(own)), own] = False
    return F.cross_entropy(scores.masked_fill(same, -math.inf), own, reduction="none")


WAYS = (to_teachers, symmetric, averaged_by_ddp, without_gradient, spliced)


def main() -> None:
    ranks, results = Ranks.from_environment(), {}
    with process_group(ranks, with_deepspeed=False):
        for case in sys.argv[2:]:
            sizes = [int(size) for size in case.split(",")]
            for way in WAYS:
                if way in (without_gradient, spliced) and len(set(sizes)) > 1:
                    continue
                part = Part(sizes, ranks.rank)
                losses = way(part)
                if losses.requires_grad:
                    losses.sum().backward()
                dist.all_reduce(part.weight.grad)
                gathered = [None] * ranks.world_size
                dist.all_gather_object(gathered, losses.detach())
                results[case, way.__name__] = (torch.cat(gathered), part.weight.grad)
        if ranks.is_main:
            torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
    leave(0)
