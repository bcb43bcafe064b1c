"""Checks many rows at once for what training would refuse: a row that does not fit, an answer that cannot be written.

`Layout.sequences` decides. Laying out ten million rows one by one takes hours, so texts are encoded a batch at a time,
which shows for nearly every row that it fits with room to spare; only the others are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pst_dist.arms import Segment
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks import Task
from pst_dist.student.layout import Layout
from pst_dist.student.tokenizer import unwritable_answers

AT_ONCE = 256
"""Rows that are best checked together."""
_SPARE = 16
"""Tokens that a row must leave free: behind a chat template an answer may take a few more than on its own."""


def check_rows(
    layout: Layout, samples: Sequence[ReasoningSample], task_of: Callable[[ReasoningSample], Task]
) -> list[ReasoningSample]:
    """The samples whose answer changes when it is encoded and decoded, so that it can never be scored correct.

    Raises DataError, as `Layout.sequences` does, for the first sample that cannot be laid out.
    """
    lost = []
    answers = layout.text_ids.texts([" " + sample.answer for sample in samples])
    fits = _surely_fit(layout, samples, [len(ids) for ids in answers])
    for sample, ids, fine in zip(samples, answers, fits, strict=True):
        if not fine:
            layout.sequences(sample)
        if not ids or _decoded(layout, ids) != " " + sample.answer:
            lost += unwritable_answers(layout.text_ids, [sample], task_of(sample))
    return lost


def _decoded(layout: Layout, ids: list[int]) -> str:
    text: str = layout.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _surely_fit(layout: Layout, samples: Sequence[ReasoningSample], answers: list[int]) -> list[bool]:
    """Whether each sample certainly can be laid out; `answers` are their lengths in tokens, 0 where unknown."""
    fmt, arm = layout.format, layout.arm
    rationales = [bool(sample.rationales) for sample in samples]
    fine = [
        length > 0 and not sample.turns and (has_rationale or not arm.needs_rationale)
        for length, sample, has_rationale in zip(answers, samples, rationales, strict=True)
    ]
    if layout.keep_rationale and any(Segment.RATIONALE in asked.order for asked in arm.asked):
        texts = [" " + sample.rationales[0] if sample.rationales else " a" for sample in samples]
        fine = [was and bool(ids) for was, ids in zip(fine, layout.text_ids.texts(texts), strict=True)]
    room = fmt.max_length - len(layout.text_ids.text(fmt.answer_marker)) - fmt.semantic_tokens - 2 - _SPARE
    for index in range(len(arm.asked)):
        pieces = [fmt.pieces(sample.question, other=index > 0) for sample in samples]
        prompts = [len(ids) for ids in layout.text_ids.mixed_texts(pieces)]
        fine = [
            was and prompt > 0 and (max(prompt, answer) if layout.is_encoder_decoder else prompt + answer) <= room
            for was, prompt, answer in zip(fine, prompts, answers, strict=True)
        ]
    return fine
