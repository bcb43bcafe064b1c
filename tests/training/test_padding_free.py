"""Rows concatenated instead of padded: same loss and gradient, for every family that keeps rows apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from ranks import launch, stop_at
from run_files import curve, losses
from small_run import small_config
from tiny import ROWS, Tiny, TinyTeacher

from pst_dist.arms import ARMS
from pst_dist.config.schema import Config, LossConfig
from pst_dist.errors import ConfigError
from pst_dist.student.layout import layout_for
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.batching.passes import ByLength, cut_by_length
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import Student, build_student
from pst_dist.training.trainer import train


def of_family(
    name: str, folder: Path, arm: str, attention: str = "sdpa"
) -> tuple[Config, Student, Collator, Collator, list]:
    """A student of a family, the collators that pad and that concatenate, and the sequences of ROWS."""
    attention = ATTENTION.get(name, attention)
    base = {"model_name_or_path": str(zoo.make(name, folder / "base")), "attn_implementation": attention}
    config = Config.model_validate({"arm": arm, "student": base, "layout": {"max_length": 96}})
    tokenizer = build_tokenizer(config.student, ROWS)
    torch.manual_seed(0)
    teacher = TinyTeacher() if ARMS[arm].aligned else None
    student = build_student(config, tokenizer, teacher.dimension if teacher else None).eval()
    layout = layout_for(config, tokenizer, is_encoder_decoder=False)
    common = {"loss": config.loss, "pad_id": tokenizer.pad_token_id, "teacher": teacher}
    sequences = [sequence for row in ROWS for sequence in layout.sequences(row)]
    return config, student, Collator(**common), Collator(**common, padding_free=True), sequences


def gradient(student: Student, batch: PSTBatch, config: Config) -> tuple[list[float], torch.Tensor]:
    student.zero_grad()
    output = student(batch, TermWeights.of(config.loss, config.arm).scales(batch.counts).float())
    output.loss.backward()
    grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return output.sums.tolist(), torch.cat(grads)


ATTENTION = {"gemma": "eager"}
"""Gemma 2 caps attention scores, which torch's fused attention cannot do."""
APART = ["gpt2", "llama3", "llama2", "mistral", "qwen", "gemma", "neox"]


@pytest.mark.parametrize("arm", ["pst", "pre_thinking"])
@pytest.mark.parametrize("name", APART)
def test_loss_and_gradient_are_those_of_padded_rows(name, arm, tmp_path):
    config, student, padded, concatenated, sequences = of_family(name, tmp_path, arm)
    one, other = padded(sequences), concatenated(sequences)
    assert one.positions[1] > 0 and other.positions.tolist() == [one.tokens, 0]
    assert other.lengths == one.lengths and other.counts.tolist() == one.counts.tolist()
    sums, wanted = gradient(student, one, config)
    found, grads = gradient(student, other, config)
    assert found == pytest.approx(sums, rel=1e-4)
    torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-5)


def test_a_family_whose_rows_would_read_one_another_is_refused(tmp_path):
    """OPT makes its own mask of ones where it is given none, so positions do not keep its rows apart."""
    config, student, _, concatenated, sequences = of_family("opt", tmp_path, "pst")
    with pytest.raises(ConfigError, match="OPTForCausalLM does not keep concatenated rows apart"):
        gradient(student, concatenated(sequences), config)


def test_every_family_is_judged_by_what_it_computes(tmp_path):
    assert {*APART, "opt", "t5", "bart"} == {*zoo.FAMILIES}


@pytest.mark.parametrize("arm", ["prefix", "adaptive", "answer_only"])
@pytest.mark.parametrize("pooling", ["token", "span"])
def test_all_arms_and_spans_find_their_hidden_states(arm, pooling):
    tiny = Tiny(arm, "llama", loss={"pooling": pooling})
    common = {
        "loss": tiny.config.loss,
        "pad_id": tiny.tokenizer.pad_token_id,
        "teacher": TinyTeacher() if ARMS[arm].aligned else None,
    }
    sequences = [sequence for row in ROWS for sequence in tiny.layout.sequences(row)]
    sums, wanted = gradient(tiny.student, Collator(**common)(sequences), tiny.config)
    found, grads = gradient(tiny.student, Collator(**common, padding_free=True)(sequences), tiny.config)
    assert found == pytest.approx(sums, rel=1e-4)
    torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-5)


