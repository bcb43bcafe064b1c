"""Training in one process: golden curves, exact resume, refusals before the first step."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from golden import CASES, golden
from run_files import losses
from safetensors.torch import load_file
from small_run import small_config

from pst_dist.config.schema import TrainConfig
from pst_dist.errors import ConfigError, DataError, DivergedError, InputError, LockedError, StaleError
from pst_dist.pipeline import make_student
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import read_json, read_lines, write_json
from pst_dist.training.engines.deepspeed_config import deepspeed_settings
from pst_dist.training.engines.deepspeed_engine import DeepSpeedEngine, gather_by_block
from pst_dist.training.engines.optimizer import learning_rate_at
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.trainer import train

pytestmark = pytest.mark.encoder


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_of_each_arm_and_control_is_the_golden_one(case, small_data, tmp_path):
    train(small_config(small_data, tmp_path, **CASES[case]))
    assert losses(tmp_path) == pytest.approx(golden()[case], abs=2e-3)


def test_the_arms_and_controls_really_differ():
    curves = list(golden().values())
    assert len({tuple(curve) for curve in curves}) == len(curves) == len(CASES)


def test_a_run_resumed_from_its_middle_ends_with_the_same_bits(small_data, tmp_path):
    settings = {"train__save_steps": 2, "train__save_total_limit": 9}
    train(small_config(small_data, tmp_path / "whole", **settings))
    for step in (2, 4, 6):
        shutil.copytree(tmp_path / "whole", tmp_path / "again")
        for path in (tmp_path / "again" / "checkpoints").iterdir():
            if int(path.name.partition("-")[2]) > step:
                shutil.rmtree(path)
        (tmp_path / "again" / "train.json").unlink()
        train(small_config(small_data, tmp_path / "again", **settings))
        one = load_file(tmp_path / "whole" / "best" / "model.safetensors")
        two = load_file(tmp_path / "again" / "best" / "model.safetensors")
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert losses(tmp_path / "again") == losses(tmp_path / "whole")
        shutil.rmtree(tmp_path / "again")


def test_a_finished_training_is_not_repeated(small_data, tmp_path):
    config = small_config(small_data, tmp_path)
    first = train(config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config) == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_directory_are_refused(small_data, tmp_path):
    train(small_config(small_data, tmp_path))
    with pytest.raises(StaleError, match=r"trained with .*, this run has "):
        train(small_config(small_data, tmp_path, train__learning_rate="2e-2"))


def test_a_finished_training_can_be_made_longer(small_data, tmp_path):
    train(small_config(small_data, tmp_path))
    longer = {"train__max_steps": 12, "train__accept_changes": True}
    assert train(small_config(small_data, tmp_path, **longer)).steps == 12
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl") if "loss" in row] == list(range(1, 13))


def test_a_finished_student_without_checkpoints_is_not_overwritten_by_other_settings(small_data, tmp_path):
    train(small_config(small_data, tmp_path))
    shutil.rmtree(tmp_path / "checkpoints")
    kept = {path: path.read_bytes() for path in (tmp_path / "best").iterdir()} | {
        "": (tmp_path / "train.json").read_text()
    }
    other = small_config(small_data, tmp_path, train__learning_rate="2e-2", train__accept_changes=True)
    said = r"the finished student was trained with train\.learning_rate=0\.01, this run has .*=0\.02; .*--rebuild"
    with pytest.raises(StaleError, match=said):
        train(other)
    record = read_json(tmp_path / "train.json")
    write_json(tmp_path / "train.json", {key: value for key, value in record.items() if key != "settings"})
    with pytest.raises(StaleError, match=r"with other settings, which its record does not list"):
        train(other)
    write_json(tmp_path / "train.json", record)
    now = {path: path.read_bytes() for path in (tmp_path / "best").iterdir()} | {
        "": (tmp_path / "train.json").read_text()
    }
    assert now == kept
    assert train(small_config(small_data, tmp_path)).steps == 8, "with its own settings there is nothing to do"
    assert make_student(other, rebuild=True).settings["train.learning_rate"] == 0.02


def test_a_training_that_goes_on_does_not_look_finished(small_data, tmp_path):
    train(small_config(small_data, tmp_path))
    longer = small_config(small_data, tmp_path, train__max_steps=12, train__accept_changes=True)
    finished = []
    train(longer, observer=lambda saved: finished.append((tmp_path / "train.json").exists()))
    assert finished and not any(finished) and read_json(tmp_path / "train.json")["steps"] == 12


def test_two_trainings_in_one_directory_are_refused(small_data, tmp_path):
    with directory_lock(tmp_path), pytest.raises(LockedError, match=r"in use by process"):
        train(small_config(small_data, tmp_path))


def test_rebuilding_takes_nothing_from_a_training_that_runs_there(small_data, tmp_path):
    config = small_config(small_data, tmp_path)
    train(config)
    before = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")
    with directory_lock(tmp_path), pytest.raises(LockedError):
        make_student(config, rebuild=True)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before


def test_rebuilding_trains_anew(small_data, tmp_path):
    train(small_config(small_data, tmp_path))
    assert make_student(small_config(small_data, tmp_path, seed=5), rebuild=True).steps == 8


def test_a_diverging_run_stops_before_its_weights_are_spoilt(small_data, tmp_path):
    config = small_config(
        small_data,
        tmp_path,
        train__learning_rate="1e18",
        train__max_grad_norm=0,
        train__eval_steps=1,
        train__warmup_ratio=0,
    )
    with pytest.raises(DivergedError, match=r"not finite|this student is not kept|no weight was changed"):
        train(config)
    assert not (tmp_path / "train.json").exists()
    for checkpoint in (tmp_path / "checkpoints").glob("checkpoint-*"):
        state = load_file(checkpoint / "state-00000.safetensors")
        assert state and all(torch.isfinite(value).all() for value in state.values())


def test_a_loss_that_is_not_finite_is_caught_before_the_step(small_data, tmp_path, monkeypatch):
    config = small_config(small_data, tmp_path, train__save_steps=2, train__eval_steps=2)
    real_forward = SingleProcessEngine.forward

    def poisoned(engine, batch, scales):
        output = real_forward(engine, batch, scales)
        steps = engine.optimizer.state_dict()["state"]
        broken = bool(steps) and int(steps[0]["step"]) == 3 and engine.student.training
        return replace(output, sums=output.sums * float("nan")) if broken else output

    monkeypatch.setattr(SingleProcessEngine, "forward", poisoned)
    with pytest.raises(DivergedError, match=r"step 4: the answer and rationale and alignment loss is not finite"):
        train(config)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train(config).steps == 8, "the same command resumes from the last checkpoint"


def test_the_best_student_is_the_one_validation_chose(small_data, tmp_path):
    result = train(small_config(small_data, tmp_path, train__eval_steps=2))
    seen = {
        row["step"]: row["validation"]["answer_nll"]
        for row in read_lines(tmp_path / "metrics.jsonl")
        if "validation" in row
    }
    assert sorted(seen) == [2, 4, 6, 8]
    assert result.best_value == min(seen.values()) == seen[result.best_step]
    assert read_json(tmp_path / "best" / "manifest.json")["extra"]["step"] == result.best_step


def test_a_student_that_thinks_first_is_chosen_by_all_that_it_has_to_write(small_data, tmp_path):
    """By the answer after the teacher's rationale, one was chosen whose own rationales had not been learnt yet."""
    result = train(small_config(small_data, tmp_path, arm="pre_thinking", train__eval_steps=2))
    rows = [row for row in read_lines(tmp_path / "metrics.jsonl") if "validation" in row]
    written = {row["step"]: row["validation"]["written_nll"] for row in rows}
    assert result.metric == "written_nll"
    assert result.best_value == min(written.values()) == written[result.best_step]
    for scores in (row["validation"] for row in rows):
        # A mean over tokens of both lies between theirs.
        low, high = sorted((scores["answer_nll"], scores["rationale_nll"]))
        assert low < scores["written_nll"] < high
    answer_first = train(small_config(small_data, tmp_path / "pst"))
    assert answer_first.metric == "answer_nll"
    assert "written_nll" not in json.dumps(read_lines(tmp_path / "pst" / "metrics.jsonl"))


