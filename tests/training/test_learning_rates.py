"""Own learning rates of the alignment head and of embeddings, in one process and on two ranks of each ZeRO stage."""

import re
from pathlib import Path

import pytest
import torch
import zoo
from adapted import family
from ranks import launch
from small_run import small_config
from tiny import Tiny

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config, TrainConfig
from pst_dist.storage.json_files import read_lines
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.engines.optimizer import adamw, high_rate, set_learning_rate
from pst_dist.training.module import build_student
from pst_dist.training.trainer import train

STAGES = ("zero1", "zero2", "zero3")
HALVES = {"train__save_steps": 4, "train__head_learning_rate": "5e-2", "train__embedding_learning_rate": "2e-3"}


def test_only_the_head_gets_its_rate_and_both_follow_the_schedule():
    student = Tiny("pst").student
    optimizer = adamw(student, TrainConfig(learning_rate=1e-3, head_learning_rate=4e-3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(student.parameters()))
    for name, parameter in student.named_parameters():
        assert rates[id(parameter)] == pytest.approx(4e-3 if name == "head.weight" else 1e-3), name
    set_learning_rate(optimizer.param_groups, 5e-4)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([5e-4, 2e-3])


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("svamp", 1e-3),
        ("svamp student.model_name_or_path=some/model", 1e-4),
        ("svamp student.model_name_or_path=some/model student.lora.rank=8", 5e-4),
        ("svamp student.model_name_or_path=minilm", 5e-4),
        ("svamp student.model_name_or_path=some/bert student.warm_start=encoder_decoder", 5e-4),
        ("svamp +smollm2", 1e-4),
        ("svamp +smollm2 +lora", 5e-4),
        ("svamp student.model_name_or_path=some/model train.learning_rate=2e-5", 2e-5),
        ("demo student.model_name_or_path=some/model", 2e-3),
    ],
)
def test_the_default_rate_follows_the_kind_of_student(words, rate):
    name, *overrides = words.split()
    config = load_config(name, overrides)
    assert config.train.learning_rate == rate
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("", None),
        ("student.model_name_or_path=m", "=0.002 is high for a pretrained student: the default would be 0.0001"),
        ("student.model_name_or_path=m student.lora.rank=8 train.learning_rate=3e-3", "0.003 is high for LoRA"),
        ("student.model_name_or_path=m student.lora.rank=8", None),
        ("student.model_name_or_path=m train.learning_rate=4e-4", None),
    ],
)
def test_a_rate_for_random_weights_is_questioned_for_a_pretrained_student(words, warning):
    said = high_rate(load_config("demo", words.split()))
    assert said is None if warning is None else re.search(warning, said)


def whole(name: str, folder: Path) -> torch.nn.Module:
    """A student of a family, all of whose weights are trained, with an alignment head."""
    student = {"model_name_or_path": str(zoo.make(name, folder / "base"))}
    config = Config.model_validate({"student": student, "layout": {"max_length": 96}})
    return build_student(config, build_tokenizer(config.student, []), 8)


def rates_of(student: torch.nn.Module, **rates: float) -> dict[str, float]:
    """Parameter name -> its learning rate."""
    optimizer = adamw(student, TrainConfig(learning_rate=1e-3, **rates))
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in student.named_parameters() if id(p) in found}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_input_and_output_embeddings_get_their_rate_in_every_family(name, tmp_path):
    student = whole(name, tmp_path)
    rates = rates_of(student, embedding_learning_rate=5e-4, head_learning_rate=4e-3)
    assert len(rates) == len(list(student.parameters()))
    vocabulary = student.model.get_input_embeddings().weight.shape[0]
    for key, parameter in student.named_parameters():
        expected = 4e-3 if key == "head.weight" else 5e-4 if parameter.shape[0] == vocabulary else 1e-3
        if parameter.ndim == 2:
            assert rates[key] == pytest.approx(expected), key
        else:
            assert rates[key] == pytest.approx(1e-3), key
    assert sum(rate == pytest.approx(5e-4) for rate in rates.values()) >= 1


def test_with_lora_the_added_tokens_get_the_rate_of_embeddings(tmp_path):
    pytest.importorskip("peft")
    rates = rates_of(family("llama3", tmp_path).student, embedding_learning_rate=5e-4)
    rows = {key: rate for key, rate in rates.items() if key.endswith(".trained_rows")}
    assert rows and all(rate == pytest.approx(5e-4) for rate in rows.values())
    others = [rate for key, rate in rates.items() if key not in rows]
    assert any("lora_" in key for key in rates) and all(rate == pytest.approx(1e-3) for rate in others)


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
