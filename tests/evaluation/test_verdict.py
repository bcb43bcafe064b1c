"""What a comparison says, on scored rows whose differences are known."""

from __future__ import annotations

from evaluated import scored

from pst_dist.evaluation.compare import compare
from pst_dist.evaluation.verdict import verdict

NINETY, THIRTY = "1" * 90 + "0" * 10, "0" * 70 + "1" * 30


def said(tmp_path, *runs):
    return verdict(
        compare([scored(tmp_path / str(k), arm, right, **rest) for k, (arm, right, rest) in enumerate(runs)])
    )


def test_a_clear_winner_is_named_with_its_margin_and_its_cost(tmp_path):
    sentences = said(
        tmp_path,
        ("answer_only", THIRTY, {"tokens": 4}),
        ("pst", NINETY, {"tokens": 4}),
        ("pre_thinking", "1" * 50 + "0" * 50, {"tokens": 36}),
    )
    assert sentences[0] == (
        "pst answers 90.0 % at 4.0 tokens; pre_thinking 50.0 % at 36.0 tokens; answer_only 30.0 % at 4.0 tokens."
    )
    assert sentences[1].startswith("pst is 60.0 points ahead of answer_only (95 % interval +")
    assert sentences[2] == "It writes 9.0 times fewer tokens than pre_thinking."
    assert sentences[3] == "One seed: the intervals cover the choice of rows, not of seeds."


def test_a_difference_within_chance_is_not_a_win_and_a_loss_is_said(tmp_path):
    close = said(tmp_path / "a", ("answer_only", THIRTY, {}), ("pst", "0" * 69 + "1" * 31, {}))
    assert close[1].startswith("pst and answer_only do not differ measurably on these rows: +1.0 points (95 % ")
    behind = said(tmp_path / "b", ("answer_only", NINETY, {}), ("pst", THIRTY, {}))
    assert behind[1].startswith("pst is 60.0 points behind answer_only (95 % interval -")


def test_a_control_that_does_as_well_as_its_arm_proves_nothing(tmp_path):
    shuffled = {"variant": ["shuffled embeddings"]}
    same = said(tmp_path / "a", ("answer_only", THIRTY, {}), ("pst", NINETY, {}), ("pst", NINETY, shuffled))
    (control,) = [sentence for sentence in same if "control" in sentence]
    assert "do not differ measurably" in control and control.endswith(
        "does not show that what the control removes helps."
    )
    worse = said(tmp_path / "b", ("answer_only", THIRTY, {}), ("pst", NINETY, {}), ("pst", THIRTY, shuffled))
    (control,) = [sentence for sentence in worse if "control" in sentence]
    assert control.startswith("pst is 60.0 points ahead of its control (pst, shuffled embeddings) (95 % interval +")


def test_two_seeds_of_one_arm_are_not_told_as_one_seed(tmp_path):
    sentences = said(tmp_path, ("answer_only", THIRTY, {"seed": 0}), ("pst", NINETY, {"seed": 1}))
    assert not any("One seed" in sentence for sentence in sentences)
