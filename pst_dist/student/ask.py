"""Ask a trained student questions: one at a time and timed, or many in batches. It may think first when unsure.

`student.generate` generates the tokens. `evaluation.adaptive` chooses, on validation rows, the probability below which
an adaptive student thinks first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pst_dist.data.sample import Turns
from pst_dist.errors import InputError
from pst_dist.student.answer import Answer
from pst_dist.student.contexts import Decoded, max_positions, without_room
from pst_dist.student.explain import decode_explained
from pst_dist.student.generate import decode_answers, decode_rationales
from pst_dist.student.stream import AnswerStreamer

if TYPE_CHECKING:
    from pst_dist.student.saved import LoadedStudent


def after_thought(at_once: Decoded, thought: Decoded) -> Decoded:
    """The second answer, after thinking; its token count includes the first answer, whose probability it keeps."""
    tokens = at_once.answer_tokens + thought.answer_tokens
    return replace(thought, answer_tokens=tokens, probability=at_once.probability)


def timed_answer(
    student: LoadedStudent,
    question: str | Turns,
    *,
    max_new_tokens: int,
    think_below: float = 0.0,
    streamer: Any = None,
) -> tuple[Decoded, float]:
    """One question's answer and its wall time in milliseconds, including tokenising and waiting for the device.

    When the direct answer's probability is below `think_below`, the student thinks first and answers again.
    `streamer` receives the tokens of the direct answer as they are generated.
    """
    ask = (student.model, student.tokenizer, student.format, [question])
    _wait_for_device(student.model)
    started = time.perf_counter()
    (answer,) = decode_answers(*ask, batch_size=1, max_new_tokens=max_new_tokens, streamer=streamer)
    if answer.probability < think_below:
        (thought,) = decode_answers(*ask, batch_size=1, max_new_tokens=max_new_tokens, other=True)
        answer = after_thought(answer, thought)
    _wait_for_device(student.model)
    return answer, (time.perf_counter() - started) * 1000


def _wait_for_device(model: Any) -> None:
    if model.get_input_embeddings().weight.is_cuda:
        torch.cuda.synchronize()


def answer_question(
    student: LoadedStudent,
    question: str | Turns,
    *,
    explain: bool,
    max_new_tokens: int,
    think_below: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Ask one question; with `explain` the rationale is generated too, from the answer's keys and values.

    `on_text` receives the pieces of the answer as they are generated; together they are its text, perhaps with white
    space around it. An adaptive student that may think again gives them when its answer is final.

    `think_below` is for adaptive students: when the direct answer's probability is lower, the student thinks first. The
    rationale is None when the arm does not write one. Raises InputError for an empty question and for one that leaves
    no position for an answer.
    """
    (question,) = _checked(student, [question])
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    live = on_text is not None and not think_below
    streamer = AnswerStreamer(student.tokenizer, student.format, on_text) if live and on_text else None
    rationale: str | None = None
    if explain and not think_below:
        ask, watch = (student.model, student.tokenizer, student.format, [question]), _Stopwatch(student.model)
        (decoded,), (text,) = decode_explained(*ask, batch_size=1, on_answers=watch.stop, streamer=streamer, **settings)
        seconds, rationale = watch.seconds, text or None
    else:
        decoded, milliseconds = timed_answer(student, question, think_below=think_below, streamer=streamer, **settings)
        seconds = milliseconds / 1000
        if explain:
            (rationale,) = _rationales(student, [question], [decoded], 1, max_new_tokens)
    if on_text is not None and not live:
        on_text(decoded.answer_text)
    return _answer(decoded, seconds, rationale)


def answer_questions(
    student: LoadedStudent,
    questions: Sequence[str | Turns],
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
    tell = on_batch or (lambda count: None)
    watch = _Stopwatch(student.model)
    if explain and not think_below:
        decoded, texts = decode_explained(
            *parts, questions, on_answers=watch.stop, on_batch=watch.then(tell), **settings
        )
        rationales = [text or None for text in texts]
    else:
        decoded = decode_answers(*parts, questions, on_batch=tell, **settings)
        unsure = [place for place, answer in enumerate(decoded) if answer.probability < think_below]
        if unsure:
            thoughts = decode_answers(*parts, [questions[place] for place in unsure], other=True, **settings)
            for place, thought in zip(unsure, thoughts, strict=True):
                decoded[place] = after_thought(decoded[place], thought)
        watch.stop()
        rationales = [None] * len(decoded)
        if explain:
            rationales = _rationales(student, questions, decoded, batch_size, max_new_tokens)
    seconds = watch.seconds / max(len(questions), 1)
    return [_answer(answer, seconds, rationale) for answer, rationale in zip(decoded, rationales, strict=True)]


class _Stopwatch:
    """Adds up the time to the answers, without that of the rationales between them."""

    def __init__(self, model: Any) -> None:
        self._model, self.seconds = model, 0.0
        self._start()

    def _start(self) -> None:
        _wait_for_device(self._model)
        self._since = time.perf_counter()

    def stop(self, _: int = 0) -> None:
        """Some answers are there."""
        _wait_for_device(self._model)
        self.seconds += time.perf_counter() - self._since

    def then(self, tell: Callable[[int], None]) -> Callable[[int], None]:
        """`tell`, after which the time to the next answers begins."""

        def told(count: int) -> None:
            tell(count)
            self._start()

        return told


def _checked(student: LoadedStudent, questions: Sequence[str | Turns]) -> list[str | Turns]:
    """The questions without surrounding white space, as in training.

    Raises InputError for a question that is neither text nor turns that the student's prompt holds, is empty, or fills
    the model's positions.
    """
    many = len(questions) > 1
    stripped: list[str | Turns] = []
    for number, question in enumerate(questions, 1):
        which = f"question {number} of {len(questions)}" if many else "the question"
        if isinstance(question, tuple):
            problem = student.format.conversation_problem(question)
            if problem is not None:
                raise InputError(f"{which} cannot be asked: {problem}", "ask without those turns")
            stripped.append(question)
            continue
        if not isinstance(question, str):
            raise InputError(f"{which} is {type(question).__name__}, not text", "give a string, or a list of turns")
        if not question.strip():
            raise InputError(f"{which} is empty", "enter some text")
        stripped.append(question.strip())
    full = without_room(student.model, student.tokenizer, student.format, stripped)
    if full:
        which = f"question {full[0] + 1} of {len(questions)}" if many else "the question"
        raise InputError(
            f"{which} is too long: it fills all {max_positions(student.model)} positions of the student",
            "ask a shorter question",
        )
    return stripped


def _rationales(
    student: LoadedStudent,
    questions: Sequence[str | Turns],
    answers: Sequence[Decoded],
    batch_size: int,
    max_new_tokens: int,
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
        confidence=_mean_probability(decoded),
    )


def _mean_probability(decoded: Decoded) -> float:
    """Geometric mean over the answer's own tokens; 1 when there are none, as for `probability`."""
    own = decoded.log_probabilities
    return math.exp(sum(own) / len(own)) if own else 1.0
