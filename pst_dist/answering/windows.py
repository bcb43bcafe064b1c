"""Questions cut into windows, the unit of resuming and of distributing, and a window answered in this process.

Batches are formed by length within a window. So the answers of a window depend only on its questions, the student and
the settings, not on where or in which order windows are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pst_dist.data.sample import Turns
from pst_dist.student.answer import Answer

if TYPE_CHECKING:
    from pst_dist.logs import Progress
    from pst_dist.student.saved import LoadedStudent

_T = TypeVar("_T")
BATCHES_PER_WINDOW = 8
"""Batches of a window: more sort better by length, and lose more work when a command is killed."""


@dataclass(frozen=True)
class AnswerSettings:
    """How questions are put to a student, and what is written for each."""

    explain: bool = False
    """Also write the rationale."""
    confidence: bool = False
    """Also write the answer's probability and the mean over its tokens."""
    max_new_tokens: int = 256
    batch_size: int = 64
    """Questions per decoding batch."""
    think_below: float = 0.0
    """An adaptive student thinks first when the probability of its answer is below this."""

    @property
    def window(self) -> int:
        """Questions per window."""
        return self.batch_size * BATCHES_PER_WINDOW


class Answerer(Protocol):
    """Answers windows of questions, in order."""

    def __call__(self, windows: Iterator[list[str | Turns]], bar: Progress) -> Iterator[list[Answer]]: ...


def cut(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of `size` items in order; the last one may be shorter."""
    rest = iter(items)
    while window := list(itertools.islice(rest, size)):
        yield window


def answer_window(
    student: LoadedStudent,
    questions: list[str | Turns],
    settings: AnswerSettings,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The answers to one window, in the order of its questions."""
    from pst_dist.student.ask import answer_questions

    return answer_questions(
        student,
        questions,
        explain=settings.explain,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        think_below=settings.think_below,
        on_batch=on_batch,
    )


def in_this_process(student: LoadedStudent, settings: AnswerSettings) -> Answerer:
    """An answerer that decodes here, one window after another."""

    def answer(windows: Iterator[list[str | Turns]], bar: Progress) -> Iterator[list[Answer]]:
        for window in windows:
            yield answer_window(student, window, settings, bar.advance)

    return answer


def columns_of(answer: Answer, settings: AnswerSettings) -> dict[str, Any]:
    """What is added to a question's row. Probabilities have six digits, the same on every machine."""
    found: dict[str, Any] = {
        "student_answer": answer.text,
        "student_complete": answer.complete,
        "student_tokens": answer.tokens,
    }
    if settings.think_below:
        found["student_thought_first"] = answer.thought_first
    if settings.explain:
        found["student_rationale"] = answer.rationale
    if settings.confidence:
        found["student_probability"] = round(answer.probability, 6)
        found["student_confidence"] = round(answer.confidence, 6)
    return found


OUR_COLUMNS = frozenset(
    f"student_{name}"
    for name in ("answer", "complete", "tokens", "thought_first", "rationale", "probability", "confidence")
)
"""Columns that a row with a question may not have."""
