"""The labels of `pst probe`: something about the answer that has few enough classes for a linear probe.

That is the answer itself, the first characters of a text, or whether a number is above the median.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pst_dist.data.sample import ReasoningSample

_LEAST_PER_CLASS = 5
"""Rows per class on average, below which a probe cannot learn the classes."""
_POSITIONS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Label:
    """A property of the answer that a probe predicts."""

    name: str
    classes: np.ndarray
    """[n] int, 0 … C - 1."""


def labels_of(samples: Sequence[ReasoningSample]) -> tuple[list[Label], str]:
    """The labels of these answers, and the reason if there are none ("" otherwise)."""
    answers = [sample.answer for sample in samples]
    if all(sample.answer_type == "number" for sample in samples):
        return _number_label(answers)
    found = _label("answer", answers)
    if found is not None:
        return [found], ""
    letters = [_label(f"{_POSITIONS[k]} character", [answer[k] for answer in answers]) for k in _places(answers)]
    labels = [label for label in letters if label is not None]
    if labels:
        return labels, ""
    kinds = Counter(answers)
    if len(kinds) == 1:
        return [], f"every row has the same answer, {answers[0][:40]!r}"
    return [], f"{len(kinds):,} different answers in {len(answers):,} rows are too many classes"


def _places(answers: Sequence[str]) -> range:
    """Positions of the characters that every answer has, at most four."""
    return range(min(len(_POSITIONS), min(map(len, answers))))


def _label(name: str, values: Sequence[str]) -> Label | None:
    """The classes of some values; None when there is only one, or when there are too few rows per class."""
    kinds, classes = np.unique(np.array(values), return_inverse=True)
    if len(kinds) < 2 or len(values) < _LEAST_PER_CLASS * len(kinds):
        return None
    return Label(name, classes.reshape(-1).astype(np.int64))


def _number_label(answers: Sequence[str]) -> tuple[list[Label], str]:
    """The label of numbers, whether one is above the median; and the reason if there is none."""
    try:
        numbers = np.array([float(answer) for answer in answers])
    except ValueError as error:
        return [], f"a number could not be read ({error})"
    middle = float(np.median(numbers))
    label = _label(f"answer above {middle:g}", [str(number > middle) for number in numbers])
    return ([label], "") if label is not None else ([], "the answers have no upper half: one number is too frequent")
