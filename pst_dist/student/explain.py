"""Answers and their rationales in one pass: the rationale continues from the answer's keys and values.

`generate.decode_rationales` computes prompt and answer a second time; here each batch continues where its answers
ended. This is for causal students that write the rationale after the answer, with attention over all earlier tokens.
For all other students `decode_explained` does the same work in two passes.
"""

# Shapes in this file: B questions of one batch, T tokens of the longest, P tokens of the longest prompt

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pst_dist.arms import ARMS, Segment
from pst_dist.distributed.device_memory import give_back, is_out_of_memory
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.batch_generation import (
    FinishedBatch,
    Greedy,
    Steering,
    continues_from_cache,
    evaluation_mode,
    until_end,
)
from pst_dist.student.contexts import Decoded, max_positions
from pst_dist.student.generate import decode_answers, decode_rationales, text_of
from pst_dist.student.saved import answer_generation_config


def decode_explained(
    model: Any,
    tokenizer: Any,
    fmt: AnswerFormat,
    questions: Sequence[Any],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_answers: Callable[[int], None] = lambda count: None,
    on_batch: Callable[[int], None] = lambda count: None,
    streamer: Any = None,
    reuse: bool = True,
) -> tuple[list[Decoded], list[str]]:
    """(answer, rationale or "") of every question, as `decode_answers` and then `decode_rationales` give them.

    `on_answers` is told how many questions of a batch have their answers, before their rationales are written, and
    `on_batch` how many are done. A rationale whose continuation runs out of memory is written anew. `reuse=False`
    computes prompts and answers again for the rationales.
    """
    parts = (model, tokenizer, fmt)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    if not (reuse and _goes_on(model, fmt)):

        def both(count: int) -> None:
            on_answers(count)
            on_batch(count)

        answers = decode_answers(*parts, questions, on_batch=both, streamer=streamer, **settings)
        return answers, decode_rationales(*parts, questions, answers, **settings)
    rationales = [""] * len(questions)

    def write(rows: list[int], answers: list[Decoded], finished: FinishedBatch) -> None:
        on_answers(len(rows))
        texts: list[str] | None = None
        try:
            texts = _continued(*parts, answers, finished, max_new_tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if texts is None:  # computed again, which is done in halves where that does not fit either
            finished.cache.clear()
            give_back()
            texts = decode_rationales(*parts, [questions[row] for row in rows], answers, **settings)
        for row, text in zip(rows, texts, strict=True):
            rationales[row] = text

    answers = decode_answers(*parts, questions, on_batch=on_batch, go_on=write, streamer=streamer, **settings)
    return answers, rationales


def _goes_on(model: Any, fmt: AnswerFormat) -> bool:
    """Whether the rationale follows the answer, in a model that can go on from its cache."""
    asked = ARMS[fmt.arm].asked[0]
    return (
        fmt.writes_rationale
        and not asked.thinks_first
        and Segment.RATIONALE in asked.order
        and continues_from_cache(model)
    )


def _continued(
    model: Any,
    tokenizer: Any,
    fmt: AnswerFormat,
    answers: Sequence[Decoded],
    finished: FinishedBatch,
    max_new_tokens: int,
) -> list[str]:
    """The rationale of each answer of a batch; "" for one that is not complete, or fills the model's positions."""
    after = fmt.semantic_tokens if ARMS[fmt.arm].aligned and not fmt.semantic_before else 0
    prompt = finished.mask_BP.shape[1]
    prompts = finished.mask_BP.sum(1).tolist()
    lengths = [own + len(answer.token_ids) + after for own, answer in zip(prompts, answers, strict=True)]
    positions = max_positions(model) or 2**31
    chosen = [k for k, answer in enumerate(answers) if answer.complete and lengths[k] < positions]
    rationales = [""] * len(answers)
    if not chosen:
        return rationales
    device = finished.ids_BT.device
    rows_B = torch.tensor(chosen, device=device)
    if len(chosen) < len(answers):
        for cache in finished.cache.values():
            cache.batch_select_indices(rows_B)
    stop_id, semantic_id = tokenizer.convert_tokens_to_ids([fmt.stop_token, fmt.semantic_token])
    semantic_BS = torch.full((len(chosen), after), semantic_id, dtype=torch.long, device=device)
    ids_BT = torch.cat([finished.ids_BT[rows_B], semantic_BS], dim=1)
    ends_B = torch.tensor([prompt + len(answers[k].token_ids) for k in chosen], device=device)
    answered_BT = torch.arange(prompt, finished.ids_BT.shape[1], device=device) < ends_B[:, None]
    # What pads a short answer lies between it and its rationale, and is not seen.
    mask_BT = torch.cat([finished.mask_BP[rows_B], answered_BT.long(), torch.ones_like(semantic_BS)], dim=1)
    settings = answer_generation_config(model, tokenizer, fmt)
    settings.eos_token_id = tokenizer.eos_token_id
    greedy = Greedy(Steering([tokenizer.eos_token_id], forbidden=[stop_id]), ids_BT.shape[1])
    with evaluation_mode(model, settings), torch.no_grad():
        output_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            **finished.cache,
            max_new_tokens=min(max_new_tokens, *(positions - lengths[k] for k in chosen)),
            logits_processor=[greedy],
        )
    for k, made in zip(chosen, output_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
        rationales[k] = text_of(tokenizer, until_end(made, [tokenizer.eos_token_id])).strip()
    return rationales
