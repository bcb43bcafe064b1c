"""What training warns about: weights that do nothing or everything, and not what is learnt."""

import pytest
import torch
from small_run import make_small_data, small_config

from pst_dist.training.step_record import StepRecord
from pst_dist.training.trainer import train


def record(raw: tuple[float, float, float], gradients: tuple[float, float, float]) -> StepRecord:
    """A step of one answer token, one rationale token and one aligned sample."""
    return StepRecord.of(
        step=10,
        sums=torch.tensor(raw),
        counts=torch.ones(3),
        scales=torch.ones(3),
        cosine=0.0,
        gradients=torch.tensor(gradients),
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=3,
        padding=0.0,
    )


@pytest.mark.parametrize(
    ("raw", "gradients", "named"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), set()),
        ((1.0, 1.0, 1.0), (0.001, 1.0, 1.0), {"answer"}),
        ((1.0, 1.0, 1.0), (0.001, 1.0, 0.001), {"answer", "rationale", "alignment"}),
        # The answer is learnt: its gradient is gone, and of what is left the rationale has all.
        ((0.0001, 0.5, 0.01), (0.001, 1.0, 0.001), set()),
        ((0.0001, 0.5, 0.9), (0.001, 1.0, 0.001), {"rationale", "alignment"}),
    ],
)
def test_a_term_is_named_when_its_weight_does_nothing_or_everything_but_not_when_it_is_learnt(raw, gradients, named):
    assert set(record(raw, gradients).unbalanced()) == named


def test_a_weight_that_does_everything_is_warned_about_once(tmp_path, caplog):
    data = make_small_data(tmp_path / "data")
    train(small_config(data, tmp_path / "run", loss__rationale_weight=10_000))
    said = [record.getMessage() for record in caplog.records if "of the gradient at the hidden state" in record.msg]
    assert sum("rationale term makes 99.9" in line for line in said) == 1
    assert len(said) == len({line.split(":")[1] for line in said}), "each term once"
