"""`train.optim` and `train.fp16`: what moves which weights, exact resume, loss scaling, refusals by name."""

import importlib.util
import math
import shutil

import pytest
import torch
from run_files import losses, state
from safetensors.torch import load_file
from small_run import small_config
from tiny import Tiny

from pst_dist.config.loading import load_config
from pst_dist.diagnostics.cost import Machines, make_plan
from pst_dist.diagnostics.cost_page import plan_lines
from pst_dist.distributed.ranks import Ranks
from pst_dist.errors import ConfigError, EnvironmentFault, StaleError
from pst_dist.storage.json_files import read_json
from pst_dist.training import early_checks
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.engines.fragments import start_moments
from pst_dist.training.engines.optimizer import TwoOptimizers, adamw, build_optimizer, hidden_matrices
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.loss import TermWeights
from pst_dist.training.step import take_step, totals_over_ranks
from pst_dist.training.trainer import train

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
OTHERS = ["muon", pytest.param("adamw_8bit", marks=needs_bitsandbytes)]


def with_gradients(seed: int = 0, architecture: str = "gpt2") -> Tiny:
    """A tiny student with the gradients of one pass over its rows."""
    tiny = Tiny("pst", architecture, seed=seed)
    batch = tiny.batch()
    tiny.student(batch, TermWeights.of(tiny.config.loss, "pst").scales(batch.counts).float()).loss.backward()
    return tiny


def settings(*words: str):
    return load_config(None, ["train.learning_rate=1e-3", "train.weight_decay=0", *words]).train


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_hidden_matrices_are_those_of_the_layers_alone(architecture):
    tiny = Tiny("pst", architecture)
    names = {name for name, value in tiny.student.named_parameters() if value in hidden_matrices(tiny.student)}
    rest = {name for name, _ in tiny.student.named_parameters()} - names
    assert len(names) >= 8 and not any(
        word in name for name in names for word in ("wte", "wpe", "embed", "shared", "lm_head", "ln_", "norm", "bias")
    )
    assert "head.weight" in rest and all(
        "attn.c" not in name and "q_proj" not in name for name in rest if "bias" not in name
    )


def test_muon_moves_matrices_along_an_orthogonal_matrix_and_the_rest_as_adamw():
    moved, reference = with_gradients(), with_gradients()
    optimizer = build_optimizer(moved.student, settings("train.optim=muon"), CPU)
    plain = adamw(reference.student, settings())
    before = {name: value.detach().clone() for name, value in moved.student.named_parameters()}
    optimizer.step()
    plain.step()
    matrices, theirs = hidden_matrices(moved.student), dict(reference.student.named_parameters())
    for name, value in moved.student.named_parameters():
        if value not in matrices:
            assert torch.allclose(value, theirs[name], atol=1e-7), name
            continue
        update = (before[name] - value) / 1e-3
        expected = 0.2 * math.sqrt(max(value.shape))
        # Five Newton-Schulz steps bring every singular value of a full-rank matrix near one.
        ratios = torch.linalg.svdvals(update) / expected
        assert 0.3 < ratios[0] < 1.3 and ratios.median() > 0.3, (name, ratios)
        # Along the gradient: its polar factor U V' has the largest product with it of all orthogonal matrices.
        polar = torch.linalg.matrix_norm(value.grad, "nuc")
        assert (update / expected * value.grad).sum() > 0.6 * polar, name


@needs_bitsandbytes
def test_8bit_adamw_stays_near_adamw_and_keeps_a_byte_for_each_moment():
    moved, reference = with_gradients(), with_gradients()
    optimizer = build_optimizer(moved.student, settings("train.optim=adamw_8bit"), CPU)
    plain = adamw(reference.student, settings())
    for _ in range(3):
        optimizer.step()
        plain.step()
    theirs = dict(reference.student.named_parameters())
    large = [value for value in hidden_matrices(moved.student) if value.numel() >= 4096]
    assert large and all(optimizer.state[value]["state1"].dtype == torch.uint8 for value in large)
    for name, value in moved.student.named_parameters():
        assert (value - theirs[name]).abs().mean() < 3e-4, name


