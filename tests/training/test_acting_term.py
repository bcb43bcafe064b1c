"""An alignment term that acts: a head fitted in closed form, a share of the gradient that is held, and warnings.

Both options are checked on one process, across a resume, and on two ranks of each ZeRO stage.
"""

import shutil

import numpy as np
import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from small_run import small_config

from pst_dist.errors import ConfigError
from pst_dist.storage.manifest import read_lines
from pst_dist.training.share import after_measured, held
from pst_dist.training.trainer import train

pytestmark = pytest.mark.encoder
BOTH = {"loss__head_init": "ridge", "loss__alignment_share": 0.3, "train__save_steps": 2, "train__save_total_limit": 9}


def rows(run) -> list[dict]:
    return [row for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def fit_of(run) -> dict:
    (found,) = [row["head_fit"] for row in read_lines(run / "metrics.jsonl") if "head_fit" in row]
    return found


def validations(run) -> list[dict]:
    return [row["validation"] for row in read_lines(run / "metrics.jsonl") if "validation" in row]


def test_the_fitted_head_is_the_ridge_solution_at_the_norm_of_a_random_head(small_data, tmp_path, monkeypatch):
    from pst_dist.training import head_fit
    from pst_dist.training.module import Student

    seen, forward = [], Student.forward

    def recorded(student, batch, scales):
        if student.observer is not None:
            observe = student.observer
            student.observer = lambda states: (seen.append((states, batch.teacher_emb)), observe(states))
        return forward(student, batch, scales)

    monkeypatch.setattr(Student, "forward", recorded)
    got = []
    solved = head_fit.fit_head
    monkeypatch.setattr(
        "pst_dist.training.trainer.fit_head",
        lambda engine, *rest: (solved(engine, *rest), got.append(engine.student.head.weight.detach().clone()))[0],
    )
    train(small_config(small_data, tmp_path, loss__head_init="ridge"))
    fit = fit_of(tmp_path)
    states = np.concatenate([one.double().numpy() for one, _ in seen])
    targets = np.concatenate([other.double().numpy() for _, other in seen])
    assert fit["rows"] == len(states) == 32
    # The same solution in its other form, over rows instead of directions: W = T' (H H' + r)^-1 H, without the mean's
    # direction in H.
    common = states.mean(0) / np.linalg.norm(states.mean(0))
    states = states - np.outer(states @ common, common)
    ridge = fit["strength"] * float((states**2).sum())
    wanted = targets.T @ np.linalg.solve(states @ states.T + ridge * np.eye(len(states)), states)
    wanted *= np.sqrt(384 / 3) / np.linalg.norm(wanted)
    assert np.allclose(got[0].numpy(), wanted, atol=1e-5)
    assert np.abs(got[0].numpy() @ common).max() < 1e-4


def test_the_fit_says_what_rows_that_it_did_not_see_give(small_data, tmp_path):
    fits = {}
    for control in ("none", "shuffle_embeddings"):
        run = tmp_path / control
        train(small_config(small_data, run, loss__head_init="ridge", loss__control=control))
        fits[control] = fit_of(run)
    own, shuffled = fits["none"], fits["shuffle_embeddings"]
    # An untrained student's states hold which letters a question has, and so does its rationale.
    assert own["cosine"] > own["cosine_other"] + 2 * own["cosine_stderr"]
    assert shuffled["cosine"] < shuffled["cosine_other"] + 3 * shuffled["cosine_stderr"] < own["cosine"]


def test_a_fitted_head_is_nearer_to_the_teacher_from_the_first_step_on(small_data, tmp_path):
    train(small_config(small_data, tmp_path / "random"))
    train(small_config(small_data, tmp_path / "ridge", loss__head_init="ridge"))
    first = {name: rows(tmp_path / name)[0] for name in ("random", "ridge")}
    assert first["ridge"]["cosine"] > first["random"]["cosine"] + 0.2
    assert first["ridge"]["answer_nll"] == first["random"]["answer_nll"], "the body is untouched"


def test_the_share_is_held_from_the_second_step_on_and_the_weight_is_logged(small_data, tmp_path):
    for share in (0.05, 0.5):
        run = tmp_path / str(share)
        train(small_config(small_data, run, loss__alignment_share=share, train__max_steps=16))
        found = [row["gradient_share_alignment"] for row in rows(run)]
        assert np.mean(found[2:]) == pytest.approx(share, rel=0.3)
        weights = [row["alignment_weight"] for row in rows(run)]
        assert weights[0] == pytest.approx(1) and len({round(weight, 6) for weight in weights}) > 10
    assert weights[-1] > 1


def test_logging_less_often_does_not_change_the_weights(small_data, tmp_path):
    for every in (1, 5):
        train(small_config(small_data, tmp_path / str(every), loss__alignment_share=0.3, train__logging_steps=every))
    one, five = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("1", "5"))
    assert all(torch.equal(one[name], five[name]) for name in one)


