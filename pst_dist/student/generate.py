"""Greedy decoding that ends where the answer ends, and the rationale on request.

`contexts` has what the student continues and how questions are cut into batches, `decode_memory` halves a batch that
does not fit in memory, and `batch_generation` generates one with transformers' `generate` and the settings saved in the
export. `data.tasks` decides whether an answer is correct; `evaluation.evaluate` computes the scores.
"""

# Shapes in this file: B questions of one batch, T tokens of the longest

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.data.tasks import Task
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.batch_generation import FinishedBatch, Steering, evaluation_mode, generate_batch
from pst_dist.student.contexts import (
    BatchSize,
    Context,
    Decoded,
    answer_contexts,
    batches_of,
    given_thoughts,
    layout_of,
    max_positions,
    rationale_contexts,
    room,
)
from pst_dist.student.decode_memory import in_parts
from pst_dist.student.saved import answer_generation_config

log = logging.getLogger(__name__)


def decode_answers(
    model: Any,
    tokenizer: Any,
    fmt: AnswerFormat,
    questions: Sequence[str | Turns],
    *,
    batch_size: int,
    max_new_tokens: int,
    batch_tokens: int | None = None,
    given: Sequence[str] | None = None,
    other: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_token: Callable[[int], None] = lambda count: None,
    go_on: Callable[[list[int], list[Decoded], FinishedBatch], None] | None = None,
    streamer: Any = None,
) -> list[Decoded]:
    """Answer every question greedily; the results are in the order of `questions`, which are as `fmt.asked` gives them.

    Questions of like length are decoded together, each until its stop token, its end-of-sequence token or
    max_new_tokens. A batch has at most `batch_size` questions and, with `batch_tokens`, at most so many tokens: its
    questions times the longest prompt and max_new_tokens together; at least one question. Without `batch_tokens`, what
    a GPU would not hold is decoded in halves, and so is any batch that runs out of memory; EnvironmentFault is raised
    for a question that does so by itself. A model with a fixed number of positions generates no further than they
    reach: in a batch the longest prompt sets the limit, and a question that fills them all is left unanswered. `given`
    are rationales that pre_thinking is taken to have written, one a question; arms that answer first have not come to
    theirs yet when the answer is there. Where the rationale comes first, neither the stop nor the end-of-sequence token
    is taken before the answer's marker: it would leave the question without an answer. `other` has an adaptive student
    think first. `on_batch` is told how many questions each batch has finished, `on_token` after each token how many
    each question of the batch has. `go_on` receives the places of a batch's questions, their answers and the finished
    batch. `streamer` is transformers' and takes a single question. The model is decoded in evaluation mode and left in
    the mode it had.
    """
    layout, asked = layout_of(model, tokenizer, fmt), ARMS[fmt.arm].asked[-1 if other else 0]
    contexts = answer_contexts(model, tokenizer, fmt, questions, given=given, other=other)
    thoughts = given_thoughts(layout, questions, given if asked.thinks_first else None)
    settings = answer_generation_config(model, tokenizer, fmt)
    decoded: list[Decoded | None] = [None] * len(questions)
    marker = fmt.answer_marker.strip()
    early = settings.eos_token_id if asked.thinks_first and given is None else ()

    def before_marker(generated: list[int]) -> bool:
        return marker not in text_of(tokenizer, generated)

    size = BatchSize(batch_size, batch_tokens, max_new_tokens)
    extra: dict[str, Any] = {"on_token": on_token, "keep": go_on is not None, "streamer": streamer}
    made = _generate(model, contexts, settings, size, forbidden=early, is_open=before_marker, **extra)
    for rows, generated, finished in made:
        for row, (ids, log_probabilities) in zip(rows, generated, strict=True):
            # Nothing follows the stop token; an end-of-sequence token without one ends an answer that is not complete.
            text = text_of(tokenizer, [*thoughts[row], *ids])
            first = 0
            if asked.thinks_first and given is None:
                first = next((n for n in range(len(ids) + 1) if not before_marker(ids[:n])), len(ids))
            decoded[row] = Decoded(
                text=text,
                answer_text=text.partition(marker)[2] if asked.thinks_first else text,
                answer_tokens=len(ids),
                complete=layout.stop_id in ids,
                token_ids=ids,
                probability=math.exp(sum(log_probabilities)),
                thought_first=asked.thinks_first,
                log_probabilities=tuple(log_probabilities[first:]),
            )
        if go_on is not None and finished is not None:
            go_on(list(rows), [answer for row in rows if (answer := decoded[row]) is not None], finished)
            finished.cache.clear()  # before the next batch makes its own
        if on_batch is not None:
            on_batch(len(rows))
    return [answer for answer in decoded if answer is not None]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, special tokens left out and no space moved."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _generate(
    model: Any,
    contexts: Sequence[Context],
    settings: Any,
    size: BatchSize,
    *,
    forbidden: Sequence[int] = (),
    is_open: Callable[[list[int]], bool] = lambda generated: True,
    on_token: Callable[[int], None] = lambda count: None,
    keep: bool = False,
    streamer: Any = None,
) -> Iterator[tuple[Sequence[int], list[tuple[list[int], list[float]]], FinishedBatch | None]]:
    """Batches of (row indices, generated ids and their log probabilities of each, the finished batch with `keep`).

    `forbidden`, `is_open` and `on_token` are those of `Steering`.
    """
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    steering = Steering(ends, forbidden, is_open, on_token)
    positions = max_positions(model)
    rooms = [room(context, positions) for context in contexts]
    full = [row for row, tokens in enumerate(rooms) if tokens < 1]
    if full:
        log.warning("%d question(s) fill all %s positions of the student and get no answer", len(full), positions)
        yield full, [([], []) for _ in full], None
    with evaluation_mode(model, settings):
        for rows in batches_of(contexts, size, positions):
            most = min(size.new_tokens, *(rooms[row] for row in rows))

            def generate(part: Sequence[int], most: int = most) -> tuple[Any, FinishedBatch | None]:
                batch = [contexts[row] for row in part]
                return generate_batch(model, batch, settings.pad_token_id, most, steering, keep=keep, streamer=streamer)

            new = 2 * most if keep else most  # what is kept goes on
            for part, (made, finished) in in_parts(model, rows, contexts, new, generate, estimate=size.tokens is None):
                yield part, made, finished


