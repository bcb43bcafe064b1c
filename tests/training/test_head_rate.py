"""The alignment head's own learning rate: which parameters get it, alone and on two ranks of each ZeRO stage."""

from pathlib import Path

import pytest
import torch
from ranks import launch
from small_run import small_config
from tiny import Tiny

from pst_dist.config.schema import TrainConfig
from pst_dist.storage.json_files import read_lines
from pst_dist.training.optimizer import adamw, set_learning_rate
from pst_dist.training.trainer import train

STAGES = ("zero1", "zero2", "zero3")
HALVES = {"train__save_steps": 4, "train__head_learning_rate": "5e-2"}


def test_only_the_head_gets_its_rate_and_both_follow_the_schedule():
    student = Tiny("pst").student
    optimizer = adamw(student, TrainConfig(learning_rate=1e-3, head_learning_rate=4e-3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(student.parameters()))
    for name, parameter in student.named_parameters():
        assert rates[id(parameter)] == pytest.approx(4e-3 if name == "head.weight" else 1e-3), name
    set_learning_rate(optimizer.param_groups, 5e-4)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([5e-4, 2e-3])


def test_without_a_rate_of_its_own_the_head_shares_the_groups_of_the_body():
    optimizer = adamw(Tiny("pst").student, TrainConfig(learning_rate=1e-3))
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.01, 1e-3), (0.0, 1e-3)]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def head(run: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(run / "best" / "alignment_head.safetensors")["weight"]


@pytest.mark.distributed
@pytest.mark.encoder
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_of_every_zero_stage_follow_one_process_and_resume_its_checkpoint(small_data, tmp_path):
    plain = small_config(small_data, tmp_path / "plain", train__save_steps=4)
    single = small_config(small_data, tmp_path / "single", **HALVES)
    train(plain)
    train(single)
    assert losses(tmp_path / "single")[4:] != pytest.approx(losses(tmp_path / "plain")[4:], abs=1e-4)
    cases = []
    for stage in STAGES:
        config = small_config(small_data, tmp_path / stage, train__deepspeed=stage, **HALVES)
        cases.append(config.model_dump(mode="json"))
    resumed = small_config(small_data, tmp_path / "resumed", train__deepspeed="zero2", **HALVES)
    cases.append(resumed.model_dump(mode="json") | {"resume": [str(tmp_path / "single"), 4]})
    launch(cases, tmp_path)
    for name in (*STAGES, "resumed"):
        ours = losses(tmp_path / name)
        assert ours[-4:] == pytest.approx(losses(tmp_path / "single")[-4:], abs=1e-4), name
        assert torch.allclose(head(tmp_path / name), head(tmp_path / "single"), atol=1e-3), name
