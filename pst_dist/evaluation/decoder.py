"""All generation of one evaluation: answers, rationales and latency, by whatever executor decodes the batches.

`InProcess` decodes here, `evaluation.on_ranks` divides the batches among the ranks of a launcher, and
`clusters.ray.evaluate` among actors. One process computes the scores from their answers.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.evaluation.batches import Batch, Done, Outcome, decode_batch
from pst_dist.evaluation.scores import given_rationales
from pst_dist.logs import Progress, progress
from pst_dist.student.ask import timed_answer
from pst_dist.student.contexts import (
    BatchSize,
    Context,
    Decoded,
    answer_contexts,
    batches_of,
    max_positions,
    rationale_contexts,
)
from pst_dist.student.saved import LoadedStudent

log = logging.getLogger(__name__)
_WARM_UPS = 2


@dataclass(frozen=True)
class Place:
    """Where batches are decoded, as the results name it."""

    device: str
    bf16: bool


class Executor(Protocol):
    """Decodes the batches of one evaluation."""

    device: str | None
    """The device of the student that computes the scores; None for the best one."""

    def may_use_bf16(self, config: Config, student: LoadedStudent) -> tuple[bool, ...]:
        """Whether it decodes in bfloat16; both values where only `place` knows."""

    def place(self, config: Config, student: LoadedStudent) -> Place:
        """Where it decodes and how; starts what has to be started."""

    def run(
        self, config: Config, student: LoadedStudent, todo: Sequence[Batch], done: Done | None, bar: Progress
    ) -> Iterator[tuple[int, Outcome]]:
        """(place in `todo`, outcome) of every batch, in any order; `bar` counts questions.

        Each outcome is kept in `done` when its batch is finished.
        """

    def times(
        self, config: Config, student: LoadedStudent, questions: Sequence[str | Turns], think_below: float
    ) -> list[float]:
        """`answer_times` where the batches are decoded."""


class InProcess:
    """Decodes here, one batch after another."""

    device: str | None = None

    def may_use_bf16(self, config: Config, student: LoadedStudent) -> tuple[bool, ...]:
        """As `decodes_in_bf16` says."""
        return (decodes_in_bf16(config, student, student.model.device.type),)

    def place(self, config: Config, student: LoadedStudent) -> Place:
        """The student's device."""
        return place_of(student)

    def run(
        self, config: Config, student: LoadedStudent, todo: Sequence[Batch], done: Done | None, bar: Progress
    ) -> Iterator[tuple[int, Outcome]]:
        """(place, outcome) of each batch, in order."""
        for k, batch in enumerate(todo):
            outcome = decode_batch(
                student, config.evaluate, batch, lambda count: bar.advance(0, f"{count} tokens of this batch")
            )
            if done is not None:
                done.put(batch, outcome)
            bar.advance(len(batch.questions))
            yield k, outcome

    def times(
        self, config: Config, student: LoadedStudent, questions: Sequence[str | Turns], think_below: float
    ) -> list[float]:
        """`answer_times` of this process."""
        return answer_times(config, student, questions, think_below)


