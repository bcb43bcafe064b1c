"""The statistics against values worked out by hand or by brute force, and the table over real evaluation folders."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from evaluated import scored

from pst_dist.errors import InputError, IntegrityError
from pst_dist.evaluation.compare import compare
from pst_dist.evaluation.statistics import bootstrap_interval, mcnemar, paired_test
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import Manifest, describe_files, read_json, write_json, write_manifest


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (1, 8, 2 * (1 + 9) / 512),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_is_twice_the_binomial_tail_counted_by_hand(b, c, p):
    assert math.isclose(mcnemar(b, c), p, rel_tol=1e-12)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_the_bootstrap_interval_is_that_of_resampled_rows():
    arm = np.array([1] * 30 + [0] * 10 + [1] * 40 + [0] * 20, dtype=bool)
    baseline = np.array([0] * 30 + [1] * 10 + [1] * 40 + [0] * 20, dtype=bool)
    test = paired_test(arm, baseline)
    assert (test.only_arm, test.only_baseline, test.difference) == (30, 10, 0.2)
    rng = np.random.default_rng(7)
    drawn = rng.integers(0, 100, size=(20_000, 100))
    differences = (arm[drawn].astype(int) - baseline[drawn].astype(int)).mean(axis=1)
    low, high = np.percentile(differences, [2.5, 97.5])
    assert abs(test.low - low) <= 0.011 and abs(test.high - high) <= 0.011
    # The normal approximation of the same: 0.2 +- 1.96 * sqrt((0.4 - 0.04) / 100)
    assert abs(test.low - 0.0824) < 0.02 and abs(test.high - 0.3176) < 0.02


def test_the_interval_is_the_same_each_time_and_covers_the_truth_about_95_times_in_100():
    assert bootstrap_interval(12, 5, 60) == bootstrap_interval(12, 5, 60)
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        b, c, _rest = rng.multinomial(200, [0.25, 0.15, 0.6])
        low, high = bootstrap_interval(int(b), int(c), 200)
        hits += low <= 0.10 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_equal_arms_differ_by_nothing():
    marks = np.array([True, False, True])
    test = paired_test(marks, marks)
    assert (test.difference, test.low, test.high, test.p) == (0, 0, 0, 1)


@pytest.fixture
def runs(tmp_path):
    """pst has 9 of 10 right, answer_only 4, pre_thinking 8; pst is right on all rows answer_only has right."""
    return [
        scored(tmp_path / "pst", "pst", "1111111110", tokens=4),
        scored(tmp_path / "answer_only", "answer_only", "1111000000", tokens=4),
        scored(tmp_path / "pre", "pre_thinking", "1111111001", tokens=52),
    ]


def test_arms_are_tested_against_answer_only_wherever_it_stands(runs):
    comparison = compare(runs)
    assert comparison.baseline == "answer_only" and comparison.rows == 10
    pst, answer_only, pre = comparison.arms
    assert answer_only.test is None
    assert (pst.test.only_arm, pst.test.only_baseline) == (5, 0)
    assert math.isclose(pst.test.difference, 0.5) and math.isclose(pst.test.p, 0.0625)
    assert (pre.test.only_arm, pre.test.only_baseline) == (4, 0)
    assert (pst.times_fewer_tokens, pre.times_fewer_tokens) == (13.0, 1.0)
    assert math.isclose(pst.results["accuracy_stderr"], math.sqrt(0.9 * 0.1 / 10))


def test_without_answer_only_the_first_run_is_the_baseline(runs):
    comparison = compare([runs[2], runs[0]])
    assert comparison.baseline == "pre_thinking" and comparison.arms[0].test is None


def test_the_table_has_a_line_an_arm_and_aligned_columns(runs):
    title, head, rule, *body = compare(runs).table().splitlines()
    assert title == "svamp: 10 test rows, the same for every arm"
    assert len({len(line) for line in (head, rule, *body)}) == 1
    assert body[0].split()[:4] == ["pst", "90.00", "9.49", "+50.00"] and "13.0x" in body[0]
    assert body[1].split()[:4] == ["answer_only", "40.00", "15.49", "baseline"]


def test_the_json_form_is_json(runs):
    told = json.loads(json.dumps(compare(runs).to_json()))
    assert [arm["label"] for arm in told["arms"]] == ["pst", "answer_only", "pre_thinking"]
    assert told["arms"][0]["test"]["only_arm"] == 5


def test_a_directory_of_arms_stands_for_its_runs(runs, tmp_path):
    assert [arm.run for arm in compare([tmp_path]).arms] == [runs[1], runs[2], runs[0]]


def test_runs_scored_on_other_rows_are_refused_by_name(runs, tmp_path):
    other = scored(tmp_path / "other", "post_thinking", "1111111110", questions={3: "another question"})
    with pytest.raises(InputError, match=r"other.*scored on different rows than .*pst: 1 of 10 differ"):
        compare([runs[0], other])
    fewer = scored(tmp_path / "fewer", "post_thinking", "11111")
    with pytest.raises(InputError, match="5 of 10 differ"):
        compare([runs[0], fewer])


def test_rows_in_another_order_are_joined_by_id(runs, tmp_path):
    path = runs[1] / "eval" / "test"
    lines = (path / "samples.jsonl").read_text().splitlines()
    write_text(path / "samples.jsonl", "\n".join(reversed(lines)) + "\n")
    write_manifest(path, Manifest("evaluation", "x", describe_files(path, ["results.json", "samples.jsonl"])))
    assert compare(runs).arms[0].test.only_arm == 5


def test_runs_of_one_arm_are_told_apart_by_variant_and_seed(tmp_path):
    made = [
        scored(tmp_path / f"{arm}-{seed}{bool(variant)}", arm, "10", seed=seed, variant=variant)
        for (arm, variant), seed in product((("pst", ()), ("pst", ("shuffled embeddings",))), (0, 1))
    ]
    labels = [arm.label for arm in compare([*made, scored(tmp_path / "a", "answer_only", "10")]).arms]
    assert labels == [
        "pst seed 0",
        "pst seed 1",
        "pst, shuffled embeddings seed 0",
        "pst, shuffled embeddings seed 1",
        "answer_only",
    ]


def test_runs_alike_in_all_but_their_place_are_told_apart_by_it(tmp_path):
    made = [scored(tmp_path / name / "pst", "pst", "10") for name in ("slow", "fast")]
    labels = [arm.label for arm in compare(made).arms]
    assert labels == [f"pst seed 0 ({path})" for path in made]


def test_an_arm_that_generated_nothing_has_no_token_ratio(tmp_path):
    runs = [scored(tmp_path / "a", "pst", "00", tokens=0), scored(tmp_path / "b", "pre_thinking", "10")]
    assert [arm.times_fewer_tokens for arm in compare(runs).arms] == [None, 1.0]


def test_a_run_without_an_evaluation_says_what_to_run(runs, tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match="run `pst evaluate` first"):
        compare([runs[0], tmp_path / "raw"])
    with pytest.raises(InputError, match="at least two runs"):
        compare(runs[:1])


def test_runs_scored_on_different_splits_only_are_refused(runs, tmp_path):
    other = scored(tmp_path / "v", "post_thinking", "1111111110", split="validation")
    with pytest.raises(InputError, match="share no finished evaluation"):
        compare([runs[0], other])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("accuracy", "0.5"),
        ("accuracy", None),
        ("accuracy", True),
        ("tokens_to_answer", {"mean": "3"}),
        ("tokens_to_answer", 3),
        ("milliseconds_to_answer", []),
        ("variant", "pst"),
        ("seed", 1.5),
        ("arm", 7),
        ("student", {"digest": 5}),
        ("training", "long"),
        ("adaptive", {"think_below": "0.5"}),
    ],
)
def test_results_of_another_type_are_refused_with_file_and_field(runs, field, value):
    """Their digest is right, so only the types tell."""
    path = runs[1] / "eval" / "test"
    write_json(path / "results.json", {**read_json(path / "results.json"), field: value})
    write_manifest(path, Manifest("evaluation", "x", describe_files(path, ["results.json", "samples.jsonl"])))
    with pytest.raises(IntegrityError, match=rf"results\.json: {field}"):
        compare(runs)


@pytest.mark.parametrize("line", ['{"id": "row-1"}', '{"id": 5, "question": "q", "gold": "5", "correct": true}'])
def test_a_scored_row_that_lacks_something_is_refused_with_its_line(runs, line):
    path = runs[1] / "eval" / "test"
    lines = (path / "samples.jsonl").read_text().splitlines()
    write_text(path / "samples.jsonl", "\n".join([lines[0], line, *lines[2:]]) + "\n")
    write_manifest(path, Manifest("evaluation", "x", describe_files(path, ["results.json", "samples.jsonl"])))
    with pytest.raises(IntegrityError, match=r"samples\.jsonl:2: "):
        compare(runs)
