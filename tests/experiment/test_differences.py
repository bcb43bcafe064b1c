"""Errors, differences and what a page says of controls, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pst_dist.data.tasks.registry import TASKS
from pst_dist.evaluation.statistics import Difference, mcnemar, paired, standard_error
from pst_dist.experiment.published import PUBLISHED, PUBLISHED_TASKS
from pst_dist.experiment.results import Pair, Results
from pst_dist.experiment.results_page import _controls
from pst_dist.experiment.spec import Experiment


def test_errors_and_means_are_those_worked_out_by_hand():
    assert standard_error(np.array([1.0, 0.0, 1.0, 0.0])) == pytest.approx((1 / 3) ** 0.5 / 2)
    arm = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    base = np.array([[1, 0, 0, 0], [0, 0, 1, 0]], dtype=bool)
    test = paired("base", arm, base)
    assert test.difference == pytest.approx((1 + 2) / 8) and test.seeds == 2


def test_one_seed_is_the_paired_bootstrap_over_rows_and_mcnemar():
    generator = np.random.default_rng(0)
    base = generator.random((1, 400)) < 0.4
    arm = base ^ (generator.random((1, 400)) < 0.2)
    test = paired("base", arm, base)
    only_arm, only_base = int((arm & ~base).sum()), int((~arm & base).sum())
    assert test.p == mcnemar(only_arm, only_base)
    differences = arm[0].astype(int) - base[0].astype(int)
    half = 1.96 * standard_error(differences)
    assert test.low == pytest.approx(test.difference - half, abs=0.01)
    assert test.high == pytest.approx(test.difference + half, abs=0.01)


def test_seeds_that_disagree_widen_the_interval_and_ones_that_agree_do_not():
    generator = np.random.default_rng(1)
    base = generator.random((3, 300)) < 0.3
    steady = base | (generator.random((3, 300)) < 0.15)
    shaky = base.copy()
    shaky[0] |= generator.random(300) < 0.6
    narrow, wide = paired("b", steady, base), paired("b", shaky, base)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert narrow.p < 0.01 < wide.p


def test_a_resample_without_a_difference_is_exactly_zero(monkeypatch):
    """With rounding errors, an interval that ends at zero excluded it, and p missed the resamples at zero."""
    drawn, percentile = [], np.percentile
    monkeypatch.setattr(np, "percentile", lambda draws, *more: drawn.append(draws) or percentile(draws, *more))
    generator = np.random.default_rng(3)
    base = generator.random((3, 300)) < 0.5
    paired("b", base ^ (generator.random((3, 300)) < 0.05), base)
    near = np.abs(drawn[0]) < 1e-9
    assert near.sum() > 50 and (drawn[0][near] == 0).all()


def test_equal_variants_do_not_differ():
    right = np.random.default_rng(2).random((3, 50)) < 0.5
    test = paired("b", right, right)
    assert (test.difference, test.low, test.high, test.p) == (0, 0, 0, 1)


def test_the_published_tables_have_a_number_for_each_of_the_twelve_tasks():
    assert set(PUBLISHED_TASKS) == set(TASKS) - {"arithmetic", "proportion"}
    assert {len(values) for values in PUBLISHED.values()} == {12}
    averages = {"GPT-2 small, 124M, CoT": 22.7, "Flan-T5 base, 220M, FT": 39.5}
    for name, average in averages.items():
        assert np.mean(PUBLISHED[name]) == pytest.approx(average, abs=0.6)


def test_the_page_says_where_a_control_proves_nothing():
    variants = {
        "pst": {"arm": "pst"},
        "shuffled": {"arm": "pst", "loss.control": "shuffle_embeddings"},
        "unaligned": {"arm": "pst", "loss": {"alignment_weight": 0}},
        "post": {"arm": "post_thinking"},
    }
    experiment = Experiment(name="e", tasks={"t": {}}, variants=variants)

    def page(*found: tuple[str, str, float, float]) -> str:
        pairs = []
        for one, other, low, high in found:
            test = Difference(other, difference=(low + high) / 2, low=low, high=high, p=0.5, seeds=3)
            pairs.append(Pair("t", (), one, test))
        return " ".join(_controls(Results(experiment, [], pairs, [])))

    clear, same = ("pst", "shuffled", 0.01, 0.2), ("pst", "unaligned", -0.03, 0.05)
    said = page(clear, same, ("pst", "post", -0.1, 0.1))
    assert "In 1 of the 2 pairs" in said and "is inconclusive" in said
    assert "pst against unaligned, +1.00 points (-3.00 to +5.00)" in said and "shuffled" not in said
    assert page(clear) == "The arm and its control differ measurably."
    assert page(("pst", "post", -0.1, 0.1)) == "", "another arm is no control"
