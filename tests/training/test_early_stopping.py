"""Early stopping, and the schedules against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from small_run import small_config

from pst_dist.config.schema import TrainConfig
from pst_dist.errors import InputError
from pst_dist.pipeline import make_shards
from pst_dist.training.engines.optimizer import learning_rate_at
from pst_dist.training.trainer import train

# A rate this small moves no float32 weight, so no validation is better than the first one, at step 2.
STILL = {"train__learning_rate": "1e-30", "train__eval_steps": 2, "train__early_stopping_patience": 2}


def test_training_stops_after_the_last_validation_that_its_patience_allows(small_data, tmp_path):
    config = small_config(small_data, tmp_path, **STILL)
    result = train(config)
    assert (result.steps, result.best_step) == (6, 6), "of equal students the last one is kept"
    assert train(config) == result


def test_a_training_killed_after_its_last_save_knows_that_it_has_stopped(small_data, tmp_path, caplog):
    config = small_config(small_data, tmp_path, **STILL)
    train(config)
    (tmp_path / "train.json").unlink()
    assert train(config).steps == 6
    more = small_config(
        small_data, tmp_path, **(STILL | {"train__early_stopping_patience": 9}), train__accept_changes=True
    )
    assert train(more).steps == 8


def test_a_training_that_improves_takes_all_its_steps(small_data, tmp_path):
    assert train(small_config(small_data, tmp_path, train__eval_steps=4, train__early_stopping_patience=1)).steps == 8


def test_without_validation_rows_it_is_refused_before_the_first_step(tmp_path):
    config = small_config(tmp_path / "data", tmp_path / "run", **STILL, data__validation_size=0, arm="answer_only")
    make_shards(config)
    with pytest.raises(InputError, match="needs validation rows"):
        train(config)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("constant", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("inverse_sqrt", {}, {}),
        ("cosine_with_min_lr", {"min_lr_ratio": 0.2}, {"min_lr_rate": 0.2}),
        (
            "warmup_stable_decay",
            {"min_lr_ratio": 0.2, "decay_ratio": 0.3},
            {"min_lr_ratio": 0.2, "num_decay_steps": 30},
        ),
    ],
)
def test_a_schedule_is_that_of_transformers_after_the_warm_up(name, ours, theirs):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    known = "constant_with_warmup" if name == "constant" else name
    reference = get_scheduler(
        known, optimizer, num_warmup_steps=10, num_training_steps=100, scheduler_specific_kwargs=theirs or None
    ).lr_lambdas[0]
    settings = TrainConfig(lr_scheduler_type=name, learning_rate=1.0, warmup_ratio=0.1, **ours)
    for step in range(10, 100):
        assert math.isclose(learning_rate_at(step, 100, settings), reference(step), rel_tol=1e-9), step
    assert learning_rate_at(0, 100, settings) == pytest.approx(0.1)
