"""`train.bf16: auto`: measured once, recorded, and kept for the training's life."""

import shutil

import pytest
import torch
from small_run import small_config
from tiny import Tiny

from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.diagnostics.cost import Machines, make_plan
from pst_dist.diagnostics.cost_page import plan_lines
from pst_dist.errors import ConfigError
from pst_dist.storage.json_files import read_json
from pst_dist.training.engines.deepspeed_config import deepspeed_settings
from pst_dist.training.precision import Timing, begun_bf16, timed_precisions, with_precision
from pst_dist.training.result import complete_training
from pst_dist.training.trainer import train

TIMING = "timing forward and backward passes in float32 and bfloat16"


def test_bfloat16_is_chosen_where_it_is_clearly_faster():
    assert Timing(float32=1.0, bfloat16=0.5).bf16
    assert not Timing(float32=1.0, bfloat16=0.95).bf16
    assert not Timing(float32=1.0, bfloat16=1.6).bf16


def test_both_precisions_are_timed_and_nothing_of_the_student_changes():
    tiny = Tiny("post_thinking")
    before = [value.clone() for value in tiny.student.parameters()]
    seen: list[torch.dtype] = []
    tiny.model.get_output_embeddings().register_forward_pre_hook(
        lambda module, given: seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
    )
    timing = timed_precisions(tiny.student, tiny.batch())
    assert 0 < timing.float32 < 5 and 0 < timing.bfloat16 < 5
    assert set(seen[-6:]) == {None, torch.bfloat16}
    assert all(torch.equal(one, two) for one, two in zip(before, tiny.student.parameters(), strict=True))
    assert all(value.grad is None for value in tiny.student.parameters())


@pytest.mark.encoder
def test_the_choice_is_made_once_and_recorded(small_data, tmp_path, caplog):
    config = small_config(small_data, tmp_path, train__bf16="auto", train__max_steps=2, train__eval_steps=2)
    run = run_dir(config)
    assert begun_bf16(run) is None and complete_training(config, 1) is None
    with caplog.at_level("INFO", logger="pst_dist"):
        result = train(config)
    assert TIMING in caplog.text
    chosen = read_json(run.checkpoints / "checkpoint-2" / "run_state.json")["settings"]["train.bf16"]
    assert f"train.bf16=auto: {chosen} (a pass of" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="pst_dist"):
        assert train(config) == result
    assert TIMING not in caplog.text
    assert complete_training(config, 1) == result
    shutil.rmtree(run.checkpoints)
    assert begun_bf16(run) is chosen, "the student records it too"
    assert train(config) == result


@pytest.mark.encoder
@pytest.mark.parametrize("begun", [True, False])
def test_a_training_goes_on_in_the_precision_that_it_began_with(small_data, tmp_path, caplog, begun):
    """Whatever would be measured now: of the two values one is another."""
    steps = {"train__save_steps": 2, "train__eval_steps": 2}
    train(small_config(small_data, tmp_path, train__bf16=begun, train__max_steps=4, **steps))
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    (tmp_path / "train.json").unlink()
    with caplog.at_level("INFO", logger="pst_dist"):
        train(small_config(small_data, tmp_path, train__bf16="auto", train__max_steps=4, **steps))
    assert TIMING not in caplog.text
    assert begun_bf16(run_dir(small_config(small_data, tmp_path))) is begun


def test_without_a_training_and_a_way_to_choose_auto_stays(small_data, tmp_path):
    config = small_config(small_data, tmp_path, train__bf16="auto")
    assert with_precision(config, run_dir(config)) is config
    assert with_precision(config, run_dir(config), lambda: True).train.bf16 is True
    exact = small_config(small_data, tmp_path)
    assert with_precision(exact, run_dir(exact), lambda: True) is exact


def test_what_is_not_settled_is_planned_as_float32(small_data, tmp_path):
    auto, exact = (
        make_plan(small_config(small_data, tmp_path, train__bf16=value), Machines()) for value in ("auto", False)
    )
    assert auto.memory == exact.memory
    assert "float32 or bf16 (counted as float32)" in plan_lines(auto)[0]
    train_config = load_config(None, ["train.bf16=auto", "train.deepspeed=zero2"]).train
    assert not {"bf16", "torch_autocast"} & deepspeed_settings(train_config, 1).keys()


def test_frozen_weights_in_bfloat16_need_a_training_that_surely_computes_in_it():
    lora = ["student.model_name_or_path=some/model", "student.lora.rank=4", "student.lora.frozen_dtype=bfloat16"]
    with pytest.raises(ConfigError, match=r"needs train\.bf16=true"):
        load_config(None, [*lora, "train.bf16=auto"])


def test_a_precision_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"train\.bf16"):
        load_config(None, ["train.bf16=fast"])
