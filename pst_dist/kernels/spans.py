"""Positions of the losses in a batch of hidden states: rows with cross-entropy, and rows that form a pooled span.

Both maps are built on the CPU with the batch, in both directions. The kernel that writes the gradient of the hidden
state looks up each row's contributions, so it writes every row once, without atomics or a search.
"""

# Shapes in this file: B sequences, T positions, N supervised rows, A spans

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pst_dist.errors import InputError

NOWHERE = -1
"""In the maps from rows: this row has no cross-entropy, or is in no span."""


@dataclass(frozen=True)
class Spans:
    """Ragged spans of a [B, T] batch; no two share a position."""

    rows: Tensor
    """[A] int64: the sequence of each span."""
    starts: Tensor
    """[A] int64: its first position."""
    lengths: Tensor
    """[A] int64: its number of positions; 0 pools to a zero vector."""
    owner: Tensor
    """[B * T] int32: the span that contains a position, or NOWHERE."""
    longest: int
    """The largest length; known on the host, so that launching a kernel needs no sync with the device."""

    @classmethod
    def of(cls, places: Sequence[tuple[int, int, int]], *, batch: int, length: int) -> Spans:
        """From (sequence, first position, positions) triples.

        Raises InputError for a span outside [batch, length] and for two that overlap.
        """
        owner_BT = np.full((batch, length), NOWHERE, dtype=np.int32)
        for index, (row, start, count) in enumerate(places):
            if not (0 <= row < batch and 0 <= start and 0 <= count and start + count <= length):
                raise InputError(f"span {index} at ({row}, {start}) of {count} is outside a [{batch}, {length}] batch")
            taken = owner_BT[row, start : start + count]
            if (taken != NOWHERE).any():
                raise InputError(f"spans {int(taken.max())} and {index} of sequence {row} overlap")
            taken[:] = index
        columns = torch.tensor(places, dtype=torch.int64).reshape(len(places), 3).T.contiguous()
        longest = max((place[2] for place in places), default=0)
        return cls(columns[0], columns[1], columns[2], torch.from_numpy(owner_BT.reshape(-1)), longest)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Spans:
        """The same spans on another device."""
        rows, starts, lengths, owner = (
            tensor.to(device, non_blocking=True) for tensor in (self.rows, self.starts, self.lengths, self.owner)
        )
        return Spans(rows, starts, lengths, owner, self.longest)


@dataclass(frozen=True)
class Supervised:
    """The rows of a [B, T] batch with cross-entropy."""

    rows: Tensor
    """[N] int64: indices into the flattened batch, without duplicates."""
    slots: Tensor
    """[B * T] int32: the inverse, an index into `rows` or NOWHERE."""
    targets: Tensor
    """[N] int64 token ids."""

    @classmethod
    def of(cls, rows: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, *, positions: int) -> Supervised:
        """From rows of a batch of `positions` = B * T and the token that each predicts.

        Raises InputError for a duplicate row (a hidden state predicts one token) and for one outside the batch.
        """
        picked_N, tokens_N = np.array(rows, dtype=np.int64), np.array(targets, dtype=np.int64)
        if picked_N.size and not (0 <= picked_N.min() and picked_N.max() < positions):
            first, last = int(picked_N.min()), int(picked_N.max())
            raise InputError(f"supervised rows {first} … {last} are outside a batch of {positions} positions")
        slots = np.full(positions, NOWHERE, dtype=np.int32)
        slots[picked_N] = np.arange(picked_N.size, dtype=np.int32)
        if np.count_nonzero(slots != NOWHERE) != picked_N.size:
            raise InputError("duplicate supervised row: each hidden state predicts one token")
        return cls(torch.from_numpy(picked_N), torch.from_numpy(slots), torch.from_numpy(tokens_N))

    def to(self, device: torch.device) -> Supervised:
        """The same rows on another device."""
        return Supervised(*(x.to(device, non_blocking=True) for x in (self.rows, self.slots, self.targets)))