def test_a_resumed_run_ends_with_the_same_bits_and_does_not_fit_again(small_data, tmp_path):
    train(small_config(small_data, tmp_path / "whole", **BOTH))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").iterdir():
        if int(path.name.partition("-")[2]) > 4:
            shutil.rmtree(path)
    (tmp_path / "again" / "train.json").unlink()
    train(small_config(small_data, tmp_path / "again", **BOTH))
    assert rows(tmp_path / "again")[3:] != [] and fit_of(tmp_path / "again") == fit_of(tmp_path / "whole")
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "again")]
    assert losses[0] == losses[1]
    one, two = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_of_every_zero_stage_fit_the_same_head_and_hold_the_same_share(small_data, tmp_path):
    train(small_config(small_data, tmp_path / "single", **BOTH))
    cases = []
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        config = small_config(small_data, tmp_path / stage, train__deepspeed=stage, **BOTH)
        cases.append(config.model_dump(mode="json"))
    resumed = small_config(small_data, tmp_path / "resumed", train__deepspeed="zero3", **BOTH)
    cases.append(resumed.model_dump(mode="json") | {"resume": [str(tmp_path / "single"), 4]})
    launch(cases, tmp_path)
    single = rows(tmp_path / "single")
    for name in ("zero0", "zero1", "zero2", "zero3", "resumed"):
        ours = rows(tmp_path / name)[-4:] if name == "resumed" else rows(tmp_path / name)
        for row, wanted in zip(ours, single[-len(ours) :], strict=True):
            for key in ("loss", "cosine", "alignment_weight", "gradient_share_alignment"):
                assert row[key] == pytest.approx(wanted[key], rel=2e-3, abs=2e-4), (name, row["step"], key)
    for stage in ("zero0", "zero3"):
        ours, theirs = fit_of(tmp_path / stage), fit_of(tmp_path / "single")
        assert ours == pytest.approx(theirs, abs=1e-6), stage
        ours, theirs = validations(tmp_path / stage)[-1], validations(tmp_path / "single")[-1]
        for key in ("cosine", "cosine_other", "cosine_stderr"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-3), (stage, key)


def test_the_compared_cosines_are_those_of_all_pairs_of_rows():
    from pst_dist.training.loss import spread_of
    from pst_dist.training.validation import compared_cosines

    torch.manual_seed(0)
    students = torch.randn(7, 5, dtype=torch.float64)
    teachers = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1)
    table = torch.nn.functional.cosine_similarity(students[:, None], teachers[None], dim=-1)
    own = table.diagonal()
    spread = torch.cat([spread_of(students, own), teachers.sum(0)])
    stderr, other = compared_cosines(7, float(own.sum()), spread)
    assert stderr == pytest.approx(float(own.std()) / 7**0.5)
    assert other == pytest.approx(float((table.sum() - own.sum()) / 42))
    assert compared_cosines(1, 0.5, spread) == (None, None)


def test_an_inert_term_is_warned_about_once(small_data, tmp_path, caplog):
    train(small_config(small_data, tmp_path, loss__alignment_weight=0.05, train__max_steps=10))
    shares = [row["gradient_share_alignment"] for row in rows(tmp_path)]
    assert all(0.01 < share < 0.05 for share in shares[1:]), shares
    assert sum("stays under 5 %" in record.getMessage() for record in caplog.records) == 1


