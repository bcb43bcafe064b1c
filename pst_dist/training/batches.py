"""From samples to batches: the collator, and the loader whose whole state is a step number.

The order of samples is a pure function of (seed, epoch, position), see `training.order`: step k's global batch is a
slice of the epoch's permutation, which `training.passes` cuts into forward passes. So resuming needs no replay, and the
world size never changes what is trained on.
"""

# Shapes in this file: B sequences, T tokens, N supervised tokens, A aligned spans, E teacher width, G global keys

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pst_dist.arms import Segment
from pst_dist.config.schema import LossConfig
from pst_dist.data.sample import ReasoningSample, question_group
from pst_dist.data.shards import SplitReader
from pst_dist.kernels.spans import Spans, Supervised
from pst_dist.student.layout import Layout, forward_passes
from pst_dist.student.layout import Sequence as TokenSequence
from pst_dist.training.order import OrderPlan, turn_of
from pst_dist.training.passes import ByLength, length_passes


@dataclass(frozen=True)
class PSTBatch:
    """One forward pass on one rank. All index maps are built on the CPU, so building them never syncs the device."""

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
    """[1, T] int64, which begin at 0 in each sequence: the sequences are concatenated, so B is 1 and nothing is padding
    (`train.padding_free`). None for padded sequences."""

    @property
    def counts(self) -> Tensor:
        """[3] float64: answer tokens, rationale tokens, aligned spans."""
        answers = int(self.is_answer.sum())
        return torch.tensor([answers, self.is_answer.numel() - answers, len(self.spans)], dtype=torch.float64)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and target together."""
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
        """Tokens of the sequences (of the decoder's, with an encoder); none in a pass without samples."""
        return int(self.attention_mask.sum()) if self.counts.any() else 0

    @property
    def positions(self) -> Tensor:
        """[2] float64: positions that the student computes, those of an encoder included, and those of them that are
        padding: all of them in a pass without samples."""
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
        """(row, first position, positions) of each aligned span, and the sequence that it belongs to.

        A sequence has none when truncation left no rationale to pool.
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
        """[G, E] float32; the passes of a step have the same keys, whose vectors are read once."""
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


_MOST_CACHED = 20_000
"""Rows whose tokens a training keeps, up to about 100 MB: tokenising anew each epoch costs a small student a tenth of
its step."""


class _Steps(Dataset[list[PSTBatch]]):
    """Step number -> this rank's micro-batches; runs in the loader's workers."""

    def __init__(
        self,
        plan: OrderPlan,
        samples: Sequence[ReasoningSample],
        layout: Layout,
        collate: Collator,
        *,
        rank: int,
        world_size: int,
        size: int,
        by_length: ByLength | None,
    ) -> None:
        self.plan, self.samples, self.layout, self.collate = plan, samples, layout, collate
        self.rank, self.world_size, self.size, self.by_length = rank, world_size, size, by_length
        self._sample = functools.lru_cache(maxsize=plan.global_batch_size)(samples.__getitem__)
        # A row whose tokens are cached is not read again: its id and number of rationales say which rationale it uses.
        self._named = functools.lru_cache(maxsize=_MOST_CACHED)(self._read_name)
        self._sequences: dict[tuple[int, int], list[TokenSequence]] = {}

    def __getitem__(self, step: int) -> list[PSTBatch]:
        epoch, indices = self.plan.epoch_of(step), self.plan.global_batch(step).tolist()
        keys, groups = self._candidates(step, indices, epoch)
        if self.by_length is not None:
            passes = self._length_passes(self.by_length, self._laid_out(indices, epoch))
        else:
            passes = self._drawn_passes(step, indices, epoch)
        return [self.collate(sequences, keys=keys, key_groups=groups, muted=muted) for sequences, muted in passes]

    def _read_name(self, index: int) -> tuple[str, int]:
        sample = self._sample(index)
        return sample.id, len(sample.rationales)

    def _laid_out(self, indices: list[int], epoch: int) -> list[list[TokenSequence]]:
        """The sequences of each row; rows that are not cached are encoded together."""
        chosen = [(index, turn_of(*self._named(index), seed=self.plan.seed, epoch=epoch)) for index in indices]
        new = [row for row in dict.fromkeys(chosen) if row not in self._sequences]
        made = self.layout.many([(self._sample(index), rationale) for index, rationale in new])
        self._sequences |= zip(new, made, strict=True)
        found = [self._sequences[row] for row in chosen]
        while len(self._sequences) > _MOST_CACHED:
            del self._sequences[next(iter(self._sequences))]
        return found

    def _drawn_passes(self, step: int, indices: list[int], epoch: int) -> Iterator[tuple[list[TokenSequence], bool]]:
        """This rank's passes as (sequences, muted), over rows in the order in which they are drawn."""
        cut = {"rank": self.rank, "world_size": self.world_size, "size": self.size}
        for part in self.plan.micro_batches(step, **cut):
            chosen = self._laid_out(part.tolist() or indices[:1], epoch)
            for sequences in forward_passes(self.layout.arm, chosen):
                yield sequences, len(part) == 0

    def _length_passes(
        self, cut: ByLength, batch: list[list[TokenSequence]]
    ) -> Iterator[tuple[list[TokenSequence], bool]]:
        """The same over rows sorted by length; every rank lays out the whole global batch to know all lengths."""
        sizes = [[self.collate.size_of(sequence) for sequence in own] for own in batch]
        for ranks in length_passes(self.layout.arm, sizes, cut, world_size=self.world_size, rows=self.size):
            mine = ranks[self.rank]
            # An empty pass still needs a sequence: one of the shortest of the pass.
            chosen = mine or [max(ranks, key=len)[-1]]
            yield [batch[sample][place] for sample, place in chosen], not mine

    def _candidates(self, step: int, indices: list[int], epoch: int) -> tuple[list[tuple[str, int]], list[int]]:
        """InfoNCE's keys and their question groups: the global batch, then `loss.negatives` further rows."""
        loss = self.collate.loss
        if self.collate.teacher is None or loss.alignment != "info_nce":
            return [], []
        further = self.plan.others(step, loss.negatives).tolist() if loss.negatives else []
        names, counts, groups = self._known(indices + further)
        turns = (
            turn_of(name, count, seed=self.plan.seed, epoch=epoch) for name, count in zip(names, counts, strict=True)
        )
        return list(zip(names, turns, strict=True)), groups

    def _known(self, indices: list[int]) -> tuple[list[str], list[int], list[int]]:
        """(ids, numbers of rationales, question groups) of some rows; those of shards need not be read for it."""
        if isinstance(self.samples, SplitReader):
            return self.samples.candidates.many(indices)
        found = [self.samples[index] for index in indices]
        groups = [question_group(sample.question) for sample in found]
        return [sample.id for sample in found], [len(sample.rationales) for sample in found], groups


def step_batches(
    plan: OrderPlan,
    samples: Sequence[ReasoningSample],
    layout: Layout,
    collate: Collator,
    *,
    first_step: int,
    last_step: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    by_length: ByLength | None = None,
    workers: int = 0,
) -> Iterator[list[PSTBatch]]:
    """This rank's micro-batches for steps first_step … last_step - 1, one list per step.

    They are cut by length where `by_length` is given.
    """
    cut: dict[str, Any] = {"rank": rank, "world_size": world_size, "size": micro_batch_size, "by_length": by_length}
    dataset = _Steps(plan, samples, layout, collate, **cut)
    loader: Any = DataLoader(
        dataset,
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
