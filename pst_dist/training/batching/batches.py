"""From token sequences to the tensors of one forward pass on one rank.

`student.layout` makes the sequences, and `training.batching.step_batches` decides which of them go through the student
together.
"""

# Shapes in this file: B sequences, T tokens, N supervised tokens, A aligned spans, E teacher width, G global keys

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pst_dist.arms import Segment
from pst_dist.config.schema import LossConfig
from pst_dist.kernels.spans import Spans, Supervised
from pst_dist.student.layout import Sequence as TokenSequence


@dataclass(frozen=True)
class PSTBatch:
    """One forward pass on one rank. Its index maps are built on the CPU, so building them never waits for a GPU."""

    input_ids: Tensor
    """[B, T] int64: prompt and target of a causal student, start token and target of a decoder."""
    attention_mask: Tensor
    """[B, T] int64: 1 for a token, 0 for padding."""
    segment_ids: Tensor
    """[B, T] int64 of `Segment`."""
    encoder_input_ids: Tensor | None
    """[B, S] int64 prompts of an encoder-decoder student."""
    encoder_attention_mask: Tensor | None
    """[B, S] int64."""
    supervised: Supervised
    """The N hidden states that predict supervised tokens (as row * T + position), and those tokens."""
    is_answer: Tensor
    """[N] bool: true for a token of the answer, false for one of the rationale."""
    spans: Spans
    """A aligned spans."""
    teacher_emb: Tensor
    """[A, E] float32, unit length."""
    keys: Tensor
    """[G, E] float32: for InfoNCE, teacher embeddings of the global batch and any extra negatives; otherwise empty."""
    key_groups: Tensor
    """[G] int64: equal for rows of the same question, which are never negatives of one another."""
    key_index: Tensor
    """[A] int64: index of each span's positive key."""
    capacity: int
    """Most spans that any rank's batch may hold in this pass."""
    sample_ids: tuple[str, ...]
    """Ids in row order."""
    position_ids: Tensor | None = None
    """[1, T] int64 with `train.padding_free`, which concatenates the sequences: B is 1, there is no padding, and the
    positions begin at 0 in each sequence. None for padded sequences."""

    @property
    def counts(self) -> Tensor:
        """[3] float64: answer tokens, rationale tokens, aligned spans."""
        answers = int(self.is_answer.sum())
        return torch.tensor([answers, self.is_answer.numel() - answers, len(self.spans)], dtype=torch.float64)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and target together; empty in a pass without samples."""
        if not self.counts.any():
            return []
        if self.position_ids is not None:
            begins = [*(self.position_ids[0] == 0).nonzero().flatten().tolist(), self.position_ids.shape[1]]
            return [end - begin for begin, end in itertools.pairwise(begins)]
        each = self.attention_mask.sum(1)
        if self.encoder_attention_mask is not None:
            each = each + self.encoder_attention_mask.sum(1)
        return each.tolist()

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, without those of an encoder; 0 in a pass without samples."""
        return int(self.attention_mask.sum()) if self.counts.any() else 0

    @property
    def positions(self) -> Tensor:
        """[2] float64: the positions that the student computes, with those of an encoder, and how many are padding.

        In a pass without samples all are padding.
        """
        masks = [mask for mask in (self.attention_mask, self.encoder_attention_mask) if mask is not None]
        computed = sum(mask.numel() for mask in masks)
        used = sum(int(mask.sum()) for mask in masks) if self.counts.any() else 0
        return torch.tensor([computed, computed - used], dtype=torch.float64)

    def to(self, device: torch.device) -> PSTBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            item.name: _moved(value, device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), (Tensor, Spans, Supervised))
        }
        return replace(self, **moved)


def _moved(value: Tensor | Spans | Supervised, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)


class TeacherVectors(Protocol):
    """What the collator needs from the embeddings: a vector by sample id and rationale index."""

    dimension: int

    def vector(self, sample_id: str, rationale: int) -> np.ndarray:
        """[E] float32, unit length, as the loss uses it."""
        ...


