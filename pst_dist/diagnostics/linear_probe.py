"""Linear probes: how well ridge regression predicts a label from vectors, on rows that it was not fitted to.

Five folds; the regularisation of each fit is chosen on its own training rows, by their leave-one-out predictions, which
ridge regression has in closed form. So no row takes part in any choice that it is scored with. Only numpy is used.
`diagnostics.probe` chooses the vectors and labels.
"""

# Shapes in this file: n rows, D width, C columns of a target

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

FOLDS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the regularisation, over the mean squared norm of the centred rows."""


def fold_of_rows(rows: int, seed: int = 0) -> np.ndarray:
    """[n] int: the fold of each row, in random order and of equal size up to one."""
    order = np.random.Generator(np.random.Philox(key=[seed, 17])).permutation(rows)
    folds = np.empty(rows, dtype=np.int64)
    folds[order] = np.arange(rows) % FOLDS
    return folds


def predicted(vectors_nD: np.ndarray, targets_nC: np.ndarray, folds_n: np.ndarray, score: Score) -> np.ndarray:
    """[n, C] float64: each row's target as predicted from the rows of the other folds.

    `score` of (predictions, targets) chooses the regularisation; higher is better.
    """
    found = np.empty(targets_nC.shape, dtype=np.float64)
    for train, test in _splits(folds_n):
        found[test] = _fit(vectors_nD[train], targets_nC[train], score)(vectors_nD[test])
    return found


Score = Callable[[np.ndarray, np.ndarray], float]


def hits(predictions_nC: np.ndarray, targets_nC: np.ndarray) -> float:
    """Share of rows whose largest prediction is at the target's column."""
    return float((predictions_nC.argmax(1) == targets_nC.argmax(1)).mean())


def closeness(predictions_nC: np.ndarray, targets_nC: np.ndarray) -> float:
    """Minus the squared error."""
    return -float(np.square(predictions_nC - targets_nC).sum())


def _splits(folds_n: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for fold in range(FOLDS):
        yield np.flatnonzero(folds_n != fold), np.flatnonzero(folds_n == fold)


def _fit(vectors_nD: np.ndarray, targets_nC: np.ndarray, score: Score) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression with an intercept; returns what predicts further rows."""
    centre, level = vectors_nD.mean(0), targets_nC.mean(0)
    left, singular, right = np.linalg.svd((vectors_nD - centre).astype(np.float64), full_matrices=False)
    inner = left.T @ (targets_nC - level)
    power = float(np.square(singular).sum())
    best: tuple[float, np.ndarray] | None = None
    for strength in STRENGTHS:
        # Mean squared norm times n is the sum of the squared singular values.
        kept = np.square(singular) / (np.square(singular) + max(strength * power, 1e-30))
        fitted = level + left @ (kept[:, None] * inner)
        leverage = (1 / len(left) + np.square(left) @ kept).clip(max=1 - 1e-9)
        left_out = targets_nC - (targets_nC - fitted) / (1 - leverage)[:, None]
        value = score(left_out, targets_nC)
        if best is None or value > best[0]:
            weights = (kept / np.maximum(singular, 1e-30))[:, None] * inner
            best = value, right.T @ weights
    assert best is not None
    slope = best[1]
    return lambda more: level + (more - centre) @ slope


@dataclass(frozen=True)
class Share:
    """A mean over rows and its standard error."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, values_n: np.ndarray) -> Share:
        """Of one value per row."""
        values = values_n.astype(np.float64)
        return cls(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))

    @property
    def is_positive(self) -> bool:
        """Whether it lies more than two standard errors above zero."""
        return self.mean > 2 * self.stderr


def right_rows(vectors_nD: np.ndarray, classes_n: np.ndarray, folds_n: np.ndarray) -> np.ndarray:
    """[n] bool: the rows whose class a probe reads correctly; classes are 0 … C - 1."""
    targets = np.eye(int(classes_n.max()) + 1)[classes_n]
    return np.asarray(predicted(vectors_nD, targets, folds_n, hits).argmax(1) == classes_n)


def majority_rows(classes_n: np.ndarray) -> np.ndarray:
    """[n] bool: the rows of the most frequent class.

    Of all rows: chosen on the other folds it would tend to be the rarer one of a fold, and be under one half for two
    classes of equal size.
    """
    return np.asarray(classes_n == np.bincount(classes_n).argmax())


@dataclass(frozen=True)
class Remainder:
    """Vectors without what others predict of them, and how much that was."""

    vectors: np.ndarray
    """[n, D] float64."""
    explained: float
    """Share of the variance that the others predict, on rows that the prediction was not fitted to."""
    cosine: Share
    """Between prediction and vector, both around the mean."""


def remainder(vectors_nD: np.ndarray, others_nD: np.ndarray, folds_n: np.ndarray) -> Remainder:
    """`vectors` minus what ridge regression predicts of them from `others`, each row from the other folds."""
    wide = vectors_nD.astype(np.float64)
    guess, centre = predicted(others_nD, wide, folds_n, closeness), wide.mean(0)
    left, moved = wide - guess, wide - centre
    explained = 1 - float(np.square(left).sum()) / max(float(np.square(moved).sum()), 1e-30)
    return Remainder(left, explained, Share.of(_cosines(guess - centre, moved)))


def _cosines(one_nD: np.ndarray, other_nD: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(one_nD, axis=1) * np.linalg.norm(other_nD, axis=1)
    return np.asarray((one_nD * other_nD).sum(1) / np.maximum(norms, 1e-30))
