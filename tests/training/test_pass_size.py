"""Passes that do not fit in memory are cut anew, and the step is the one that it would have been."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from rank_group import RankGroup
from refusing import SAID, Refusing, refusing_students
from run_files import curve, losses, state
from small_run import small_config
from tiny import ROWS
from waiting import wait_until

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.distributed import device_memory
from pst_dist.distributed.device_memory import GIB, DeviceMemory, in_halves, is_out_of_memory
from pst_dist.distributed.ranks import Ranks, device_of
from pst_dist.errors import EnvironmentFault
from pst_dist.storage.manifest import read_lines
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.memory.model_size import fresh_shape, shape_of
from pst_dist.training.memory.pass_limit import SHARE, pass_limit
from pst_dist.training.memory.pass_size import limit_here
from pst_dist.training.memory.training_memory import activation_bytes, rank_memory
from pst_dist.training.module import build_student
from pst_dist.training.trainer import train

NO_LIMIT = 10**9


def trained(config: Config, refusing: Refusing | None = None, dropout: float = 0.0) -> Refusing:
    """Train a config with students that refuse large passes; returns what they saw."""
    with refusing_students(refusing or Refusing(NO_LIMIT), dropout) as seen:
        train(config)
    return seen


def halvings(caplog) -> list[str]:
    return [record.message for record in caplog.records if "repeating with" in record.message]


@pytest.mark.encoder
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_a_step_that_does_not_fit_is_taken_again_and_nothing_is_left_of_the_first_try(
    architecture, backward, small_data, tmp_path, caplog
):
    """Its first pass fits, so that gradients exist when the second is refused. Four rows have some 390 tokens."""
    student = {"student__fresh__architecture": architecture}
    with caplog.at_level(logging.WARNING, logger="pst_dist"):
        # The first call looks at the head, with one token.
        seen = trained(
            small_config(small_data, tmp_path / "refused", **student), Refusing(250, after=2, backward=backward), 0.1
        )
    assert seen.refused == 1 and len(halvings(caplog)) == 1, halvings(caplog)
    first, second = seen.seen[1:3]
    assert first > 250 and f"step 1: a pass of 4 row(s) and {second} tokens" in halvings(caplog)[0]
    assert f"train.micro_batch_tokens={second // 2}" in halvings(caplog)[0]
    # The same limit from the beginning: the same cuts, the same draws of dropout, and so the same bits.
    limit = {**student, "train__micro_batch_tokens": second // 2}
    trained(small_config(small_data, tmp_path / "limited", **limit), dropout=0.1)
    assert losses(tmp_path / "refused") == losses(tmp_path / "limited") and len(losses(tmp_path / "refused")) == 8
    one, two = state(tmp_path / "refused", 8), state(tmp_path / "limited", 8)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    scores = [read_lines(tmp_path / run / "metrics.jsonl")[-1]["validation"] for run in ("refused", "limited")]
    assert scores[0] == scores[1]


@pytest.mark.encoder
@pytest.mark.parametrize("drawn", [False, True], ids=["by length", "as drawn"])
def test_a_training_with_halved_passes_follows_one_with_whole_passes(drawn, small_data, tmp_path, caplog):
    """Sums over other passes differ by rounding only. 150 tokens hold one row: step 3 halves twice."""
    changes = {"train__micro_batch_tokens": "null"} if drawn else {}
    whole = trained(small_config(small_data, tmp_path / "whole", **changes))
    # Two steps of two passes, and the look at the head.
    with caplog.at_level(logging.WARNING, logger="pst_dist"):
        seen = trained(small_config(small_data, tmp_path / "halved", **changes), Refusing(150, after=5))
    key = "train.per_device_train_batch_size" if drawn else "train.micro_batch_tokens"
    of_steps = [line for line in halvings(caplog) if line.startswith("step ")]
    assert len(of_steps) == 2 and all(line.startswith("step 3: ") and key in line for line in of_steps)
    assert max(whole.seen) > 350 and seen.refused >= 2
    for one, two in zip(curve(tmp_path / "whole"), curve(tmp_path / "halved"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["tokens"] == one["tokens"]
    weights = state(tmp_path / "whole", 8), state(tmp_path / "halved", 8)
    for name in (name for name in weights[0] if name.endswith("/weight")):
        # Adam divides by the root of tiny squares, so rounding of a gradient is larger in a weight.
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-3)


@pytest.mark.encoder
def test_halving_reaches_loader_workers_and_the_next_start_begins_anew(small_data, tmp_path, caplog):
    changes = {"train__dataloader_num_workers": 1, "train__save_steps": 4, "train__save_total_limit": 9}
    with caplog.at_level(logging.WARNING, logger="pst_dist"):
        trained(small_config(small_data, tmp_path / "run", **changes, train__max_steps=4), Refusing(250))
        assert len(halvings(caplog)) == 1
        longer = {"train__accept_changes": True, "train__max_steps": 8, "train__micro_batch_tokens": 198}
        seen = trained(small_config(small_data, tmp_path / "run", **changes, **longer), Refusing(250))
    assert seen.refused == 0 and len(halvings(caplog)) == 1 and len(losses(tmp_path / "run")) == 8


@pytest.mark.encoder
def test_validation_is_cut_anew_too(small_data, tmp_path, caplog):
    """Validation asks for passes of its own only after the steps of an epoch; four steps here, of two passes."""
    settings = {"train__max_steps": 4, "train__eval_steps": 4, "train__sample_answers": 0}
    trained(small_config(small_data, tmp_path / "whole", **settings))
    with caplog.at_level(logging.WARNING, logger="pst_dist"):
        trained(small_config(small_data, tmp_path / "halved", **settings), Refusing(250, after=9))
    (line,) = halvings(caplog)
    assert line.startswith("validation: a pass of 4 row(s)")
    scores = [read_lines(tmp_path / run / "metrics.jsonl")[-1]["validation"] for run in ("whole", "halved")]
    assert scores[1] == pytest.approx(scores[0], abs=2e-5)


@pytest.mark.encoder
def test_a_row_that_does_not_fit_ends_the_training_with_one_line(small_data, tmp_path, capsys):
    config = small_config(small_data, tmp_path / "run", student__fresh__architecture="llama")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    with refusing_students(Refusing(50)):
        assert run_verb(["train", str(path)]) == EnvironmentFault.exit_code == 4
    errors = [line for line in capsys.readouterr().err.splitlines() if "error[" in line]
    assert len(errors) == 1 and "error[ENVIRONMENT] step 1: a pass of 1 row(s) and 9" in errors[0], errors
    assert f"does not fit in memory ({SAID})" in errors[0]
    for key in ("layout.max_length", "gradient_checkpointing=true", "train.bf16=true", "train.deepspeed=zero3_offload"):
        assert key in errors[0]
    assert "LoRA" not in errors[0], "a fresh student has no pretrained weights to adapt"
    assert not (tmp_path / "run" / "train.json").exists()


@pytest.mark.encoder
def test_rows_that_belong_together_are_not_cut(small_data, tmp_path):
    nce = {"loss__alignment": "info_nce", "train__max_steps": 2, "train__eval_steps": 2}
    symmetric = small_config(small_data, tmp_path / "both", loss__symmetric=True, **nce)
    with pytest.raises(EnvironmentFault, match=r"step 1: .*set train\.per_device_train_batch_size=2;"):
        trained(symmetric, Refusing(250))
    # In a step the candidates are those of the whole batch, in a validation those of the pass.
    with pytest.raises(EnvironmentFault, match=r"validation: .*set train\.per_device_train_batch_size=2;"):
        trained(small_config(small_data, tmp_path / "one", **nce), Refusing(250, after=5))


@pytest.mark.encoder
def test_memory_that_runs_out_elsewhere_is_one_line_too(small_data, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    with pytest.raises(EnvironmentFault, match=r"memory ran out in optimizer of step 1 \(CUDA out.*try a"):
        trained(small_config(small_data, tmp_path))


@pytest.mark.encoder
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_rank_that_runs_out_of_memory_ends_all_of_them(stage, small_data, tmp_path):
    config = small_config(small_data, tmp_path / "run", train__deepspeed=stage, train__timeout_seconds=120)
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    group = RankGroup(tmp_path, [str(tmp_path / "config.yaml")], 2, refuses={1: 250}).start()
    try:
        wait_until(lambda: group.look() == [0, 1], "both ranks end", seconds=120)
    finally:
        group.stop()
    said = [group.errors(rank) for rank in (0, 1)]
    assert group.codes() == [7, 4], said
    letter = r"step 1: a pass of 4 row(s) and "
    assert [len(lines) for lines in said] == [1, 1]
    assert letter in said[1][0] and "set train.micro_batch_tokens=1" in said[1][0], said
    assert "rank 1 on" in said[0][0] and letter in said[0][0] and "set train.micro_batch_tokens=1" in said[0][0], said


# --- the limit of a GPU -----------------------------------------------------------------------------------------------

H100 = 80 * GIB


def limit_of(words: list[str], memory: float, *, ranks: int = 1, stage: int | None = None):
    config = load_config(None, words)
    shape = fresh_shape(config.student.fresh, max_length=config.layout.max_length)
    count = shape.parameters
    found = pass_limit(config, shape, count, trained=count, stage=stage, ranks=ranks, memory=memory)
    return config, shape, found


def test_the_limit_of_a_llama_is_what_its_memory_holds_worked_out_by_hand():
    """2 layers of width 64 in float32: each token saves what `_layer_bytes` says, twice, and the ends."""
    words = ["student.fresh.architecture=llama", "student.fresh.hidden_size=64", "student.fresh.num_layers=2"]
    _, shape, found = limit_of([*words, "train.per_device_train_batch_size=4096"], 2 * GIB)
    d, f = 64, 256
    layer = 4 * (6 * d + 2 * (d + d) + 4 * f) + 4 * 512  # norms and projections, the gated MLP, the mask of 512 tokens
    a_token = 6 * 4 * d + 2 * layer + layer / 3
    standing = 16 * shape.parameters
    logits = 2 * 4 * shape.vocabulary  # and their gradient, a token
    head = 4 * shape.vocabulary * d
    by_hand = math.floor((SHARE * 2 * GIB - standing - head) / (a_token + logits))
    assert found.tokens == pytest.approx(by_hand, abs=1) and found.tokens > 50_000
    assert found.fixed == standing


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("words", "stage", "ranks"),
    [
        ([], None, 1),
        (["train.bf16=true"], None, 1),
        (["student.gradient_checkpointing=true"], None, 1),
        (["train.deepspeed=zero2", "train.bf16=true"], 2, 8),
        (["student.attn_implementation=eager"], None, 1),
    ],
)
def test_one_more_token_would_not_fit(architecture, words, stage, ranks):
    words = [*words, f"student.fresh.architecture={architecture}", "train.per_device_train_batch_size=100000"]
    words += ["student.fresh.hidden_size=1024", "student.fresh.num_layers=12", "student.fresh.num_heads=16"]
    config, shape, found = limit_of(words, H100, ranks=ranks, stage=stage)

    def total(tokens: int, share: float) -> float:
        longest = round(512 / max(share, 1 - share)) if architecture == "t5" else 512
        sizes = {"micro_tokens": tokens, "longest": longest, "prompt_share": share, "on_gpu": True}
        one = rank_memory(config, shape, shape.parameters, stage or 0, ranks, **sizes)
        return one.total - (one.buffers if stage is None else 0)

    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert max(total(found.tokens, share) for share in shares) <= SHARE * H100
    assert max(total(found.tokens + 1, share) for share in shares) > SHARE * H100
    assert activation_bytes(config, shape, found.tokens, 512, 0.5) < H100


def test_more_memory_and_cheaper_passes_raise_the_limit():
    big = ["student.fresh.hidden_size=2048", "student.fresh.num_layers=24", "student.fresh.num_heads=16"]
    big += ["train.per_device_train_batch_size=100000"]
    plain = limit_of(big, H100)[2].tokens
    assert limit_of(big, H100 / 2)[2].tokens < plain < limit_of(big, 2 * H100)[2].tokens
    assert limit_of([*big, "student.gradient_checkpointing=true"], H100)[2].tokens > 3 * plain
    assert limit_of([*big, "train.deepspeed=zero3"], H100, ranks=8, stage=3)[2].tokens > plain
    offload = limit_of([*big, "train.deepspeed=zero3_offload"], H100, stage=3)[2]
    assert offload.fixed < limit_of([*big, "train.deepspeed=zero3"], H100, stage=3)[2].fixed / 3


def test_no_more_is_looked_for_than_passes_can_have_and_no_less_than_a_token():
    assert limit_of(["train.per_device_train_batch_size=4"], H100)[2].tokens == 2 * 4 * 512
    assert limit_of(["student.fresh.architecture=t5"], H100)[2].tokens == 2 * 32 * 2 * 512
    nothing = limit_of([], 2**20)[2]
    assert nothing.tokens == 1 and nothing.fixed > 2**20


@pytest.mark.parametrize(
    "words",
    [
        ["student.fresh.architecture=gpt2"],
        ["student.fresh.architecture=llama"],
        ["student.fresh.architecture=t5"],
        pytest.param(["student.warm_start=causal"], marks=pytest.mark.encoder),
        pytest.param(["student.warm_start=encoder_decoder"], marks=pytest.mark.encoder),
    ],
)
def test_a_student_in_memory_has_the_shape_that_the_plan_reads_from_files(words):
    """Rows of added tokens are in its vocabulary, and its parameters are counted."""
    if "warm_start" in words[0]:
        words = [*words, "student.model_name_or_path=minilm", "student.new_token_init=mean"]
    config = load_config(None, [*words, "train.per_device_train_batch_size=64"])
    tokenizer = build_tokenizer(config.student, ROWS)
    student = build_student(config, tokenizer, 16)
    shape = shape_of(config.student, max_length=config.layout.max_length)
    count = sum(one.numel() for one in student.parameters())
    wanted = pass_limit(config, shape, count, trained=count, stage=None, ranks=1, memory=gpu(2).own)
    assert limit_here(config, student, gpu(2), Ranks()) == wanted
    assert 1 < wanted.tokens < 64 * 512


def gpu(gib: float) -> DeviceMemory:
    return DeviceMemory("a GPU for a test", free=round(0.75 * gib * GIB), held=round(0.25 * gib * GIB))


@pytest.mark.encoder
def test_auto_takes_the_limit_of_the_device_and_says_why(small_data, tmp_path, monkeypatch, caplog):
    """Four rows of 390 tokens take some MiB; the device has so little that they must be cut."""
    monkeypatch.setattr(device_memory, "read_memory", lambda device: gpu(0.004))
    with caplog.at_level(logging.INFO, logger="pst_dist"):
        seen = trained(small_config(small_data, tmp_path / "auto"))
    (line,) = (record.message for record in caplog.records if "train.micro_batch_tokens=auto" in record.message)
    limit = int(line.partition("at most ")[2].partition(" tokens")[0].replace(",", ""))
    assert 100 < limit < 390 and "(a GPU for a test: 80% of 0.004 GiB, less 0.00" in line, line
    of_steps = [positions for positions in seen.seen if positions > 64]
    assert max(of_steps) <= limit
    whole = trained(small_config(small_data, tmp_path / "whole", train__micro_batch_tokens=NO_LIMIT))
    assert max(whole.seen) > 390
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)


def test_a_limit_that_was_set_and_rows_as_drawn_stay_as_they_are(small_data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(device_memory, "read_memory", lambda device: gpu(0.004))
    with caplog.at_level(logging.INFO, logger="pst_dist"):
        for value in ("300", "null"):
            trained(small_config(small_data, tmp_path / value, train__max_steps=1, train__micro_batch_tokens=value))
    assert "train.micro_batch_tokens=auto" not in caplog.text


def test_what_is_no_lack_of_memory_is_raised_and_what_is_continues_in_halves():
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        torch.empty(2**50)
    assert is_out_of_memory(raised.value) and not is_out_of_memory(RuntimeError("a bug"))
    tried = []

    def double(part: list[int]) -> list[int]:
        tried.append(len(part))
        if len(part) > 2 or 7 in part:
            raise torch.OutOfMemoryError(SAID)
        return [2 * item for item in part]

    def alone(item: int) -> EnvironmentFault:
        return EnvironmentFault(f"{item} does not fit")

    found = [made for _, part in in_halves([1, 2, 3, 4, 5], double, alone) for made in part]
    assert found == [2, 4, 6, 8, 10] and tried == [5, 3, 2, 1, 2]
    tried.clear()
    list(in_halves([1, 2, 3, 4, 5], double, alone, fits=lambda part: len(part) < 3))
    assert tried == [2, 1, 2], "nothing is tried that does not fit by the estimate"
    with pytest.raises(EnvironmentFault, match="7 does not fit"):
        list(in_halves([6, 7], double, alone))
    with pytest.raises(TypeError):
        list(in_halves([1, None], double, alone))  # type: ignore[list-item]


@pytest.mark.gpu
@pytest.mark.encoder
def test_a_gpu_gets_a_limit_and_keeps_to_its_memory(small_data, tmp_path, caplog):
    """A tenth of the GPU is left to the process, so that the limit binds; then passes are really too large."""
    device = device_of(Ranks())
    whole = {"student__fresh__hidden_size": 512, "student__fresh__num_layers": 8, "train__max_steps": 2}
    rows = {"train__global_batch_size": 32, "train__per_device_train_batch_size": 32}
    with caplog.at_level(logging.INFO, logger="pst_dist"):
        train(small_config(small_data, tmp_path / "auto", **whole, **rows))
    assert "train.micro_batch_tokens=auto: at most " in caplog.text
    assert torch.cuda.max_memory_allocated(device) < SHARE * torch.cuda.get_device_properties(device).total_memory
    limit = 1.15 * torch.cuda.max_memory_allocated(device) / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    try:
        train(small_config(small_data, tmp_path / "less", **whole, **rows, train__micro_batch_tokens=NO_LIMIT))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert halvings(caplog)
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "auto"), abs=1e-3)