class Collator:
    """Pads token sequences to a `PSTBatch` and builds the index maps from hidden states to loss terms."""

    def __init__(
        self,
        *,
        loss: LossConfig,
        pad_id: int,
        decoder_start_id: int | None = None,
        teacher: TeacherVectors | None = None,
        capacity: int = 0,
        padding_free: bool = False,
    ) -> None:
        """`decoder_start_id` is for encoder-decoders; None for a causal student.

        `capacity` is the largest number of rows in a forward pass; 0 takes the number of rows given. `padding_free`
        concatenates the sequences of a pass instead of padding them; causal students only.
        """
        self.padding_free = padding_free
        self.capacity = capacity
        self.loss, self.pad_id = loss, pad_id
        self.decoder_start_id, self.teacher = decoder_start_id, teacher
        self._keys: tuple[Sequence[tuple[str, int]], Tensor] | None = None

    def __call__(
        self,
        sequences: Sequence[TokenSequence],
        *,
        keys: Sequence[tuple[str, int]] = (),
        key_groups: Sequence[int] = (),
        muted: bool = False,
    ) -> PSTBatch:
        """Collate; `muted` sequences carry no loss (a rank without samples still runs its forward pass).

        `keys` are (sample id, rationale index) of the global batch, `key_groups` their question groups.
        """
        start = self.decoder_start_id
        heads = [sequence.prompt_ids if start is None else [start] for sequence in sequences]
        ids: list[int] = []
        segments: list[int] = []
        for head, sequence in zip(heads, sequences, strict=True):
            ids += head + sequence.target_ids
            segments += [Segment.PROMPT] * len(head) + sequence.segments
        lengths = [len(head) + len(sequence.target_ids) for head, sequence in zip(heads, sequences, strict=True)]
        used_BT = np.ones((1, sum(lengths)), dtype=bool) if self.padding_free else _used(lengths)
        # L: the tokens of all sequences, one sequence after another, without padding.
        ids_L, segments_L = np.array(ids), np.fromiter(segments, np.int64, len(segments))
        owners_L, places_L = np.repeat(np.arange(len(lengths)), lengths), np.flatnonzero(used_BT)
        segments_BT = _filled(used_BT, segments_L, Segment.PAD)
        learnt_L = np.zeros(len(ids), dtype=bool)
        spans: list[tuple[int, int, int]] = []
        owners: list[int] = []
        if not muted:
            learnt_L = segments_L == Segment.ANSWER
            if self.loss.rationale_weight > 0:
                learnt_L |= segments_L == Segment.RATIONALE
            if self.teacher is not None:
                spans, owners = self._spans(segments_L, owners_L, places_L, used_BT.shape[1])
        encoder = (None, None) if start is None else _pad([one.prompt_ids for one in sequences], self.pad_id)
        teacher, key_matrix, key_index = self._teacher_tensors(
            [(sequences[owner].sample_id, sequences[owner].rationale) for owner in owners], keys
        )
        return PSTBatch(
            input_ids=torch.from_numpy(_filled(used_BT, ids_L, self.pad_id)),
            attention_mask=torch.from_numpy((segments_BT != Segment.PAD).astype(np.int64)),
            segment_ids=torch.from_numpy(segments_BT),
            encoder_input_ids=encoder[0],
            encoder_attention_mask=encoder[1],
            # The hidden state one place before a token predicts it.
            supervised=Supervised.of(places_L[learnt_L] - 1, ids_L[learnt_L], positions=used_BT.size),
            is_answer=torch.from_numpy(segments_L[learnt_L] == Segment.ANSWER),
            spans=Spans.of(spans, batch=used_BT.shape[0], length=used_BT.shape[1]),
            teacher_emb=teacher,
            keys=key_matrix,
            key_groups=torch.tensor(list(key_groups) if len(key_matrix) else [], dtype=torch.int64),
            key_index=key_index,
            capacity=self.capacity or len(sequences),
            sample_ids=tuple(sequence.sample_id for sequence in sequences),
            position_ids=_positions(lengths) if self.padding_free else None,
        )

    def size_of(self, sequence: TokenSequence) -> tuple[int, int]:
        """(encoder tokens, decoder tokens) of a sequence; a causal student has no encoder."""
        if self.decoder_start_id is not None:
            return len(sequence.prompt_ids), 1 + len(sequence.target_ids)
        return 0, len(sequence.prompt_ids) + len(sequence.target_ids)

    def _spans(
        self, segments_L: np.ndarray, owners_L: np.ndarray, places_L: np.ndarray, length: int
    ) -> tuple[list[tuple[int, int, int]], list[int]]:
        """(row, first position, number of positions) of each aligned span, and the index of its sequence.

        A sequence has no span when truncation removed its whole rationale.
        """
        wanted = np.flatnonzero(segments_L == (Segment.SEMANTIC if self.loss.pooling == "token" else Segment.RATIONALE))
        owners, firsts, counts = np.unique(owners_L[wanted], return_index=True, return_counts=True)
        rows, starts = np.divmod(places_L[wanted[firsts]], length)
        return list(zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True)), owners.tolist()

    def _teacher_tensors(
        self, owners: list[tuple[str, int]], keys: Sequence[tuple[str, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.teacher is None:
            return torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)
        width = self.teacher.dimension
        teacher = self._vectors(owners)
        if self.loss.alignment != "info_nce":
            return teacher, torch.zeros(0, width), torch.zeros(0, dtype=torch.int64)
        place = {key: index for index, key in enumerate(keys)}
        index = torch.tensor([place[owner] for owner in owners], dtype=torch.int64)
        return teacher, self._key_matrix(keys), index

    def _key_matrix(self, keys: Sequence[tuple[str, int]]) -> Tensor:
        """[G, E] float32; the passes of a step share their keys, so the vectors are read only once."""
        if self._keys is None or self._keys[0] is not keys:
            self._keys = keys, self._vectors(keys)
        return self._keys[1]

    def _vectors(self, owners: Sequence[tuple[str, int]]) -> Tensor:
        assert self.teacher is not None
        if not owners:
            return torch.zeros(0, self.teacher.dimension)
        many = getattr(self.teacher, "vectors", None)
        found = many(owners) if many else np.stack([self.teacher.vector(name, index) for name, index in owners])
        return torch.from_numpy(found).float()


def _used(lengths: Sequence[int]) -> np.ndarray:
    """[B, T] bool: the positions that are not padding, where rows of these lengths are padded on the right."""
    return np.arange(max(lengths)) < np.array(lengths)[:, None]


def _filled(used_BT: np.ndarray, values_L: np.ndarray | list[int], padding: int) -> np.ndarray:
    """[B, T] int64: the values in the used positions, and `padding` in the others."""
    filled_BT = np.full(used_BT.shape, padding, dtype=np.int64)
    filled_BT[used_BT] = values_L
    return filled_BT


def _positions(lengths: Sequence[int]) -> Tensor:
    """[1, T] int64: the position of each token in its sequence, where sequences of these lengths are concatenated."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def _pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, S] ids padded on the right, and their [B, S] mask."""
    used_BS = _used([len(row) for row in rows])
    ids_BS = _filled(used_BS, [token for row in rows for token in row], pad_id)
    return torch.from_numpy(ids_BS), torch.from_numpy(used_BS.astype(np.int64))
