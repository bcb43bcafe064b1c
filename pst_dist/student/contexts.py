"""The token sequence of each question, which the student continues, and how questions are cut into batches.

`generate` generates from these contexts. A batch depends only on the questions and the settings, so several processes
that each decode some of the batches give the same answers as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pst_dist.arms import ARMS, Segment
from pst_dist.data.sample import Turns
from pst_dist.models.load import positions_of
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.layout import Layout


@dataclass(frozen=True)
class Decoded:
    """What a student gave for one question."""

    text: str
    """All that was generated, without special tokens; a given rationale comes before it."""
    answer_text: str
    """The answer's raw text: what comes before the stop token; for pre_thinking what is between the format's answer
    marker and it, and "" when the marker never came."""
    answer_tokens: int
    """Tokens generated up to and including the stop token; all of them when it never came."""
    complete: bool
    """Whether the stop token came."""
    token_ids: list[int]
    """The generated tokens, including the one that ended the generation."""
    probability: float
    """What the student gives these tokens together, each after those before it; 1 when none was generated."""
    thought_first: bool = False
    """Whether a rationale comes before the answer in `text`."""
    log_probabilities: tuple[float, ...] = ()
    """Natural logarithm of the probability of each token of the answer, including its stop; without the rationale
    before it and its marker."""


@dataclass(frozen=True)
class Context:
    """What comes before the first generated token."""

    prompt: list[int]
    """What a causal model continues, or what an encoder reads."""
    decoder: list[int]
    """What a decoder continues, its start token first; empty for a causal model."""


@dataclass(frozen=True)
class BatchSize:
    """What a batch may hold."""

    questions: int
    tokens: int | None
    """Questions times the longest context and `new_tokens` together; None for no limit."""
    new_tokens: int
    """Most tokens generated per question."""

    def holds(self, count: int, longest: int) -> bool:
        """Whether so many questions fit, of which the longest context has `longest` tokens; one always fits."""
        if count > self.questions:
            return False
        return count == 1 or self.tokens is None or count * (longest + self.new_tokens) <= self.tokens


def answer_contexts(
    model: Any,
    tokenizer: Any,
    fmt: AnswerFormat,
    questions: Sequence[str | Turns],
    *,
    given: Sequence[str] | None = None,
    other: bool = False,
) -> list[Context]:
    """The context of each question's answer; `given` and `other` are those of `generate.decode_answers`."""
    layout = layout_of(model, tokenizer, fmt)
    asked = ARMS[fmt.arm].asked[-1 if other else 0]
    before = fmt.semantic_before and Segment.SEMANTIC in asked.order
    semantic = [layout.semantic_id] * (fmt.semantic_tokens if before else 0)
    thoughts = given_thoughts(layout, questions, given if asked.thinks_first else None)
    return [
        _context(model, layout.prompt_ids(question, other=other), [*semantic, *thought])
        for question, thought in zip(questions, thoughts, strict=True)
    ]


def rationale_contexts(
    model: Any, tokenizer: Any, fmt: AnswerFormat, questions: Sequence[str | Turns], answers: Sequence[Decoded]
) -> tuple[list[int], list[Context]]:
    """(places of the questions whose rationale has yet to be generated, the context of each).

    There is none for a rationale that was written before its answer, nor after an answer that is not complete.
    """
    arm, layout = ARMS[fmt.arm], layout_of(model, tokenizer, fmt)
    places, contexts = [], []
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if answer.thought_first:
            continue
        if arm.name == "prefix":
            contexts.append(_context(model, layout.prompt_ids(question, other=True), []))
        elif answer.complete:
            semantic = [layout.semantic_id] * (fmt.semantic_tokens if arm.aligned else 0)
            before, after = (semantic, []) if fmt.semantic_before else ([], semantic)
            contexts.append(_context(model, layout.prompt_ids(question), [*before, *answer.token_ids, *after]))
        else:
            continue
        places.append(place)
    return places, contexts


def layout_of(model: Any, tokenizer: Any, fmt: AnswerFormat) -> Layout:
    """The layout of a loaded student."""
    return Layout(tokenizer, fmt, is_encoder_decoder=bool(model.config.is_encoder_decoder))


def _context(model: Any, prompt: list[int], produced: list[int]) -> Context:
    """A prompt and what the student is taken to have produced already."""
    if model.config.is_encoder_decoder:
        return Context(prompt, [model.config.decoder_start_token_id, *produced])
    return Context([*prompt, *produced], [])


def given_thoughts(
    layout: Layout, questions: Sequence[str | Turns], rationales: Sequence[str] | None
) -> list[list[int]]:
    """Tokens of each given rationale and the marker, cut to half of max_length so that an answer has room; [] without
    rationales.
    """
    if rationales is None:
        return [[] for _ in questions]
    marker = layout.text_ids.text(layout.format.answer_marker)
    bodies = [layout.first_ids(text) for text in rationales]
    return [[*body[: layout.format.max_length // 2], *marker] for body in bodies]


def batches_of(contexts: Sequence[Context], size: BatchSize, positions: int | None) -> Iterator[list[int]]:
    """Places of the contexts that leave room for a token, sorted by length and cut.

    Decoders that start with different lengths never share a batch: so a decoder needs no padding on its left, which not
    every encoder-decoder takes. `positions` are those of `max_positions`.
    """
    with_room = [place for place, context in enumerate(contexts) if room(context, positions) >= 1]
    batch: list[int] = []
    for place in sorted(with_room, key=lambda place: (len(contexts[place].decoder), len(contexts[place].prompt))):
        context = contexts[place]
        fits = size.holds(len(batch) + 1, len(context.prompt) + len(context.decoder))
        if batch and not (fits and len(context.decoder) == len(contexts[batch[0]].decoder)):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def without_room(model: Any, tokenizer: Any, fmt: AnswerFormat, questions: Sequence[str | Turns]) -> list[int]:
    """Places of the questions that fill the model's positions, so that no answer token can be generated."""
    positions = max_positions(model)
    if positions is None:
        return []
    contexts = answer_contexts(model, tokenizer, fmt, questions)
    return [place for place, context in enumerate(contexts) if room(context, positions) < 1]


def max_positions(model: Any) -> int | None:
    """Tokens that a model has positions for; None when its positions are relative, as T5's are."""
    return positions_of(model.config)


def room(context: Context, positions: int | None) -> int:
    """Tokens that can be generated after a context; under 1 when it fills the model's positions."""
    if positions is None:
        return 2**31
    if context.decoder and len(context.prompt) <= positions:
        return positions - len(context.decoder)
    return positions - len(context.prompt)
