"""Scores the validation rows during training: the three loss terms, and accuracy when it chooses the student."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks import get_task, task_of
from pst_dist.distributed.device_memory import is_out_of_memory
from pst_dist.distributed.progress import alive
from pst_dist.distributed.ranks import Ranks, sums_over_ranks
from pst_dist.student.contexts import Decoded
from pst_dist.student.generate import decode_answers, is_right
from pst_dist.student.layout import Layout, forward_passes
from pst_dist.student.layout import Sequence as TokenSequence
from pst_dist.training.batching.batches import Collator
from pst_dist.training.batching.passes import ByLength, Place, length_passes
from pst_dist.training.engines.engine import Engine
from pst_dist.training.fingerprint import choosing_metric
from pst_dist.training.loss import TermWeights
from pst_dist.training.memory.pass_size import PassSize, TooLarge


@dataclass(frozen=True)
class ValidationScore:
    """Means over the validation rows; None where nothing was measured."""

    answer_nll: float | None = None
    """Nats per answer token; for an arm that answers after a rationale, given the teacher's rationale."""
    rationale_nll: float | None = None
    """Nats per rationale token."""
    written_nll: float | None = None
    """Nats per token of rationale and answer together, when that chooses the student (arms that think first)."""
    alignment: float | None = None
    """Distance per sample."""
    cosine: float | None = None
    """Cosine to the teacher per sample."""
    cosine_stderr: float | None = None
    """Its standard error over the samples."""
    cosine_other: float | None = None
    """Cosine to the teacher vectors of all other samples: what a term that learnt nothing of a row would reach."""
    loss: float | None = None
    """The weighted total."""
    accuracy: float | None = None
    """Fraction of rows answered correctly by greedy decoding."""

    def chosen(self, metric: str) -> float | None:
        """The value that chooses the student; None without validation rows."""
        return getattr(self, metric)

    def to_json(self) -> dict[str, float | None]:
        """Plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class SampleAnswer:
    """What the student answered to one validation question."""

    question: str
    gold: str
    answer: str
    tokens: int
    """Tokens to the end of the answer."""
    right: bool


_SAMPLE_TOKENS = 64
"""Most tokens of a sample answer: an untrained student writes on and on."""
_SHOWN = 300
"""Most characters of a sample's texts."""


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether `value` beats `best`: higher accuracy or lower loss. A tie keeps the later, longer-trained student."""
    return value >= best if metric == "accuracy" else value <= best


def compared_cosines(rows: int, cosine: float, spread: Tensor) -> tuple[float | None, float | None]:
    """The standard error of the mean cosine, and the mean cosine to the teachers of other rows; None below two rows.

    `cosine` is the sum over rows. `spread` [1 + 2E] float64 holds the sum of the squared cosines, of the students' unit
    vectors and of the teachers'. The sum over all pairs is the product of those two sums, and the pairs of a row with
    itself are taken out; so it depends on neither passes nor ranks.
    """
    if rows < 2:
        return None, None
    students, teachers = spread[1:].chunk(2)
    mean = cosine / rows
    variance = max(0.0, float(spread[0]) / rows - mean * mean) * rows / (rows - 1)
    return math.sqrt(variance / rows), (float(students @ teachers) - cosine) / (rows * (rows - 1))


class Validator:
    """Scores a student on all ranks; every rank takes a stride of the rows."""

    def __init__(
        self,
        config: Config,
        samples: Sequence[ReasoningSample],
        layout: Layout,
        collate: Collator,
        tokenizer: Any,
        ranks: Ranks,
    ) -> None:
        self.config, self.samples, self.layout, self.collate = config, samples, layout, collate
        self.tokenizer, self.ranks = tokenizer, ranks
        # As many as training keeps (`step_batches._Steps`).
        self._sequences = functools.lru_cache(maxsize=20_000)(lambda index: layout.sequences(samples[index]))
        self._cut: tuple[ByLength, list[list[list[Place]]]] | None = None
        self.decodes = config.train.metric_for_best_model == "accuracy"

    def score(self, engine: Engine, weights: TermWeights, size: PassSize) -> ValidationScore:
        """Means over all validation rows, the same on every rank; collective.

        A pass that does not fit in memory halves `size`, and the rows are scored again.
        """
        if not len(self.samples):
            return ValidationScore()
        engine.student.eval()
        engine.student.watch_gradients = False
        while isinstance(totals := self._totals(engine, size), TooLarge):
            size.halve(totals, "validation", keeps_rows=self._compares_rows)
        totals = sums_over_ranks(totals)
        sums, cosine, counts = totals[:3], float(totals[3]), totals[4:7]
        stderr, other = compared_cosines(int(counts[2]), cosine, totals[7:])
        means = [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
        thinks = choosing_metric(self.config) == "written_nll"
        return ValidationScore(
            answer_nll=means[0],
            rationale_nll=means[1],
            written_nll=float(sums[:2].sum() / counts[:2].sum()) if thinks else None,
            alignment=means[2],
            cosine=cosine / float(counts[2]) if counts[2] else None,
            cosine_stderr=stderr,
            cosine_other=other,
            loss=float((sums * weights.scales(counts)).sum()),
            accuracy=self._accuracy(engine) if self.decodes else None,
        )

    def _totals(self, engine: Engine, size: PassSize) -> Tensor | TooLarge:
        """[8 + 2E] float64: this rank's sums of the terms and of the cosines, its counts, and `PSTLossOutput.spread`
        with the sum of the teachers; or the pass that did not fit.
        """
        width = engine.student.widths[1]
        totals = torch.zeros(7 + 1 + 2 * width, dtype=torch.float64)
        unscaled = torch.ones(3, device=engine.device)
        with torch.no_grad():
            for sequences, muted in self._passes(size):
                # When scoring, InfoNCE's candidates are the rows of the pass.
                keys = list(dict.fromkeys((sequence.sample_id, sequence.rationale) for sequence in sequences))
                batch = self.collate(sequences, keys=keys, key_groups=range(len(keys)), muted=muted)
                alive()
                try:
                    output = engine.forward(batch.to(engine.device), unscaled)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    return TooLarge.of(batch, error)
                totals[:7] += torch.cat([output.sums.double().cpu(), output.cosine.double().cpu()[None], batch.counts])
                if output.spread.numel():
                    totals[7:] += torch.cat([output.spread.cpu(), batch.teacher_emb.double().sum(0)])
        return totals

    @property
    def _compares_rows(self) -> bool:
        """Whether the rows of a pass are one another's candidates, so that its value depends on them."""
        return self.collate.teacher is not None and self.config.loss.alignment == "info_nce"

    def _passes(self, size: PassSize) -> Iterator[tuple[list[TokenSequence], bool]]:
        """This rank's forward passes as (sequences, muted); every rank gets the same number."""
        by_length = size.by_length
        if by_length is None or self._compares_rows:
            rows = self.config.train.per_device_train_batch_size if self._compares_rows else size.rows
            yield from self._drawn_passes(rows)
            return
        if self._cut is None or self._cut[0] != by_length:
            self._cut = by_length, self._length_passes(by_length)
        for ranks in self._cut[1]:
            mine = ranks[self.ranks.rank]
            chosen = mine or [max(ranks, key=len)[-1]]
            yield [self._sequences(sample)[place] for sample, place in chosen], not mine

    def _length_passes(self, cut: ByLength) -> list[list[list[Place]]]:
        """The passes of all ranks; each rank lays out every row once, to know all lengths."""
        sizes = []
        for index in range(len(self.samples)):
            alive()
            sizes.append([self.collate.size_of(sequence) for sequence in self._sequences(index)])
        size, world = self.config.train.per_device_train_batch_size, self.ranks.world_size
        return list(length_passes(self.layout.arm, sizes, cut, world_size=world, rows=size))

    def _drawn_passes(self, size: int) -> Iterator[tuple[list[TokenSequence], bool]]:
        """The same in the order of the rows. InfoNCE's candidates are those of a pass, so its value depends on them."""
        world = self.ranks.world_size
        most = math.ceil(len(self.samples) / world)
        passes = math.ceil(most / size)
        mine = range(self.ranks.rank, len(self.samples), world)
        for index in range(passes):
            part = mine[index * size : (index + 1) * size]
            chosen = [self.samples[k] for k in part] or [self.samples[0]]
            laid_out = [self.layout.sequences(sample) for sample in chosen]
            for sequences in forward_passes(self.layout.arm, laid_out):
                yield sequences, not part

    def _accuracy(self, engine: Engine) -> float:
        usual = None if self.config.data.mixture else get_task(self.config.task, self.config.data.answer_type)
        mine = [self.samples[index] for index in range(self.ranks.rank, len(self.samples), self.ranks.world_size)]
        with self._decoding(engine):
            decoded = self._decoded(engine, mine)
        right = sum(
            is_right(task_of(sample, usual), self.layout.format, sample, answer)
            for answer, sample in zip(decoded, mine, strict=True)
        )
        total = sums_over_ranks(torch.tensor([float(right), float(len(mine))], dtype=torch.float64))
        return float(total[0] / total[1])

    def sample_answers(self, engine: Engine) -> list[SampleAnswer]:
        """Answers to the first validation questions, on rank zero (elsewhere none); none where ZeRO-3 cuts weights."""
        chosen = [self.samples[k] for k in range(min(self.config.train.sample_answers, len(self.samples)))]
        if not chosen or not self.ranks.is_main or engine.name == "zero3":
            return []
        task = None if self.config.data.mixture else get_task(self.config.task, self.config.data.answer_type)
        with self._decoding(engine):
            decoded = self._decoded(engine, chosen, min(_SAMPLE_TOKENS, self.config.evaluate.max_new_tokens))
        fmt = self.layout.format
        return [
            SampleAnswer(
                sample.question[:_SHOWN],
                sample.answer[:_SHOWN],
                one.answer_text.strip()[:_SHOWN],
                one.answer_tokens,
                is_right(task_of(sample, task), fmt, sample, one),
            )
            for sample, one in zip(chosen, decoded, strict=True)
        ]

    def _decoding(self, engine: Engine) -> torch.autocast:
        # Frozen matrices in bfloat16 beside float32 adapters need autocast, as in the engines' forward.
        mixed = self.config.student.lora.frozen_dtype == "bfloat16"
        return torch.autocast(engine.device.type, dtype=torch.bfloat16, enabled=mixed)

    def _decoded(
        self, engine: Engine, mine: Sequence[ReasoningSample], most_tokens: int | None = None
    ) -> list[Decoded]:
        return decode_answers(
            engine.student.model,
            self.tokenizer,
            self.layout.format,
            [self.layout.format.asked(sample) for sample in mine],
            batch_size=self.config.evaluate.batch_size,
            batch_tokens=self.config.evaluate.batch_tokens,
            max_new_tokens=most_tokens or self.config.evaluate.max_new_tokens,
            on_token=lambda _: alive(),
        )