def test_a_value_of_another_metric_is_not_compared_with(small_data, tmp_path):
    """A likelihood of 2 nats would beat every accuracy."""
    train(small_config(small_data, tmp_path, train__max_steps=4))
    longer = {"train__max_steps": 8, "train__metric_for_best_model": "accuracy", "train__accept_changes": "true"}
    result = train(small_config(small_data, tmp_path, **longer))
    assert (result.metric, result.best_step) == ("accuracy", 8) and 0 <= result.best_value <= 1


@pytest.mark.parametrize("eval_steps", [4, 3])
def test_a_lost_or_damaged_best_student_is_made_again_with_the_same_bytes(small_data, tmp_path, eval_steps):
    # With eval_steps 3 the best step may have no checkpoint of its own: training goes back before it.
    config = small_config(small_data, tmp_path, train__eval_steps=eval_steps, train__save_steps=2)
    train(config)
    weights = tmp_path / "best" / "model.safetensors"
    whole = weights.read_bytes()
    shutil.rmtree(tmp_path / "best")
    train(config)
    assert weights.read_bytes() == whole
    weights.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    train(config)
    assert weights.read_bytes() == whole


def test_accuracy_can_choose_the_student(small_data, tmp_path):
    result = train(small_config(small_data, tmp_path, train__metric_for_best_model="accuracy"))
    assert result.metric == "accuracy" and 0 <= result.best_value <= 1


