"""From samples to batches: the collator, and the loader whose whole state is a step number.

The order of samples is a pure function of (seed, epoch, position), see `training.order`: step k's global batch is a
slice of the epoch's permutation, which `training.passes` cuts into forward passes. So resuming needs no replay, and the
world size never changes what is trained on.
"""

# Shapes in this file: B sequences, T tokens, N supervised tokens, A aligned spans, E teacher width, G global keys

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
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
from pst_dist.training.order import OrderPlan, rationale_of, turn_of
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
        return [int(length) for length in each]

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
        streams, prompts = [], []
        rows, targets, is_answer = [], [], []
        spans: list[tuple[int, int, int]] = []
        owners: list[tuple[str, int]] = []
        for index, sequence in enumerate(sequences):
            head = sequence.prompt_ids
            if self.decoder_start_id is not None:
                prompts.append(sequence.prompt_ids)
                head = [self.decoder_start_id]
            streams.append((head, sequence))
            if muted:
                continue
            for offset, (token, segment) in enumerate(zip(sequence.target_ids, sequence.segments, strict=True)):
                if segment is Segment.ANSWER or (segment is Segment.RATIONALE and self.loss.rationale_weight > 0):
                    rows.append((index, len(head) + offset - 1))
                    targets.append(token)
                    is_answer.append(segment is Segment.ANSWER)
            span = self._span(sequence) if self.teacher is not None else None
            if span is not None:
                spans.append((index, len(head) + span[0], span[1]))
                owners.append((sequence.sample_id, sequence.rationale))
        place = _Places.of([len(head) + len(sequence.target_ids) for head, sequence in streams], self.padding_free)
        input_ids = torch.full(place.shape, self.pad_id, dtype=torch.int64)
        segment_ids = torch.zeros_like(input_ids)
        begins = [place.of_sequence(index) for index in range(len(streams))]
        for (row, begin), (head, sequence) in zip(begins, streams, strict=True):
            ids = torch.tensor([*head, *sequence.target_ids])
            input_ids[row, begin : begin + len(ids)] = ids
            owner = torch.tensor([Segment.PROMPT] * len(head) + list(sequence.segments))
            segment_ids[row, begin : begin + len(ids)] = owner
        encoder = _pad(prompts, self.pad_id) if prompts else (None, None)
        teacher, key_matrix, key_index = self._teacher_tensors(owners, keys)
        batch, length = place.shape
        return PSTBatch(
            input_ids=input_ids,
            attention_mask=(segment_ids != Segment.PAD).long(),
            segment_ids=segment_ids,
            encoder_input_ids=encoder[0],
            encoder_attention_mask=encoder[1],
            supervised=Supervised.of(
                [begins[index][0] * length + begins[index][1] + position for index, position in rows],
                targets,
                positions=input_ids.numel(),
            ),
            is_answer=torch.tensor(is_answer, dtype=torch.bool),
            spans=Spans.of(
                [(begins[index][0], begins[index][1] + first, count) for index, first, count in spans],
                batch=batch,
                length=length,
            ),
            teacher_emb=teacher,
            keys=key_matrix,
            key_groups=torch.tensor(list(key_groups) if len(key_matrix) else [], dtype=torch.int64),
            key_index=key_index,
            capacity=self.capacity or len(streams),
            sample_ids=tuple(sequence.sample_id for sequence in sequences),
            position_ids=place.position_ids,
        )

    def size_of(self, sequence: TokenSequence) -> tuple[int, int]:
        """(encoder tokens, decoder tokens) of a sequence; a causal student has no encoder."""
        if self.decoder_start_id is not None:
            return len(sequence.prompt_ids), 1 + len(sequence.target_ids)
        return 0, len(sequence.prompt_ids) + len(sequence.target_ids)

    def _span(self, sequence: TokenSequence) -> tuple[int, int] | None:
        """(first target token, token count) of the aligned span; None when truncation left no rationale to pool."""
        wanted = Segment.SEMANTIC if self.loss.pooling == "token" else Segment.RATIONALE
        places = [offset for offset, segment in enumerate(sequence.segments) if segment is wanted]
        return (places[0], len(places)) if places else None

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


@dataclass(frozen=True)
class _Places:
    """Where the sequences of a pass lie in its [B, T] batch: one per row, or one after another in a single row."""

    lengths: list[int]
    begins: list[int]
    """First position of each sequence in its row."""
    concatenated: bool

    @classmethod
    def of(cls, lengths: list[int], concatenated: bool) -> _Places:
        begins = [*itertools.accumulate(lengths[:-1], initial=0)] if concatenated else [0] * len(lengths)
        return cls(lengths, begins, concatenated)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return (1, sum(self.lengths)) if self.concatenated else (len(self.lengths), max(self.lengths))

    @property
    def position_ids(self) -> Tensor | None:
        """[1, T] int64 for concatenated sequences."""
        if not self.concatenated:
            return None
        return torch.cat([torch.arange(length) for length in self.lengths])[None]

    def of_sequence(self, index: int) -> tuple[int, int]:
        """(row, first position) of a sequence."""
        return (0, self.begins[index]) if self.concatenated else (index, 0)


def _pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, S] ids padded on the right, and their [B, S] mask."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


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
        # Tokenising anew each epoch costs a small student a tenth of its step; this cache takes up to about 100 MB.
        self._sequences = functools.lru_cache(maxsize=20_000)(self._tokenise)
        # A row's rationale is chosen from the sample, which is then laid out: it is read from its shard once.
        self._sample = functools.lru_cache(maxsize=1)(samples.__getitem__)

    def _tokenise(self, index: int, rationale: int) -> list[TokenSequence]:
        return self.layout.sequences(self._sample(index), rationale)

    def __getitem__(self, step: int) -> list[PSTBatch]:
        epoch, indices = self.plan.epoch_of(step), self.plan.global_batch(step).tolist()
        keys, groups = self._candidates(step, indices, epoch)

        def laid_out(index: int) -> list[TokenSequence]:
            return self._sequences(index, rationale_of(self._sample(index), seed=self.plan.seed, epoch=epoch))

        passes = self._drawn_passes(step, indices, laid_out)
        if self.by_length is not None:
            passes = self._length_passes(self.by_length, [laid_out(index) for index in indices])
        return [self.collate(sequences, keys=keys, key_groups=groups, muted=muted) for sequences, muted in passes]

    def _drawn_passes(
        self, step: int, indices: list[int], laid_out: Callable[[int], list[TokenSequence]]
    ) -> Iterator[tuple[list[TokenSequence], bool]]:
        """This rank's passes as (sequences, muted), over rows in the order in which they are drawn."""
        cut = {"rank": self.rank, "world_size": self.world_size, "size": self.size}
        for part in self.plan.micro_batches(step, **cut):
            chosen = [laid_out(index) for index in (part.tolist() or indices[:1])]
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
