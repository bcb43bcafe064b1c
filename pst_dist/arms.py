"""The six arms: what each is asked for, in which order it produces it, and what it needs.

The arms are rows of one table, not six trainers: config, layout, plots, model card and experiments all read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

STOP_TOKEN = "<|answer_end|>"
SEMANTIC_TOKEN = "<|semantic|>"


class Segment(IntEnum):
    """Who owns a token."""

    PAD = 0
    PROMPT = 1
    ANSWER = 2
    SEMANTIC = 3
    RATIONALE = 4


@dataclass(frozen=True)
class Asked:
    """One thing a student is asked for: what stands before the question, and the segments to produce, in order."""

    prefix: str
    order: tuple[Segment, ...]

    @property
    def thinks_first(self) -> bool:
        """Whether the rationale comes before the answer."""
        order = self.order
        return Segment.ANSWER in order and Segment.RATIONALE in order[: order.index(Segment.ANSWER)]


@dataclass(frozen=True)
class Arm:
    """One way of distilling: what a student is asked for, and what that needs."""

    name: str
    asked: tuple[Asked, ...]
    """How the answer is asked for; then, in arms that learn two tasks at once, the other thing. Each sample gives one
    training sequence for each."""
    needs_rationale: bool
    aligned: bool

    @property
    def answers_first(self) -> bool:
        """Whether the answer comes before anything that could spoil it."""
        return not self.asked[0].thinks_first


_ANSWER, _SEMANTIC, _RATIONALE = Segment.ANSWER, Segment.SEMANTIC, Segment.RATIONALE


ARMS = {
    arm.name: arm
    for arm in (
        Arm("answer_only", (Asked("", (_ANSWER,)),), needs_rationale=False, aligned=False),
        Arm("pre_thinking", (Asked("", (_RATIONALE, _ANSWER)),), needs_rationale=True, aligned=False),
        # Distilling step-by-step, google-research/distilling-step-by-step: the task prefix chooses the output.
        Arm(
            "prefix",
            (Asked("predict: ", (_ANSWER,)), Asked("explain: ", (_RATIONALE,))),
            needs_rationale=True,
            aligned=False,
        ),
        Arm("post_thinking", (Asked("", (_ANSWER, _RATIONALE)),), needs_rationale=True, aligned=False),
        Arm("pst", (Asked("", (_ANSWER, _SEMANTIC, _RATIONALE)),), needs_rationale=True, aligned=True),
        # Both orders in one student, which chooses for each question (arXiv 2404.09170 v4 has soft prompts for that,
        # here it is the probability of the answer that it would give at once).
        Arm(
            "adaptive",
            (Asked("", (_ANSWER, _SEMANTIC, _RATIONALE)), Asked("think: ", (_RATIONALE, _ANSWER))),
            needs_rationale=True,
            aligned=True,
        ),
    )
}
