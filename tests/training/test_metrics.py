"""What training warns about: weights that do nothing or everything, and not what is learnt. What a row says of time."""

from dataclasses import replace

import pytest
import torch
from small_run import make_small_data, small_config

from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.distributed.ranks import Ranks
from pst_dist.storage.manifest import read_lines
from pst_dist.training.reporting.metrics import MetricsLog
from pst_dist.training.reporting.step_record import StepRecord
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
    assert sum("rationale term contributes 99.9" in line for line in said) == 1
    assert len(said) == len({line.split(":")[1] for line in said}), "each term once"


def test_the_wait_for_data_is_a_share_of_all_steps_since_the_last_row(tmp_path):
    config = Config(output_dir=str(tmp_path), train={"logging_steps": 2, "report_to": "none"})
    one = record((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    with MetricsLog(config, run_dir(config), Ranks(), first_step=0, total=4) as metrics:
        for step, times in enumerate([(1.0, 3.0), (1.0, 5.0), (0.0, 8.0), (0.0, 8.0)], start=1):
            metrics.step(replace(one, step=step), epoch=0, waited_and_took=times)
    rows = read_lines(run_dir(config).metrics)
    # The first step has a row of its own: 1 of 4 seconds; the second waits 1 of 6, the last two wait for nothing.
    assert [(row["step"], row["data_wait"]) for row in rows] == [(1, 0.25), (2, pytest.approx(1 / 6)), (4, 0.0)]
