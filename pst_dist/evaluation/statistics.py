"""Tests and intervals for scores of the same rows: McNemar, paired bootstrap, and differences over seeds and rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pst_dist.errors import EnvironmentFault

_BLOCK = 500


RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class PairedTest:
    """One arm against the baseline on the same rows."""

    only_arm: int
    """Rows that only this arm answers correctly."""
    only_baseline: int
    """Rows that only the baseline answers correctly."""
    difference: float
    """Accuracy of the arm minus the baseline's."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Its upper end."""
    p: float
    """Exact McNemar p, two-sided, not corrected for multiple comparisons."""


def format_p(p: float) -> str:
    """Two significant digits, and `<1e-04` below that."""
    return "<1e-04" if p < 1e-4 else f"{p:.2g}"


def paired_test(arm: np.ndarray, baseline: np.ndarray) -> PairedTest:
    """[n] bool, correct answers of two arms on the same rows -> the paired comparison."""
    only_arm, only_baseline = int((arm & ~baseline).sum()), int((~arm & baseline).sum())
    low, high = bootstrap_interval(only_arm, only_baseline, len(arm))
    difference = (only_arm - only_baseline) / len(arm)
    return PairedTest(only_arm, only_baseline, difference, low, high, mcnemar(only_arm, only_baseline))


def mcnemar(only_arm: int, only_baseline: int) -> float:
    """Two-sided exact p for: a row that only one of the two arms answers correctly is equally likely to be either's.

    McNemar, Psychometrika 12 (1947), 153-157, in its exact binomial form. 1 when the arms agree on every row. Raises
    EnvironmentFault without scipy.
    """
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise EnvironmentFault(f"cannot import {error.name}", "pip install 'pst-dist[report]'") from error
    total = only_arm + only_baseline
    return float(binomtest(only_arm, total, 0.5).pvalue) if total else 1.0


def bootstrap_interval(only_arm: int, only_baseline: int, rows: int, *, seed: int = _SEED) -> tuple[float, float]:
    """95 % percentile interval of the accuracy difference over resampled rows, pairs kept together.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. A row adds +1, 0 or -1 to the
    difference, so resampling the rows is one multinomial draw over these three counts.
    """
    shares = np.array([only_arm, only_baseline, rows - only_arm - only_baseline]) / rows
    draws = np.random.Generator(np.random.Philox(key=seed)).multinomial(rows, shares, size=RESAMPLES)
    differences = (draws[:, 0] - draws[:, 1]) / rows
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A variant against a baseline: same task, varied values and rows, over the seeds that both have."""

    baseline: str
    difference: float
    """Accuracy of the variant minus the baseline's."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Its upper end."""
    p: float
    """Two-sided, not corrected for multiple comparisons."""
    seeds: int


def standard_error(values: np.ndarray) -> float:
    """[R] -> standard deviation / sqrt(R), with R - 1; 0 for a single row."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def paired(baseline: str, arm_SR: np.ndarray, base_SR: np.ndarray) -> Difference:
    """Accuracy difference of two variants over the same seeds and rows, with a 95 % interval and p.

    Resamples seeds and rows, the two variants together (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics
    1 (2007), 386-411); with one seed this is the paired bootstrap over rows. With few seeds the interval is somewhat
    too narrow. p is exact McNemar's for one seed, otherwise twice the share of resamples on the other side of zero,
    and at least 1 / RESAMPLES.
    """
    differences = arm_SR.astype(np.float64) - base_SR.astype(np.float64)
    seeds, rows = differences.shape
    generator = np.random.Generator(np.random.Philox(key=0))
    draws = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, _BLOCK):
        # Whole numbers up to the one division, so that a resample without a difference is exactly 0, on neither side.
        by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=_BLOCK)
        by_row = generator.multinomial(rows, np.full(rows, 1 / rows), size=_BLOCK)
        draws[start : start + _BLOCK] = ((by_seed @ differences) * by_row).sum(axis=1) / (seeds * rows)
    low, high = np.percentile(draws, [2.5, 97.5])
    if seeds == 1:
        p = mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        p = min(1.0, max(2 * min((draws <= 0).mean(), (draws >= 0).mean()), 1 / RESAMPLES))
    return Difference(baseline, float(differences.mean()), float(low), float(high), float(p), seeds)
