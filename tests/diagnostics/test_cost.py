"""Planning on a laptop: sizes against real models, rules against numbers worked out by hand."""

import math
import subprocess
import sys

import pytest
from small_run import small_config

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config, FreshConfig, StudentConfig
from pst_dist.diagnostics.cost import (
    Machines,
    checkpoint_bytes,
    forward_size,
    make_plan,
    split_words,
)
from pst_dist.diagnostics.cost_page import plan_lines
from pst_dist.diagnostics.counted_rows import Rows
from pst_dist.errors import ConfigError, InputError
from pst_dist.student.pretrained import fresh_model
from pst_dist.training.memory.model_size import fresh_shape, shape_of
from pst_dist.training.memory.pass_limit import SHARE, pass_limit
from pst_dist.training.memory.training_memory import rank_memory

GEN = ["data.train=gen:last_letters?rows=64&seed=0", "data.validation_size=0", "train.global_batch_size=8"]


class Vocabulary:
    """As much of a tokenizer as a fresh model asks for."""

    eos_token_id, pad_token_id = 0, 1

    def __len__(self):
        return 260


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_parameters_are_counted_as_transformers_builds_them(architecture, tied, tmp_path):
    if architecture == "t5" and not tied:
        with pytest.raises(ConfigError, match="transformers always ties them"):
            load_config(None, ["student.fresh.architecture=t5", "student.fresh.tie_word_embeddings=false"])
        return
    sizes = {"hidden_size": 48, "num_layers": 3, "num_heads": 4, "tie_word_embeddings": tied}
    fresh = FreshConfig(architecture=architecture, **sizes)
    model = fresh_model(fresh, Vocabulary(), max_length=77)
    true = sum(parameter.numel() for parameter in model.parameters())
    by_formula = fresh_shape(fresh, max_length=77)
    assert by_formula.parameters == true and by_formula.vocabulary == 264
    model.save_pretrained(tmp_path)
    saved = StudentConfig(model_name_or_path=str(tmp_path))
    assert shape_of(saved, max_length=77).parameters == true
    (tmp_path / "model.safetensors").unlink()
    assert shape_of(saved, max_length=77).parameters == true, "config.json alone says it too"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json found"):
        shape_of(StudentConfig(model_name_or_path=str(tmp_path)), max_length=8)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 8}')
    with pytest.raises(InputError, match="without n_embd"):
        shape_of(StudentConfig(model_name_or_path=str(tmp_path)), max_length=8)


def test_states_of_a_rank_follow_the_zero_paper():
    """Its example: 7.5 billion parameters on 64 ranks in 16 bits take 120, 31.4, 16.6 and 1.9 GB at stages 0 to 3."""
    shape = fresh_shape(FreshConfig(), max_length=8)
    config = Config.model_validate({"train": {"bf16": True, "deepspeed": "zero1"}})
    parameters = 7_500_000_000
    found = [rank_memory(config, shape, parameters, stage, 64, micro_tokens=1).states / 1e9 for stage in (1, 2, 3)]
    assert found == pytest.approx([31.4, 16.6, 1.9], rel=0.02)
    # Stage 0 of ours keeps float32 weights: 4 + 4 + 8 bytes, as many as 2 + 2 + 12.
    assert rank_memory(config, shape, parameters, 0, 64, micro_tokens=1).states / 1e9 == pytest.approx(120)