class Decoder:
    """Generates for one evaluation; batches that `done` has are not generated again."""

    def __init__(
        self,
        config: Config,
        student: LoadedStudent,
        executor: Executor | None = None,
        done: Done | None = None,
        fingerprint: str = "",
    ) -> None:
        """`fingerprint` is that of the evaluation, for the caller; `student` has the precision of the decoding."""
        self.config, self.student, self.fingerprint, self._done = config, student, fingerprint, done
        self._executor: Executor = executor or InProcess()
        self.seconds, self.rows = 0.0, 0
        """Wall time of generating answers, and how many were generated in it. Answers that an earlier command
        generated count with the time that they took there."""

    @property
    def place(self) -> Place:
        """Where the batches are decoded."""
        return self._executor.place(self.config, self.student)

    def answers(self, samples: Sequence[ReasoningSample], other: bool = False) -> list[Decoded]:
        """Answers to all samples, with rationales supplied if the settings ask for it; `other` makes it think first."""
        settings, questions = self.config.evaluate, self._questions(samples)
        given = None
        if settings.rationale != "own":
            given = given_rationales(samples, wrong=settings.rationale == "wrong")
        contexts = answer_contexts(*self._parts, questions, given=given, other=other)
        cuts = self._cut(contexts)
        if without := sorted(set(range(len(contexts))) - {row for rows in cuts for row in rows}):
            cuts.append(without)  # no room for an answer
        batches = [
            Batch([questions[k] for k in rows], [given[k] for k in rows] if given is not None else None, other)
            for rows in cuts
        ]
        answers: dict[int, Decoded] = {}
        for rows, outcome in zip(cuts, self._outcomes("evaluate", batches, timed=True), strict=True):
            answers |= zip(rows, outcome.answers or [], strict=True)
        return [answers[k] for k in range(len(samples))]

    def rationales(self, samples: Sequence[ReasoningSample], answers: Sequence[Decoded]) -> list[str]:
        """The rationale of each answer (`student.generate.decode_rationales`)."""
        questions = self._questions(samples)
        places, contexts = rationale_contexts(*self._parts, questions, answers)
        cuts = [[places[k] for k in rows] for rows in self._cut(contexts)]
        if others := sorted(set(range(len(answers))) - {row for rows in cuts for row in rows}):
            cuts.append(others)  # nothing is generated for these
        batches = [Batch([questions[k] for k in rows], answers=[answers[k] for k in rows]) for rows in cuts]
        texts: dict[int, str] = {}
        for rows, outcome in zip(cuts, self._outcomes("explain", batches), strict=True):
            texts |= zip(rows, outcome.rationales or [], strict=True)
        return [texts[k] for k in range(len(samples))]

    def latency(self, samples: Sequence[ReasoningSample], think_below: float) -> dict[str, Any] | None:
        """Wall time to the answer in milliseconds, one question at a time; `rows` is the number measured."""
        if not samples:
            return None
        times = self._executor.times(self.config, self.student, self._questions(samples), think_below)
        if len(times) < len(samples):
            log.info(
                "latency: %d of %d questions measured in evaluate.latency_seconds=%g",
                len(times),
                len(samples),
                self.config.evaluate.latency_seconds,
            )
        return {"median": float(np.median(times)), "p90": float(np.percentile(times, 90)), "rows": len(times)}

    def forget(self) -> None:
        """Remove the files of decoded batches."""
        if self._done is not None:
            self._done.remove()

    @property
    def _parts(self) -> tuple[Any, Any, Any]:
        return self.student.model, self.student.tokenizer, self.student.format

    def _questions(self, samples: Sequence[ReasoningSample]) -> list[str | Turns]:
        return [self.student.format.asked(sample) for sample in samples]

    def _cut(self, contexts: Sequence[Context]) -> list[list[int]]:
        settings = self.config.evaluate
        size = BatchSize(settings.batch_size, settings.batch_tokens, settings.max_new_tokens)
        return list(batches_of(contexts, size, max_positions(self.student.model)))

    def _outcomes(self, name: str, batches: Sequence[Batch], *, timed: bool = False) -> list[Outcome]:
        """The outcome of each batch, in order."""
        outcomes = [self._done.get(batch) if self._done is not None else None for batch in batches]
        todo = [k for k, outcome in enumerate(outcomes) if outcome is None]
        total = sum(len(batch.questions) for batch in batches)
        found = [outcome for outcome in outcomes if outcome is not None]
        kept = total - sum(len(batches[k].questions) for k in todo)
        if todo:
            self._executor.place(self.config, self.student)  # actors start before the clock
        started = time.perf_counter()
        with progress(f"{name} {self.config.arm}", total=total, unit="rows") as bar:
            if kept:
                log.info("%s: %d of %d rows were decoded earlier, continuing", name, kept, total)
                bar.skip(kept)
            if todo:
                waiting = [batches[k] for k in todo]
                for place, outcome in self._executor.run(self.config, self.student, waiting, self._done, bar):
                    outcomes[todo[place]] = outcome
        if timed:
            self.rows += total
            self.seconds += sum(outcome.seconds for outcome in found) + (time.perf_counter() - started if todo else 0)
        return [outcome for outcome in outcomes if outcome is not None]


def decodes_in_bf16(config: Config, student: LoadedStudent, device: str) -> bool:
    """Whether to decode in bfloat16: as `evaluate.bf16` says, or with `auto` on a GPU as the student was trained.

    `device` is a type of device, such as `cuda`.
    """
    if config.evaluate.bf16 != "auto":
        return config.evaluate.bf16
    trained = student.manifest.extra.get("bf16", config.train.bf16)
    return device == "cuda" and trained is True


def set_precision(config: Config, student: LoadedStudent) -> None:
    """Convert the student's weights to bfloat16 where it decodes in it."""
    if decodes_in_bf16(config, student, student.model.device.type):
        student.model.to(torch.bfloat16)


def place_of(student: LoadedStudent) -> Place:
    """The device and precision of a loaded student."""
    device = student.model.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} ({platform.machine()})"
    return Place(name, student.model.dtype == torch.bfloat16)


def answer_times(
    config: Config, student: LoadedStudent, questions: Sequence[str | Turns], think_below: float
) -> list[float]:
    """Wall time to the answer of each question in milliseconds, one at a time.

    After warming up, at least one question is measured, and no further one once `evaluate.latency_seconds` have passed
    since the first warm-up.
    """
    settings = config.evaluate
    end = time.monotonic() + settings.latency_seconds
    times: list[float] = []
    with progress(f"latency {config.arm}", total=len(questions), unit="questions") as bar:
        for question in questions[:_WARM_UPS]:
            bar.advance(0, "warming up")
            if time.monotonic() < end:
                timed_answer(student, question, max_new_tokens=settings.max_new_tokens, think_below=think_below)
        for question in questions:
            if times and time.monotonic() >= end:
                break
            found = timed_answer(student, question, max_new_tokens=settings.max_new_tokens, think_below=think_below)
            times.append(found[1])
            bar.advance(1)
    return times