@pytest.mark.encoder
@pytest.mark.parametrize("optim", OTHERS)
def test_a_resumed_training_ends_with_the_same_bits(optim, small_data, tmp_path):
    changes = {"train__save_steps": 4, "train__optim": optim, "student__fresh__hidden_size": 64}
    train(small_config(small_data, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-8")
    (tmp_path / "again" / "train.json").unlink()
    train(small_config(small_data, tmp_path / "again", **changes))
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < 0.95 * losses(tmp_path / "whole")[0]
    one, two = (load_file(next(tmp_path.glob(f"{run}/checkpoints/checkpoint-8/state-*"))) for run in ("whole", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    kept = {key.partition("/")[0] for key in one}
    assert kept == {"weight", "exp_avg", "exp_avg_sq"} | (
        {"momentum_buffer"} if optim == "muon" else {"state1", "state2", "absmax1", "absmax2"}
    )
    with pytest.raises(StaleError, match=rf"trained with train\.optim={optim}, this run has train\.optim=adamw"):
        train(small_config(small_data, tmp_path / "again", **(changes | {"train__optim": "adamw"})))


def test_state_can_be_made_before_the_first_step():
    tiny = with_gradients()
    optimizer = build_optimizer(tiny.student, settings("train.optim=muon"), CPU)
    assert isinstance(optimizer, TwoOptimizers)
    start_moments(optimizer, tiny.student.parameters(), 3)
    first = next(iter(hidden_matrices(tiny.student)))
    assert set(optimizer.state[first]) == {"momentum_buffer"} and not optimizer.state[first]["momentum_buffer"].any()
    assert all(int(kept["step"]) == 3 for value, kept in optimizer.state.items() if "exp_avg" in kept)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.optim=muon", "train.deepspeed=zero2"], r"train\.optim=muon needs whole matrices"),
        (["train.optim=adamw_8bit", "train.deepspeed=zero1"], r"train\.optim=adamw_8bit needs whole matrices"),
        (["train.optim=muon", "student.model_name_or_path=x/y", "student.lora.rank=4"], "factors of LoRA"),
        (["train.fp16=true", "train.bf16=true"], "exclude each other"),
        (["train.fp16=true", "train.deepspeed=zero1"], "one process"),
        (["train.optim=sgd"], r"train\.optim"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words, told):
    with pytest.raises(ConfigError, match=told):
        load_config(None, words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.fp16 needs a GPU"):
        train(load_config(None, ["train.fp16=true", f"output_dir={tmp_path}"]))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8bit_without_its_package_is_one_line(tmp_path):
    with pytest.raises(EnvironmentFault, match="needs the package bitsandbytes"):
        train(load_config(None, ["train.optim=adamw_8bit", f"output_dir={tmp_path}"]))


def one_step(tiny: Tiny, train_config, *, scale: float | None = None):
    """(engine, record) after one step over the rows."""
    engine = SingleProcessEngine(tiny.student, train_config, Ranks.from_environment())
    if scale is not None:
        engine.scaling = [scale, 0.0]
    batch = tiny.batch()
    totals = totals_over_ranks([batch], 0)
    weights = TermWeights.of(tiny.config.loss, "pst")
    fresh = RunState("f", engine.name, 1)
    return engine, take_step(engine, fresh, [batch], totals, weights, train_config, seed=0, total=10, watch=True)


def test_float16_steps_like_float32_whatever_scale_it_begins_with(caplog):
    """The engine itself computes in float16 on a CPU too, so that its arithmetic can be tested anywhere."""
    exact, half = Tiny("pst"), Tiny("pst")
    _, record = one_step(exact, settings())
    with caplog.at_level("INFO", logger="pst_dist"):
        engine, scaled = one_step(half, replace_fp16(settings()), scale=2.0**40)
    assert "float16 gradients overflow; loss scale 1.09951e+12 -> 5.49756e+11" in caplog.text
    assert 1 <= engine.scaling[0] < 2.0**40
    assert scaled.loss == pytest.approx(record.loss, rel=2e-3)
    assert scaled.grad_norm == pytest.approx(record.grad_norm, rel=2e-2)
    for name, value in record.gradients.items():
        assert scaled.gradients[name] == pytest.approx(value, rel=3e-2), name
    before = dict(Tiny("pst").student.named_parameters())
    theirs = dict(exact.student.named_parameters())
    moved = [
        torch.nn.functional.cosine_similarity((v - before[n]).flatten(), (theirs[n] - before[n]).flatten(), dim=0)
        for n, v in half.student.named_parameters()
        if v.ndim == 2
    ]
    assert min(moved) > 0.8


def replace_fp16(train_config):
    return train_config.model_copy(update={"fp16": True})


@pytest.mark.encoder
def test_a_training_in_float16_resumes_with_its_scale(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(early_checks, "check_fp16", lambda *_: None)  # a CPU computes the same, but slowly
    changes = {"train__save_steps": 4, "train__fp16": True}
    train(small_config(small_data, tmp_path / "whole", **changes))
    saved = read_json(tmp_path / "whole" / "checkpoints" / "checkpoint-4" / "run_state.json")
    assert saved["loss_scaling"] == [65536.0, 4.0] or saved["loss_scaling"][0] < 65536
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-8")
    (tmp_path / "again" / "train.json").unlink()
    train(small_config(small_data, tmp_path / "again", **changes))
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    one, two = (state(tmp_path / run, 8) for run in ("whole", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    ends = [read_json(tmp_path / run / "checkpoints" / "checkpoint-8" / "run_state.json") for run in ("whole", "again")]
    assert ends[0]["loss_scaling"] == ends[1]["loss_scaling"]


@pytest.mark.gpu
@pytest.mark.encoder
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{"train__fp16": True}, {"train__optim": "muon"}, {"train__optim": "adamw_8bit"}])
def test_each_of_them_trains_on_a_gpu(changes, small_data, tmp_path):
    train(small_config(small_data, tmp_path, **changes))
    assert losses(tmp_path)[-1] < 0.95 * losses(tmp_path)[0]


@pytest.mark.parametrize(("optim", "bytes_a_weight"), [("adamw", 8), ("muon", 4), ("adamw_8bit", 2.03125)])
def test_the_plan_counts_the_state_of_each_optimizer(optim, bytes_a_weight, tmp_path):
    config = small_config(tmp_path / "data", tmp_path / "run", train__optim=optim, arm="answer_only")
    plan = make_plan(config, Machines())
    hidden = plan.trained - plan.shape.vocabulary * plan.shape.hidden_size
    expected = bytes_a_weight * hidden + 8 * (plan.trained - hidden)
    assert plan.memory.optimizer == pytest.approx(expected)
    assert plan.checkpoint_bytes == pytest.approx(4 * plan.trained + expected)
    assert plan_lines(plan)[0].endswith(f"one process, float32, {optim}")
