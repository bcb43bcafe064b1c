"""Greedy decoding that ends where the answer ends, and the rationale on request.

`contexts` has what the student continues and how questions are cut into batches. Generation uses transformers'
`generate` with the settings saved in the export. `data.tasks` decides whether an answer is correct;
`evaluation.evaluate` computes the scores.
"""

# Shapes in this file: B questions of one batch, T tokens of the longest

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pst_dist.arms import ARMS
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.data.tasks import Task
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
from pst_dist.student.layout import AnswerFormat
from pst_dist.student.saved import answer_generation_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedBatch:
    """A batch at the end of its generation, from which it can go on."""

    ids_BT: torch.Tensor
    """int64: padding, prompt, generated tokens, padding."""
    mask_BP: torch.Tensor
    """int64: 1 for the tokens of each prompt, 0 for the padding on its left; P is the length of the longest prompt."""
    cache: dict[str, Any]
    """Keys and values of all columns but the last, under the name by which `generate` takes them."""


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
    questions times the longest prompt and max_new_tokens together; at least one question. A model with a fixed number
    of positions generates no further than they reach: in a batch the longest prompt sets the limit, and a question that
    fills them all is left unanswered. `given` are rationales that pre_thinking is taken to have written, one a
    question; arms that answer first have not come to theirs yet when the answer is there. Where the rationale comes
    first, neither the stop nor the end-of-sequence token is taken before the answer's marker: it would leave the
    question without an answer. `other` has an adaptive student think first. `on_batch` is told how many questions each
    batch has finished, `on_token` after each token how many each question of the batch has. `go_on` receives the places
    of a batch's questions, their answers and the finished batch. `streamer` is transformers' and takes a single
    question. The model is decoded in evaluation mode and left in the mode it had.
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
            go_on(rows, [answer for row in rows if (answer := decoded[row]) is not None], finished)
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
) -> Iterator[tuple[list[int], list[tuple[list[int], list[float]]], FinishedBatch | None]]:
    """Batches of (row indices, generated ids and their log probabilities of each, the finished batch with `keep`).

    Each row is cut after its first end token. No row takes a `forbidden` token as long as `is_open` of the ids that it
    has generated.
    """
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    positions = max_positions(model)
    rooms = [room(context, positions) for context in contexts]
    full = [row for row, tokens in enumerate(rooms) if tokens < 1]
    if full:
        log.warning("%d question(s) fill all %s positions of the student: no answer", len(full), positions)
        yield full, [([], []) for _ in full], None
    with evaluation_mode(model, settings):
        for rows in batches_of(contexts, size, positions):
            most = min(size.new_tokens, *(rooms[row] for row in rows))
            batch = [contexts[row] for row in rows]
            start = len(batch[0].decoder) or max(len(context.prompt) for context in batch)
            greedy = Greedy(forbidden, start, is_open, on_token)
            output, log_probabilities, finished = _generate_batch(
                model, batch, settings.pad_token_id, most, greedy, keep=keep, streamer=streamer
            )
            cut = [until_end(ids, ends) for ids in output]
            pairs = zip(cut, log_probabilities, strict=True)
            yield rows, [(ids, own[: len(ids)]) for ids, own in pairs], finished


class Greedy:
    """A logits processor that keeps the log probability of each step's token and masks ends that come too early.

    Where a row would take a `forbidden` token and `is_open` says that it may not end yet, that token and the others of
    them are masked. The probabilities are those before masking.
    """

    def __init__(
        self,
        forbidden: Sequence[int],
        start: int,
        is_open: Callable[[list[int]], bool],
        on_token: Callable[[int], None] = lambda count: None,
    ) -> None:
        """`start` is the place of the first generated token; `on_token` is told after each how many there are."""
        self.forbidden, self.start, self.is_open, self.on_token = list(forbidden), start, is_open, on_token
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits_BV = scores.float()
        best_B = logits_BV.argmax(-1)
        if self.forbidden:
            rows = torch.isin(best_B, best_B.new_tensor(self.forbidden)).nonzero().flatten().tolist()
            early = [row for row in rows if self.is_open(input_ids[row, self.start :].tolist())]
            if early:
                scores = scores.clone()
                places = torch.tensor(early, device=scores.device)
                scores[places[:, None], best_B.new_tensor(self.forbidden)] = -math.inf
                best_B = scores.argmax(-1)
        self.steps.append(logits_BV.log_softmax(-1).gather(-1, best_B[:, None])[:, 0])
        self.on_token(len(self.steps))
        return scores


def _generate_batch(
    model: Any,
    batch: Sequence[Context],
    pad: int,
    most: int,
    greedy: Greedy,
    *,
    keep: bool,
    streamer: Any,
) -> tuple[list[list[int]], list[list[float]], FinishedBatch | None]:
    """The ids that `generate` adds to each context, padding included, the log probability of each, and the batch."""
    device = model.get_input_embeddings().weight.device
    length = max(len(context.prompt) for context in batch)
    seq2seq = bool(batch[0].decoder)
    ids, mask = [], []
    for context in batch:
        fill = length - len(context.prompt)
        # A causal model continues at the right edge, so what is missing stands on the left.
        ids.append(context.prompt + [pad] * fill if seq2seq else [pad] * fill + context.prompt)
        ones = [1] * len(context.prompt)
        mask.append(ones + [0] * fill if seq2seq else [0] * fill + ones)
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    if seq2seq:
        inputs["decoder_input_ids"] = torch.tensor([context.decoder for context in batch], device=device)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=most,
            logits_processor=[greedy],
            streamer=streamer,
            return_dict_in_generate=True,
        )
    finished = FinishedBatch(output.sequences, inputs["attention_mask"], _cache_of(output)) if keep else None
    return output.sequences[:, greedy.start :].tolist(), torch.stack(greedy.steps, dim=1).tolist(), finished


def _cache_of(output: Any) -> dict[str, Any]:
    """The cache in an output of `generate`; transformers renamed it in version 5."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Up to and including the first end token; what follows is padding."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


@contextlib.contextmanager
def evaluation_mode(model: Any, settings: Any) -> Iterator[None]:
    """Evaluation mode and our generation settings, which replace the model's own until the end of the block.

    Merely passing settings would let a pretrained model's repetition penalty and the like through, which the
    export does not have.
    """
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


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
