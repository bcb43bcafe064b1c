"""Ask a trained student questions: one at a time and timed, or many in batches. It may think first when unsure.

`student.generate` generates the tokens. `evaluation.adaptive` chooses, on validation rows, the probability below which
an adaptive student thinks first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pst_dist.errors import InputError
from pst_dist.student.answer import Answer
from pst_dist.student.generate import (
    Decoded,
    decode_answers,
    decode_rationales,
    max_positions,
    without_room,
)

if TYPE_CHECKING:
    from pst_dist.student.saved import LoadedStudent


def after_thought(at_once: Decoded, thought: Decoded) -> Decoded:
    """The second answer, after thinking; its token count includes the first answer, whose probability it keeps."""
    tokens = at_once.answer_tokens + thought.answer_tokens
    return replace(thought, answer_tokens=tokens, probability=at_once.probability)


def timed_answer(
    student: LoadedStudent, question: str, *, max_new_tokens: int, think_below: float = 0.0
) -> tuple[Decoded, float]:
    """One question's answer and its wall time in milliseconds, including tokenising and waiting for the device.

    When the direct answer's probability is below `think_below`, the student thinks first and answers again.
    """
    ask = (student.model, student.tokenizer, student.format, [question])
    _wait_for_device(student.model)
    started = time.perf_counter()
    (answer,) = decode_answers(*ask, batch_size=1, max_new_tokens=max_new_tokens)
    if answer.probability < think_below:
        (thought,) = decode_answers(*ask, batch_size=1, max_new_tokens=max_new_tokens, other=True)
        answer = after_thought(answer, thought)
    _wait_for_device(student.model)
    return answer, (time.perf_counter() - started) * 1000


def _wait_for_device(model: Any) -> None:
    if model.get_input_embeddings().weight.is_cuda:
        torch.cuda.synchronize()


def answer_question(
    student: LoadedStudent, question: str, *, explain: bool, max_new_tokens: int, think_below: float = 0.0
) -> Answer:
    """Ask one question; with `explain` the rationale is generated too.

    `think_below` is for adaptive students: when the direct answer's probability is lower, the student thinks first. The
    rationale is None when the arm does not write one. Raises InputError for an empty question and for one that leaves
    no position for an answer.
    """
    (question,) = _checked(student, [question])
    decoded, milliseconds = timed_answer(student, question, max_new_tokens=max_new_tokens, think_below=think_below)
    (rationale,) = _rationales(student, [question], [decoded], 1, max_new_tokens) if explain else [None]
    return _answer(decoded, milliseconds / 1000, rationale)


def answer_questions(
    student: LoadedStudent,
    questions: Sequence[str],
    *,
    explain: bool,
    max_new_tokens: int,
    batch_size: int,
    think_below: float = 0.0,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Ask many questions in batches of similar length; the answers are in the order of `questions`.

    Otherwise like `answer_question`; errors give the question's number. `on_batch` receives the number of questions
    finished in each batch, not counting those asked again to think first.
    """
    questions = _checked(student, questions)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    parts = (student.model, student.tokenizer, student.format)
    _wait_for_device(student.model)
    started = time.perf_counter()
    decoded = decode_answers(*parts, questions, on_batch=on_batch, **settings)
    unsure = [place for place, answer in enumerate(decoded) if answer.probability < think_below]
    if unsure:
        thoughts = decode_answers(*parts, [questions[place] for place in unsure], other=True, **settings)
        for place, thought in zip(unsure, thoughts, strict=True):
            decoded[place] = after_thought(decoded[place], thought)
    _wait_for_device(student.model)
    seconds = (time.perf_counter() - started) / max(len(questions), 1)
    rationales = (
        _rationales(student, questions, decoded, batch_size, max_new_tokens) if explain else [None] * len(decoded)
    )
    return [_answer(answer, seconds, rationale) for answer, rationale in zip(decoded, rationales, strict=True)]


def _checked(student: LoadedStudent, questions: Sequence[str]) -> list[str]:
    """The questions without surrounding white space, as in training.

    Raises InputError for a question that is not text, is empty, or fills the model's positions.
    """
    many = len(questions) > 1
    for number, question in enumerate(questions, 1):
        which = f"question {number} of {len(questions)}" if many else "the question"
        if not isinstance(question, str):
            raise InputError(f"{which} is {type(question).__name__}, not text", "give a string")
        if not question.strip():
            raise InputError(f"{which} is empty", "enter some text")
    stripped = [question.strip() for question in questions]
    full = without_room(student.model, student.tokenizer, student.format, stripped)
    if full:
        which = f"question {full[0] + 1} of {len(questions)}" if many else "the question"
        raise InputError(
            f"{which} fills all {max_positions(student.model)} positions of the student", "ask a shorter question"
        )
    return stripped


def _rationales(
    student: LoadedStudent, questions: Sequence[str], answers: Sequence[Decoded], batch_size: int, max_new_tokens: int
) -> list[str | None]:
    written = decode_rationales(
        student.model,
        student.tokenizer,
        student.format,
        questions,
        answers,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    return [rationale or None for rationale in written]


def _answer(decoded: Decoded, seconds: float, rationale: str | None) -> Answer:
    return Answer(
        text=decoded.answer_text.strip(),
        tokens=decoded.answer_tokens,
        complete=decoded.complete,
        probability=decoded.probability,
        seconds=seconds,
        rationale=rationale,
        thought_first=decoded.thought_first,
    )