def test_targets_that_say_nothing_of_their_row_are_warned_about_but_not_in_the_control(small_data, tmp_path, caplog):
    train(small_config(small_data, tmp_path / "control", loss__control="shuffle_embeddings"))
    assert "has learnt nothing specific to a row" not in caplog.text
    # A head that never moves, over a body that never moves, tells no rows apart.
    still = {"train__learning_rate": "1e-12", "train__head_learning_rate": "1e-12"}
    train(small_config(small_data, tmp_path / "still", **still))
    assert caplog.text.count("has learnt nothing specific to a row") == 1


def test_the_share_and_a_fixed_weight_exclude_each_other(small_data, tmp_path):
    with pytest.raises(ConfigError, match=r"loss.alignment_weight=0.5 cannot be set too"):
        small_config(small_data, tmp_path, loss__alignment_share=0.2, loss__alignment_weight=0.5)


def test_a_weight_stays_within_bounds_when_a_term_is_learnt_or_absent():
    from pst_dist.config.schema import LossConfig
    from pst_dist.training.checkpoints.state import RunState
    from pst_dist.training.loss import TermWeights
    from pst_dist.training.reporting.step_record import StepRecord

    loss, weights = LossConfig(alignment_share=0.5), TermWeights((1.0, 1.0, 1.0))

    def record(gradients, counts=(1.0, 1.0, 1.0)):
        return StepRecord.of(
            step=1,
            sums=torch.ones(3),
            counts=torch.tensor(counts),
            scales=torch.ones(3),
            cosine=0.0,
            gradients=torch.tensor(gradients),
            grad_norm=1.0,
            learning_rate=1e-3,
            tokens=3,
            padding=0.0,
        )

    state = RunState("f", "single", 1)
    assert held(weights, loss, state) == weights
    learnt = after_measured(state, record((1.0, 1.0, 1e-30)), loss)
    assert held(weights, loss, learnt).weights[2] == pytest.approx(1e4)
    assert after_measured(learnt, record((1.0, 1.0, 0.0), (1.0, 1.0, 0.0)), loss) == learnt
    usual = after_measured(state, record((1.0, 2.0, 0.5)), loss)
    assert held(weights, loss, usual).weights == (1.0, 1.0, pytest.approx(6.0))
    assert after_measured(usual, record((1.0, 2.0, 0.5)), LossConfig()).alignment_ratio is None


@pytest.mark.parametrize(
    "changes",
    [
        {"arm": "adaptive"},
        {"student__fresh__architecture": "t5", "loss__pooling": "span"},
        {"loss__alignment": "info_nce", "loss__symmetric": True, "layout__semantic_tokens": 2},
        {"student__fresh__num_layers": 2, "loss__layer": 1, "loss__rationale_weight": 0},
    ],
    ids=["adaptive", "t5 span", "symmetric info_nce", "a layer in the middle"],
)
def test_both_work_with_every_kind_of_student_and_term(changes, small_data, tmp_path):
    train(small_config(small_data, tmp_path, train__max_steps=12, **{**BOTH, **changes}))
    assert fit_of(tmp_path)["rows"] == 32 and fit_of(tmp_path)["cosine"] > fit_of(tmp_path)["cosine_other"]
    assert 0.1 < rows(tmp_path)[-1]["gradient_share_alignment"] < 0.6


def test_too_few_rows_leave_the_head_as_it_was_and_say_so(small_data, tmp_path, caplog, monkeypatch):
    from pst_dist.training import head_fit

    monkeypatch.setattr(head_fit, "MOST_ROWS", 9)
    train(small_config(small_data, tmp_path / "few", train__max_steps=2, loss__head_init="ridge"))
    train(small_config(small_data, tmp_path / "random", train__max_steps=2))
    assert "needs 10 rows, there are 9: the head starts from random weights" in caplog.text
    assert [row["loss"] for row in rows(tmp_path / "few")] == [row["loss"] for row in rows(tmp_path / "random")]
