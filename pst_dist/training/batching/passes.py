"""Cuts the sequences of a global batch into forward passes of similar length, the same number on every rank.

A pass is padded to its longest sequence, so sequences of similar length share one. Which rows belong to a global batch
is decided in `order`, and the gradient is that of the whole batch, so a cut changes time and memory only: a resumed run
may have another cut, with another number of ranks or another budget. With dropout it also draws other masks, because
each pass takes the next numbers of the step's generator.
"""

# Letters in this file: N sequences, G groups of as many sequences as there are ranks

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pst_dist.arms import Arm
from pst_dist.config.schema import Config
from pst_dist.student.layout import forward_passes

_TOO_MANY = 2**40
"""The price of a pass, in tokens, where there shall be no more passes than the limits require."""

Place = tuple[int, int]
"""(sample, sequence of that sample), counted in the batch."""


@dataclass(frozen=True)
class ByLength:
    """How to cut by length."""

    tokens: int | None
    """Most tokens of a pass, padding included; a longer sequence has a pass of its own. None for no limit."""
    pass_tokens: int | None
    """The cost of one more pass, in tokens: passes are added as long as they save more padding than that. None for no
    more passes than the limits require."""
    padding_free: bool = False
    """Whether sequences are concatenated, so that a pass has as many tokens as its sequences."""

    @classmethod
    def of(cls, config: Config, pass_tokens: int | None, limit: int | None = None) -> ByLength | None:
        """What `train.micro_batch_tokens` asks for; None for passes of rows in the order in which they are drawn.

        `limit` is what `auto` stands for on this device.
        """
        asked = config.train.micro_batch_tokens
        if asked is None or config.loss.symmetric:  # there the rows of a pass are one another's candidates
            return None
        return cls(asked if isinstance(asked, int) else limit, pass_tokens, config.train.padding_free)


def length_passes(
    arm: Arm, sizes: Sequence[Sequence[tuple[int, int]]], cut: ByLength, *, world_size: int, rows: int
) -> Iterator[list[list[Place]]]:
    """Forward passes of a batch: for each, every rank's sequences, which may be none.

    `sizes` are (encoder tokens, decoder tokens) of each sample's sequences; a causal student has no encoder tokens.
    `rows` is the largest number of samples in a pass on one rank. Sequences with a rationale and those without are cut
    separately, as `forward_passes` does.
    """
    named = [[(sample, place) for place in range(len(own))] for sample, own in enumerate(sizes)]
    for places in forward_passes(arm, named):
        lengths_N2 = np.array([sizes[sample][place] for sample, place in places], dtype=np.int64)
        many = rows * len(places) // len(sizes)
        for ranks in cut_by_length(lengths_N2, cut, world_size=world_size, rows=many):
            yield [[places[index] for index in own] for own in ranks]


def cut_by_length(lengths_N2: np.ndarray, cut: ByLength, *, world_size: int, rows: int) -> list[list[list[int]]]:
    """The cheapest cut: for each pass, every rank's indices into the sequences; at most `rows` a rank and pass.

    The sequences are sorted, longest first, and dealt out to the ranks in groups, in turn from the first rank and from
    the last. So all ranks can be cut at the same groups, and their passes are nearly equally long. Only the last group
    may lack sequences, so an empty pass occurs only where there are fewer sequences than ranks and passes.
    """
    order = np.argsort(-lengths_N2.sum(1), kind="stable")
    groups = [order[first : first + world_size] for first in range(0, len(order), world_size)]
    longest_G2 = np.stack([lengths_N2[group].max(0) for group in groups])
    ends = _cheapest_ends(longest_G2, cut, rows)
    passes = []
    for first, end in zip([0, *ends], ends, strict=False):
        ranks: list[list[int]] = [[] for _ in range(world_size)]
        for number in range(first, end):
            for place, index in enumerate(groups[number].tolist()):
                ranks[place if number % 2 == 0 else world_size - 1 - place].append(index)
        passes.append(ranks)
    return passes


def _cheapest_ends(longest_G2: np.ndarray, cut: ByLength, rows: int) -> list[int]:
    """Where passes end (exclusive) so that their padded tokens and the prices of the passes sum to the least.

    Dynamic programming over the groups in order: the least cost of the first k groups, for each k.
    """
    count = len(longest_G2)
    price = _TOO_MANY if cut.pass_tokens is None else cut.pass_tokens
    cost = np.zeros(count + 1, dtype=np.int64)
    begins = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        least = max(0, end - rows)
        # Entry k: the pass contains the last k + 1 groups before `end`.
        lengths_K2 = longest_G2[least:end][::-1]
        if cut.padding_free:
            padded = np.cumsum(lengths_K2.sum(1))
        else:
            padded = np.maximum.accumulate(lengths_K2, axis=0).sum(1) * np.arange(1, end - least + 1)
        if cut.tokens is not None:
            fits = padded <= cut.tokens
            fits[0] = True
            padded = padded[fits]
            before = cost[least:end][::-1][fits]
        else:
            before = cost[least:end][::-1]
        totals = before + padded + price
        # Of equally cheap cuts the one with the largest last pass.
        best = len(totals) - 1 - int(np.argmin(totals[::-1]))
        cost[end], begins[end] = totals[best], end - 1 - best
    ends = []
    at = count
    while at:
        ends.append(at)
        at = int(begins[at])
    return ends[::-1]