def test_training_without_shards_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="pst shard"):
        train(small_config(tmp_path / "nowhere", tmp_path / "run"))


def test_a_row_that_does_not_fit_is_named_before_the_first_step(small_data, tmp_path):
    with pytest.raises(DataError, match=r"question and answer take \d+ tokens, layout\.max_length is 40"):
        train(small_config(small_data, tmp_path, layout__max_length=40))
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoints").exists()


def test_the_attention_of_a_fresh_student_can_be_chosen(small_data, tmp_path):
    train(small_config(small_data, tmp_path, student__attn_implementation="eager"))
    assert losses(tmp_path) == pytest.approx(golden()["pst"], abs=2e-3)


def test_every_logged_step_holds_raw_and_weighted_terms_and_gradient_shares(small_data, tmp_path):
    train(small_config(small_data, tmp_path, loss__alignment_weight=0.5))
    row = next(row for row in read_lines(tmp_path / "metrics.jsonl") if row.get("step") == 3)
    assert row["weighted_alignment"] == pytest.approx(0.5 * row["alignment"])
    assert row["loss"] == pytest.approx(row["answer_nll"] + row["rationale_nll"] + 0.5 * row["alignment"])
    shares = [row[f"gradient_share_{term}"] for term in ("answer", "rationale", "alignment")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0


def test_a_weight_that_does_nothing_is_warned_about(small_data, tmp_path, caplog):
    train(small_config(small_data, tmp_path, loss__alignment_weight="1e-6"))
    assert "the alignment term contributes" in caplog.text and "loss.alignment_weight" in caplog.text


def test_the_learning_rate_rises_and_falls_as_its_schedule_says():
    settings = {"learning_rate": 1.0, "warmup_ratio": 0.1}
    cosine = TrainConfig(lr_scheduler_type="cosine", **settings)
    assert [learning_rate_at(step, 100, cosine) for step in (0, 9, 10)] == pytest.approx([0.1, 1, 1])
    assert learning_rate_at(55, 100, cosine) == pytest.approx(0.5)
    assert learning_rate_at(99, 100, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    linear = TrainConfig(lr_scheduler_type="linear", **settings)
    assert learning_rate_at(55, 100, linear) == pytest.approx(0.5)
    assert learning_rate_at(80, 100, TrainConfig(lr_scheduler_type="constant", **settings)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 8}, 'train_batch_size is 8, the config has 32; write "auto" there, or set train.global'),
        (
            {"bf16": {"enabled": True}},
            'bf16.enabled is True, the config has False; write "auto" there, or set train.bf',
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, the config has False"),
        ({"optimizer": {"type": "Lion"}}, "optimizer is 'lion', the config has AdamW"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 3e-4}}},
            "optimizer.params.lr is 0.0003, the config has 0.001",
        ),
        ({"optimizer": {"type": "Adam", "params": {"momentum": 1}}}, "optimizer.params.momentum is unknown"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "the config has cosine"),
        ({"flops_profiler": {"enabled": True}}, "'flops_profiler' has no effect here; remove it"),
        ({"activation_checkpointing": {"partition_activations": True}}, "set student.gradient_checkpointing=true"),
        ({"tensorboard": {"enabled": True}}, "remove it and set train.report_to=tensorboard"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping', which DeepSpeed would silently ignore"),
        (
            {"gradient_clipping": 2.0},
            'gradient_clipping is 2.0, the config has 1.0; write "auto" there, or set train.max',
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is the string '2'; write 2"),
        ({"prescale_gradients": "true"}, "prescale_gradients is the string 'true'; write true"),
        ({"zero_optimization": 2}, "zero_optimization is 2"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com: extra inputs"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin": True}}},
            "zero_optimization.offload_param.pin: extra inputs",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            "offload_param.device: input should",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param has nothing to offload at stage 2; use stage 3",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer has nothing to offload at stage 0",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device is nvme without an nvme_path",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, "offload_optimizer is 'cpu'; write {"),
        ([2], "is not a JSON object"),
    ],
)
def test_a_deepspeed_json_that_sets_what_is_ours_is_refused_by_key(tmp_path, settings, message):
    import json

    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(TrainConfig(deepspeed=str(path)), world_size=2)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_auto_in_a_deepspeed_json_is_left_to_deepspeeds_defaults(tmp_path):
    import json

    path = tmp_path / "mine.json"
    offload = {"device": "cpu", "pin_memory": False, "buffer_size": "auto"}
    zero = {"stage": 3, "reduce_bucket_size": "auto", "offload_param": offload}
    path.write_text(json.dumps({"zero_optimization": zero}))
    settings = deepspeed_settings(TrainConfig(deepspeed=str(path)), world_size=2)
    wanted = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}
    assert settings["zero_optimization"] == wanted


