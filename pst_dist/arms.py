"""The six arms: what each student generates and in which order, what it needs, its description and its colour.

The arms are rows of one table, not six trainers: config, layout, loss, plots, model card and experiments read it. To
add an arm, add a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

STOP_TOKEN = "<|answer_end|>"
SEMANTIC_TOKEN = "<|semantic|>"


class Segment(IntEnum):
    """The part of a sequence that a token belongs to."""

    PAD = 0
    PROMPT = 1
    ANSWER = 2
    SEMANTIC = 3
    RATIONALE = 4


@dataclass(frozen=True)
class Asked:
    """One task of a student: the prefix of the question, and the segments to generate, in order."""

    prefix: str
    order: tuple[Segment, ...]

    @property
    def thinks_first(self) -> bool:
        """Whether the rationale comes before the answer."""
        order = self.order
        return Segment.ANSWER in order and Segment.RATIONALE in order[: order.index(Segment.ANSWER)]


@dataclass(frozen=True)
class Arm:
    """One way of distilling: what the student generates, and what that requires."""

    name: str
    asked: tuple[Asked, ...]
    """How to ask for the answer, followed by the second task in arms that learn two. Each sample gives one training
    sequence per task."""
    needs_rationale: bool
    """Whether every training row needs a teacher's rationale."""
    aligned: bool
    """Whether a hidden state is aligned with an embedding of the teacher's rationale; needs `pst embed`."""
    description: str
    """One line that continues "a student": for the model card, the help and the docs."""
    colour: str
    """Its colour on every page and plot, `#rrggbb`."""

    @property
    def answers_first(self) -> bool:
        """Whether the answer comes before the rationale."""
        return not self.asked[0].thinks_first

    @property
    def chooses_order(self) -> bool:
        """Whether it learns both to answer first and to think first, so that it can choose for each question."""
        return self.answers_first and any(asked.thinks_first for asked in self.asked[1:])


_ANSWER, _SEMANTIC, _RATIONALE = Segment.ANSWER, Segment.SEMANTIC, Segment.RATIONALE


ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            "answer_only",
            (Asked("", (_ANSWER,)),),
            needs_rationale=False,
            aligned=False,
            description="trained on questions and answers alone",
            colour="#5b6472",
        ),
        Arm(
            "pre_thinking",
            (Asked("", (_RATIONALE, _ANSWER)),),
            needs_rationale=True,
            aligned=False,
            description="trained to write a rationale first and then the answer",
            colour="#d0790b",
        ),
        # Distilling step-by-step, google-research/distilling-step-by-step: the task prefix chooses the output.
        Arm(
            "prefix",
            (Asked("predict: ", (_ANSWER,)), Asked("explain: ", (_RATIONALE,))),
            needs_rationale=True,
            aligned=False,
            description="trained on two tasks: the prefix `predict: ` asks for the answer, `explain: ` for the "
            "rationale",
            colour="#0f8a6d",
        ),
        Arm(
            "post_thinking",
            (Asked("", (_ANSWER, _RATIONALE)),),
            needs_rationale=True,
            aligned=False,
            description="trained to answer first and to give the rationale after the answer",
            colour="#2f6fdb",
        ),
        Arm(
            "pst",
            (Asked("", (_ANSWER, _SEMANTIC, _RATIONALE)),),
            needs_rationale=True,
            aligned=True,
            description="trained to answer first and to give the rationale after the answer, with a hidden state "
            "aligned with a sentence embedding of the teacher's rationale",
            colour="#c2255c",
        ),
        # Both orders in one student, which chooses for each question. arXiv 2404.09170 v4 chooses with soft prompts;
        # here the probability of the immediate answer decides.
        Arm(
            "adaptive",
            (Asked("", (_ANSWER, _SEMANTIC, _RATIONALE)), Asked("think: ", (_RATIONALE, _ANSWER))),
            needs_rationale=True,
            aligned=True,
            description="trained to answer first and, after the prefix `think: `, to write a rationale before the "
            "answer",
            colour="#7b4fc9",
        ),
    )
}

BASELINE = "answer_only"
"""The arm that others are tested against: the same rows without any rationale."""
COST_BASELINE = "pre_thinking"
"""The arm whose tokens to the answer are divided by each arm's: the cost of thinking before answering."""
