"""The result of a comparison in sentences: accuracy and tokens of each arm, and whether the difference is conclusive.

A difference counts when the 95 % interval of its paired bootstrap excludes zero. The sentences are the first thing on
the page of a comparison and the last thing that `pst compare` and `pst run` print.
"""

from __future__ import annotations

import numpy as np

from pst_dist.arms import ARMS, COST_BASELINE
from pst_dist.evaluation.compare import ArmResult, Comparison
from pst_dist.evaluation.statistics import PairedTest, paired_test

_CONTROLS = ("shuffled embeddings", "no alignment", "shuffled rationale tokens")
"""Variants (`config.variant`) that are controls of the arm without them."""


def verdict(comparison: Comparison) -> list[str]:
    """One to five sentences: scores, the best answer-first arm against the baseline, its cost, its controls, seeds."""
    ranked = sorted(comparison.arms, key=lambda arm: -arm.results["accuracy"])
    baseline = next(arm for arm in comparison.arms if arm.label == comparison.baseline)
    scores = "; ".join(
        f"{arm.label} {'answers ' if place == 0 else ''}{100 * arm.results['accuracy']:.1f} % at "
        f"{arm.results['tokens_to_answer']['mean']:.1f} tokens"
        for place, arm in enumerate(ranked)
    )
    sentences = [f"{scores}."]
    best = next((arm for arm in ranked if arm is not baseline and answers_first(arm)), None)
    if best is not None and best.test is not None:
        sentences.append(_against(best.label, baseline.label, best.test))
        if best.times_fewer_tokens and best.times_fewer_tokens > 1 and best.results["accuracy"] > 0:
            sentences.append(f"It writes {best.times_fewer_tokens:.1f} times fewer tokens than {COST_BASELINE}.")
    sentences += _above_the_most_frequent(ranked[0])
    sentences += [_control(plain, control) for plain, control in _controlled(comparison)]
    if len({arm.results["seed"] for arm in comparison.arms}) == 1:
        sentences.append("One seed: the intervals cover the choice of rows, not of seeds.")
    return sentences


def answers_first(arm: ArmResult) -> bool:
    """Whether the arm writes its answer before any rationale, and is not a control."""
    known = ARMS.get(arm.results["arm"])
    return known is not None and known.answers_first and not any(name in _CONTROLS for name in arm.results["variant"])


def differs(test: PairedTest) -> bool:
    """Whether the 95 % interval of the difference excludes zero."""
    return test.low > 0 or test.high < 0


def _above_the_most_frequent(best: ArmResult) -> list[str]:
    """A warning when no arm is better than one constant answer by more than two standard errors of its accuracy."""
    majority = best.results.get("majority")
    if majority is None or best.results["accuracy"] > majority + 2 * best.results["accuracy_stderr"]:
        return []
    return [f"No arm is measurably better than always giving the most frequent answer ({100 * majority:.1f} %)."]


def _against(arm: str, other: str, test: PairedTest) -> str:
    points = f"{abs(100 * test.difference):.1f} points"
    interval = f"(95 % interval {100 * test.low:+.1f} to {100 * test.high:+.1f})"
    if not differs(test):
        return (
            f"{arm} and {other} do not differ measurably on these rows: {100 * test.difference:+.1f} points {interval}."
        )
    return f"{arm} is {points} {'ahead of' if test.difference > 0 else 'behind'} {other} {interval}."


def _controlled(comparison: Comparison) -> list[tuple[ArmResult, ArmResult]]:
    """(arm, its control) for every control whose arm was scored too, with the same other settings and seed."""
    found = []
    for control in comparison.arms:
        own = [name for name in control.results["variant"] if name in _CONTROLS]
        rest = [name for name in control.results["variant"] if name not in _CONTROLS]
        for plain in comparison.arms if own else ():
            same = plain.results["arm"] == control.results["arm"] and plain.results["seed"] == control.results["seed"]
            if same and plain.results["variant"] == rest:
                found.append((plain, control))
    return found


def _control(plain: ArmResult, control: ArmResult) -> str:
    right = [np.array([row["correct"] for row in arm.samples], dtype=bool) for arm in (plain, control)]
    test = paired_test(*right)
    sentence = _against(plain.label, f"its control ({control.label})", test)
    if differs(test) and test.difference > 0:
        return sentence
    return f"{sentence} So this comparison does not show that what the control removes helps."