def test_keys_of_ours_that_agree_are_accepted_and_all_that_do_not_are_named_together(tmp_path):
    import json

    path = tmp_path / "mine.json"
    same = {"train_batch_size": 32, "gradient_clipping": 1, "fp16": {"enabled": False}, "steps_per_print": 5}
    same |= {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "torch_adam": True}}}
    path.write_text(json.dumps(same | {"tensorboard": {"enabled": False}, "train_micro_batch_size_per_gpu": 32}))
    settings = deepspeed_settings(TrainConfig(deepspeed=str(path)), world_size=2)
    assert not {"optimizer", "fp16", "tensorboard"} & settings.keys() and settings["train_batch_size"] == 64
    path.write_text(json.dumps({"train_batch_size": True, "gradient_clipping": 3, "bf16": {"enabled": True}}))
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(TrainConfig(deepspeed=str(path)), world_size=2)
    named = ("train_batch_size is True", "gradient_clipping is 3", "bf16.enabled is True", "train.max_grad_norm")
    assert all(name in str(caught.value) for name in named)


def test_a_deepspeed_json_is_read_before_anything_starts(small_data, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}')
    with pytest.raises(ConfigError, match="offload_param has nothing to offload at stage 2"):
        train(small_config(small_data, tmp_path / "run", train__deepspeed=str(path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "block", "count"), [("gpt2", "GPT2Block", 2), ("t5", "T5Block", 4)])
def test_stage_3_gathers_a_block_at_once_and_runs_no_hooks_within(kind, block, count):
    from deepspeed.utils import get_z3_leaf_modules
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 32, "num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 16}
    makers = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**small)),
    }
    student = torch.nn.ModuleDict({"model": makers[kind](), "head": torch.nn.Linear(2, 2)})
    gather_by_block(student)
    assert [type(module).__name__ for module in get_z3_leaf_modules(student)] == [block] * count
    gather_by_block(torch.nn.Linear(2, 2))  # without blocks there is nothing to do


def test_both_engines_offer_the_same_methods():
    public = {name for name in dir(SingleProcessEngine) if not name.startswith("_")}
    assert public == {name for name in dir(DeepSpeedEngine) if not name.startswith("_")}