def test_a_plan_of_several_arms_says_what_each_costs_and_all_together(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("output_dir: runs/my\n")
    words = ["plan", str(tmp_path / "my.yaml"), *GEN]
    assert run_verb([*words, "arms=[answer_only,pre_thinking]", "tokens_per_second=100"]) == 0
    said = capsys.readouterr().out
    alone = [
        make_plan(load_config(None, [*GEN, f"arm={arm}"]), Machines(tokens_per_second=100))
        for arm in ("answer_only", "pre_thinking")
    ]
    assert said.startswith(f"answer_only: {alone[0].parameters:,} parameters")
    first, second, both = said.splitlines()[-3:]
    assert first == "the run trains 2 arms one after the other; above is answer_only, and"
    assert second.startswith(f"  pre_thinking  {alone[1].rows.tokens / 64:.0f} tokens a row, ")
    assert both.split() == ["together", f"{60 * sum(plan.training_hours for plan in alone):.1f}", "min"]
    assert run_verb([*words, "arm=answer_only"]) == 0
    assert "arms" not in capsys.readouterr().out


def test_an_arm_of_two_kinds_of_sequences_counts_each_with_what_it_writes():
    rows = {
        arm: make_plan(load_config(None, [*GEN, f"arm={arm}"]), Machines()).rows.tokens
        for arm in ("answer_only", "post_thinking", "prefix")
    }
    assert rows["prefix"] == pytest.approx(rows["answer_only"] + rows["post_thinking"])
    passes = [make_plan(load_config(None, [*GEN, f"arm={arm}"]), Machines()).micro_batches for arm in ("pst", "prefix")]
    assert passes[1] == 2 * passes[0]


@pytest.mark.parametrize(
    ("limit", "tokens", "passes"),
    # 100 rows of a mean of 50 tokens: the longest is taken to have 75.
    [("auto", 8 * 75, 13), ("null", 8 * 75, 13), ("300", 300, 17), ("2000", 8 * 75, 13), ("60", 75, 67)],
)
def test_a_limit_of_tokens_bounds_a_pass_and_adds_passes(limit, tokens, passes):
    words = [f"train.micro_batch_tokens={limit}", "train.per_device_train_batch_size=8", "arm=answer_only"]
    rows = Rows(rows=10, texts=10, tokens=500.0, shard_bytes=0, exact=True)
    assert forward_size(load_config(None, words), rows, 100) == (tokens, passes)


def test_a_smaller_pass_takes_less_memory_for_activations():
    words = [*GEN, "arm=answer_only", "train.global_batch_size=64", "train.per_device_train_batch_size=64"]
    whole, cut = (
        make_plan(load_config(None, [*words, f"train.micro_batch_tokens={limit}"]), Machines())
        for limit in ("auto", "256")
    )
    assert cut.memory.activations < whole.memory.activations / 2 and cut.micro_batches > whole.micro_batches == 1


def test_a_gpu_limits_the_tokens_of_a_pass_as_a_training_on_it_would():
    words = ["student.fresh.hidden_size=1024", "student.fresh.num_layers=24", "student.fresh.num_heads=16"]
    words += ["layout.max_length=640", "train.global_batch_size=64", "train.per_device_train_batch_size=64"]
    words += ["data.train=gen:last_letters?rows=64&words=12", "data.validation_size=0"]
    overrides, machines = split_words([*words, "gpu=a100-40"])
    config = load_config(None, overrides)
    plan = make_plan(config, machines)
    whole = make_plan(config, Machines())
    sizes = {"trained": plan.trained, "stage": None, "ranks": 1, "memory": 40 * 2**30}
    assert plan.pass_limit == pass_limit(config, plan.shape, plan.parameters, **sizes)
    assert 640 < plan.pass_limit.tokens < 64 * plan.rows.longest
    assert whole.pass_limit is None and whole.micro_batches == 1 < plan.micro_batches
    # The rows are a little shorter than max_length, for which the limit was computed.
    assert 0.6 * SHARE < plan.memory.total / (40 * 2**30) <= SHARE < whole.memory.total / (40 * 2**30)
    page = "\n".join(plan_lines(plan))
    assert f"would set at most {plan.pass_limit.tokens:,} tokens a pass (80% of 40 GiB, less 4.5" in page
    assert "one rank fits in 40 GiB" in page and "not tried on a GPU" in page

    def said(*more: str) -> str:
        overrides, machines = split_words([*words, *more])
        (line,) = (line for line in plan_lines(make_plan(load_config(None, overrides), machines)) if "auto" in line)
        return line

    assert "would set one row a pass: 80% of 4 GiB, less 4.5" in said("gpu_memory=4")
    assert "would set none: 1 rows of 640 tokens fit" in said("gpu=h200", "train.per_device_train_batch_size=1")
    overrides, machines = split_words([*words, "gpu=t4", "train.micro_batch_tokens=4096"])
    assert make_plan(load_config(None, overrides), machines).pass_limit is None


def test_steps_checkpoints_and_the_interval_between_saves():
    words = ["nodes=2", "gpus=4", "tokens_per_second=0.1", "write_gb_per_second=0.001", *GEN]
    overrides, machines = split_words([*words, "train.num_train_epochs=3", "train.deepspeed=zero1"])
    plan = make_plan(load_config(None, overrides), machines)
    assert plan.rows.rows == 64 and plan.steps == 3 * 8 and plan.micro_batches == 1
    assert plan.checkpoint_bytes == 12 * plan.parameters
    seconds = 12 * plan.parameters / 1e6
    between = 6300 / 2 * 3600
    assert plan.save_every_seconds == pytest.approx(math.sqrt(2 * seconds * between))
    assert plan.training_hours == pytest.approx(3 * plan.rows.tokens / 0.8 / 3600)
    assert plan.failures == pytest.approx(plan.training_hours * 3600 / between)
    assert plan.save_every_steps == round(plan.save_every_seconds / (plan.training_hours * 3600 / 24))
    overrides, machines = split_words(["tokens_per_second=1000", *GEN])
    short = make_plan(load_config(None, overrides), machines)
    assert short.save_every_seconds == pytest.approx(short.training_hours * 3600), "not longer than the training"
    assert short.save_every_steps == short.steps
    assert "its last save is enough" in "\n".join(plan_lines(short))


def test_tokens_of_the_byte_tokenizer_are_counted_nearly_as_trained(small_data, tmp_path):
    from pst_dist.training.trainer import train

    config = small_config(small_data, tmp_path, train__max_steps=4)
    planned = make_plan(config, Machines())
    trained = train(config)
    assert planned.rows.exact
    assert planned.rows.tokens * 4 * 8 / planned.rows.rows == pytest.approx(trained.tokens, rel=0.05)


def test_a_checkpoint_on_disk_is_as_large_as_planned(small_data, tmp_path):
    from pst_dist.training.trainer import train

    config = small_config(small_data, tmp_path, student__fresh__hidden_size=128, train__max_steps=1)
    train(config)
    planned = make_plan(config, Machines())
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert size == pytest.approx(checkpoint_bytes(planned.parameters), rel=0.03)


def test_the_page_names_the_chosen_stage_and_what_is_not_known(capsys):
    assert run_verb(["plan", *_demo("nodes=2", "gpus=8", "train.deepspeed=zero2", "gpu_memory=0.0001")]) == 0
    page = capsys.readouterr().out
    assert "2 x 8 ranks, zero2" in page and "does not fit in 0.0001 GiB" in page
    assert "unknown: add --measure, or set tokens_per_second=…" in page
    (chosen,) = (line for line in page.splitlines() if "<- this run" in line)
    assert chosen.startswith("  ZeRO stage 2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=none"], "nodes='none'"),
        (["gpus=0"], "gpus='0'"),
        (["nodes=2"], "train.deepspeed is not set"),
        (["train.deepspeed=missing.json"], "cannot read the ZeRO stage"),
        (["node=2"], "unknown key"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words, said, capsys):
    assert run_verb(["plan", *_demo(*words)]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_planning_needs_no_torch():
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pst_dist.cli.main import run_verb\n"
        f"sys.exit(run_verb(['plan', *{_demo()!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ZeRO stage 3" in done.stdout


def _demo(*words: str) -> list[str]:
    return ["demo", *GEN[:2], *words]
