"""A trained student at work: loaded and verified, asked, timed, and, where it learnt both, thinking first when unsure.

How tokens are generated is `decode`; from which certainty on an adaptive student answers at once is chosen by
`adaptive` on validation rows.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import torch

from pst_dist.errors import InputError
from pst_dist.student.generate import Decoded, decode_answers, decode_rationales, max_positions
from pst_dist.student.saved import LoadedStudent

log = logging.getLogger(__name__)


def after_thought(at_once: Decoded, thought: Decoded) -> Decoded:
    """The answer that was thought about: the tokens of the one at once are on its bill, and its probability is kept."""
    tokens = at_once.answer_tokens + thought.answer_tokens
    return replace(thought, answer_tokens=tokens, probability=at_once.probability)


def timed_answer(
    student: LoadedStudent, question: str, *, max_new_tokens: int, think_below: float = 0.0
) -> tuple[Decoded, float]:
    """One question's answer and its wall time in milliseconds, tokenising included, the device waited for.

    Where the probability of the answer at once is under `think_below`, the student thinks first and answers anew.
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
) -> dict[str, Any]:
    """What `pst answer` prints: answer, complete, answer_tokens, milliseconds and, with `explain`, the rationale.

    `think_below` is an adaptive student's: less sure than that of its answer, it thinks first; `thought_first` says
    whether it did. The rationale is None where the arm does not write one. Raises InputError for an empty
    question or one that leaves the model no position to answer in.
    """
    if not question.strip():
        raise InputError("the question is empty", "give it in quotes")
    answer, milliseconds = timed_answer(student, question, max_new_tokens=max_new_tokens, think_below=think_below)
    if not answer.token_ids:
        raise InputError(
            f"the question fills all {max_positions(student.model)} positions of the student", "ask a shorter one"
        )
    result: dict[str, Any] = {
        "answer": answer.answer_text.strip(),
        "complete": answer.complete,
        "answer_tokens": answer.answer_tokens,
        "milliseconds": milliseconds,
        "thought_first": answer.thought_first,
    }
    if explain:
        (rationale,) = decode_rationales(
            student.model,
            student.tokenizer,
            student.format,
            [question],
            [answer],
            batch_size=1,
            max_new_tokens=max_new_tokens,
        )
        result["rationale"] = rationale or None
    return result