def decode_rationales(
    model: Any,
    tokenizer: Any,
    fmt: AnswerFormat,
    questions: Sequence[str | Turns],
    answers: Sequence[Decoded],
    *,
    batch_size: int,
    max_new_tokens: int,
    batch_tokens: int | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
    on_token: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The rationale of each answer, in order; "" where the arm writes none.

    Answer-first arms go on after the answer (and the semantic token) until the end-of-sequence token, so an answer
    that was not complete has "" too; the prefix arm is asked anew with its own prompt; pre_thinking has written it
    already, before the marker, and so has an adaptive student where it thought first. `on_batch` and `on_token` are
    those of `decode_answers`.
    """
    if not fmt.writes_rationale or not ARMS[fmt.arm].needs_rationale:
        return [""] * len(questions)
    marker = fmt.answer_marker.strip()
    rationales = [answer.text.partition(marker)[0].strip() if answer.thought_first else "" for answer in answers]
    places, contexts = rationale_contexts(model, tokenizer, fmt, questions, answers)
    settings = answer_generation_config(model, tokenizer, fmt)
    settings.eos_token_id = tokenizer.eos_token_id
    # The stop belongs to answers; a student whose stop began as a copy of a newline would take it for one here.
    stop = [tokenizer.convert_tokens_to_ids(fmt.stop_token)]
    size = BatchSize(batch_size, batch_tokens, max_new_tokens)
    for rows, generated, _ in _generate(model, contexts, settings, size, forbidden=stop, on_token=on_token):
        for row, (ids, _) in zip(rows, generated, strict=True):
            rationales[places[row]] = text_of(tokenizer, ids).strip()
        on_batch(len(rows))
    return rationales


def predict(task: Task, fmt: AnswerFormat, decoded: Decoded) -> str | None:
    """The cleansed answer of one generation; None is a parse failure.

    An answer at once is scored on the text before the stop token. For one after a rationale it is Fine-tune-CoT's
    rule: the first candidate after the marker, or the last of the whole text when the marker never came.
    """
    if decoded.thought_first:
        return task.extract(decoded.text, fmt.answer_marker.strip())
    return task.cleanse(decoded.answer_text)


def is_right(task: Task, fmt: AnswerFormat, sample: ReasoningSample, answer: Decoded) -> bool:
    """Whether a generation answers a sample."""
    return task.is_correct(predict(task, fmt, answer), sample.answer)