def test_a_pass_without_samples_has_no_tokens_and_no_loss():
    tiny = Tiny("pst", "llama")
    collate = Collator(loss=LossConfig(), pad_id=0, teacher=TinyTeacher(), padding_free=True)
    batch = collate(tiny.layout.sequences(ROWS[0]), muted=True)
    assert batch.tokens == 0 and batch.lengths == [] and batch.counts.tolist() == [0, 0, 0]
    assert tiny.student(batch, torch.ones(3)).sums.tolist() == [0, 0, 0]


def test_a_pass_is_as_long_as_its_rows_together():
    lengths = np.array([[0, 3], [0, 9], [0, 2], [0, 3]])
    # 9 3 3 2 together are 17 tokens, and 36 when padded.
    free, padded = ByLength(17, None, padding_free=True), ByLength(17, None)
    assert cut_by_length(lengths, free, world_size=1, rows=8) == [[[1, 0, 3, 2]]]
    assert cut_by_length(lengths, padded, world_size=1, rows=8) == [[[1]], [[0, 3, 2]]]
    # With a limit of 8, the 9 goes alone; 3 3 2 fit only when they are not padded to 9.
    free, padded = ByLength(8, None, padding_free=True), ByLength(8, None)
    assert cut_by_length(lengths, free, world_size=1, rows=8) == [[[1]], [[0, 3, 2]]]
    assert cut_by_length(lengths, padded, world_size=1, rows=8) == [[[1]], [[0, 3]], [[2]]]


def test_a_run_learns_the_same_and_may_change_it_when_it_resumes(small_data, tmp_path):
    common = {"train__save_steps": 4, "train__micro_batch_tokens": 200}
    train(small_config(small_data, tmp_path / "padded", **common))
    train(small_config(small_data, tmp_path / "free", **common, train__padding_free="true"))
    assert losses(tmp_path / "free") == pytest.approx(losses(tmp_path / "padded"), rel=1e-4)
    assert {row["padding"] for row in curve(tmp_path / "free")} == {0}
    assert max(row["padding"] for row in curve(tmp_path / "padded")) > 0
    stop_at(tmp_path / "padded", 4, tmp_path / "resumed")
    assert train(small_config(small_data, tmp_path / "resumed", **common, train__padding_free="true")).steps == 8
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-4)


def test_two_ranks_that_divide_the_weights_learn_the_same(small_data, tmp_path):
    train(small_config(small_data, tmp_path / "single"))
    stages = {stage: {"train__deepspeed": stage, "train__padding_free": "true"} for stage in ("zero2", "zero3")}
    launch([small_config(small_data, tmp_path / stage, **keys) for stage, keys in stages.items()], tmp_path)
    for stage in stages:
        assert losses(tmp_path / stage) == pytest.approx(losses(tmp_path / "single"), abs=1e-3), stage


def test_an_encoder_decoder_is_refused(small_data, tmp_path):
    keys = {"student__fresh__architecture": "t5", "train__padding_free": "true"}
    with pytest.raises(ConfigError, match="padding_free is for causal students, and this is an encoder-decoder"):
        train(small_config(small_data, tmp_path / "run", **keys))


@pytest.mark.gpu
def test_flash_attention_of_variable_length_computes_the_same(tmp_path):
    pytest.importorskip("flash_attn")
    found = {}
    for attention in ("sdpa", "flash_attention_2"):
        config, student, padded, concatenated, sequences = of_family("llama3", tmp_path / attention, "pst", attention)
        student = student.to("cuda", torch.bfloat16)
        collate = padded if attention == "sdpa" else concatenated
        found[attention], _ = gradient(student, collate(sequences).to(torch.device("cuda")), config)
    assert found["flash_attention_2"] == pytest.approx(found["sdpa"], rel=0.02)
