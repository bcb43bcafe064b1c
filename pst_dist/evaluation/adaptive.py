"""When an adaptive student thinks before it answers, and what that costs and gains.

Later versions of arXiv 2404.09170 add a perception module of soft prompts that chooses between thinking before and
after the answer. Here the student's own confidence decides: if the probability of its immediate answer is below a
threshold, it thinks first. The threshold is chosen on validation rows.
"""

# Shapes in this file: R rows

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pst_dist.config.schema import EvaluateConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.errors import InputError
from pst_dist.student.ask import after_thought
from pst_dist.student.contexts import Decoded

ALWAYS = 2.0
"""A threshold that no probability reaches."""


@dataclass(frozen=True)
class BothWays:
    """Rows answered both immediately and after thinking."""

    probability_R: np.ndarray
    """float64: probability of the immediate answer."""
    right_R2: np.ndarray
    """bool: whether the immediate answer and the one after thinking are correct."""
    tokens_R2: np.ndarray
    """int64: tokens of the immediate answer, and of the one after thinking alone."""

    @classmethod
    def of(
        cls, at_once: Sequence[Decoded], thought: Sequence[Decoded], right: Callable[[int, Decoded], bool]
    ) -> BothWays:
        """From decoded answers; `right` takes the row's index and an answer."""
        pairs = list(zip(at_once, thought, strict=True))
        return cls(
            np.array([first.probability for first, _ in pairs]),
            np.array([[right(row, answer) for answer in pair] for row, pair in enumerate(pairs)]),
            np.array([[answer.answer_tokens for answer in pair] for pair in pairs]),
        )

    def at(self, think_below: float) -> dict[str, float]:
        """Accuracy, its binomial standard error, tokens to the answer and share of rows that think, at a threshold."""
        thinks_R = self.probability_R < think_below
        accuracy = float(np.where(thinks_R, self.right_R2[:, 1], self.right_R2[:, 0]).mean())
        return {
            "think_below": think_below,
            "thinking": float(thinks_R.mean()),
            "accuracy": accuracy,
            "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / len(thinks_R)),
            "tokens": float((self.tokens_R2[:, 0] + np.where(thinks_R, self.tokens_R2[:, 1], 0)).mean()),
        }

    def choices(self) -> list[float]:
        """Every threshold that gives a different result: never, between each two probabilities, always."""
        found = np.unique(self.probability_R)
        return [0.0, *((found[1:] + found[:-1]) / 2).tolist(), ALWAYS]

    def trade_off(self, points: int = 20) -> list[dict[str, float]]:
        """Results at thresholds from never to always, evenly spread over the rows."""
        choices = self.choices()
        places = np.unique(np.linspace(0, len(choices) - 1, points).round().astype(int))
        return [self.at(choices[place]) for place in places]


def choose_threshold(rows: BothWays) -> float:
    """The threshold with the fewest tokens whose accuracy is within one standard error of the best.

    The one-standard-error rule of Breiman et al., Classification and Regression Trees (1984), section 3.4.3.
    """
    found = [rows.at(threshold) for threshold in rows.choices()]
    best = max(found, key=lambda one: one["accuracy"])
    near = [one for one in found if one["accuracy"] >= best["accuracy"] - best["accuracy_stderr"]]
    return min(near, key=lambda one: (one["tokens"], -one["accuracy"]))["think_below"]


def chosen_threshold(evaluations: Sequence[dict[str, Any]]) -> float | None:
    """The threshold of the first evaluation of an adaptive student on its run's own rows; None without one."""
    own = (results for results in evaluations if results.get("adaptive") and not results.get("source"))
    return next((results["adaptive"]["think_below"] for results in own), None)


def adaptive_answers(
    settings: EvaluateConfig,
    samples: Sequence[ReasoningSample],
    validation: Sequence[ReasoningSample],
    decode: Callable[[Sequence[ReasoningSample], bool], list[Decoded]],
    right: Callable[[ReasoningSample, Decoded], bool],
) -> tuple[list[Decoded], dict[str, Any]]:
    """(each sample's answer, the `adaptive` section of the results); every sample is decoded both ways.

    The threshold is settings.think_below if set, otherwise it is chosen on the validation rows. `decode` answers
    immediately, or after thinking when its second argument is true. Raises InputError without validation rows.
    """

    def both(rows: Sequence[ReasoningSample]) -> tuple[list[Decoded], list[Decoded], BothWays]:
        at_once, thought = decode(rows, False), decode(rows, True)
        return at_once, thought, BothWays.of(at_once, thought, lambda row, answer: right(rows[row], answer))

    if settings.think_below is None and not len(validation):
        raise InputError(
            "there are no validation rows on which to choose the adaptive student's threshold",
            "set data.validation_size and train again, or set evaluate.think_below",
        )
    at_once, thought, scored = both(samples)
    if settings.think_below is not None:
        threshold, chosen_on = settings.think_below, "config"
    else:
        chosen = scored if settings.split == "validation" else both(validation)[2]
        threshold, chosen_on = choose_threshold(chosen), "validation"
    answers = [
        after_thought(first, second) if first.probability < threshold else first
        for first, second in zip(at_once, thought, strict=True)
    ]
    account = {
        **scored.at(threshold),
        "chosen_on": chosen_on,
        "at_once": scored.at(0.0),
        "always_thinking": scored.at(ALWAYS),
        "trade_off": scored.trade_off(),
    }
    return answers, account
