"""How added tokens start in every model family, and that no end is taken before the answer's marker."""

from __future__ import annotations

import pytest
import torch
import zoo
from tiny import ROWS, Tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError
from pst_dist.student.generate import decode_answers
from pst_dist.student.new_tokens import source_id, token_start
from pst_dist.student.pretrained import build_model
from pst_dist.student.tokenizer import build_tokenizer


def config_of(folder, start: str = "auto", arm: str = "pst") -> Config:
    student = {"model_name_or_path": str(folder), "new_token_init": start}
    return Config.model_validate({"arm": arm, "student": student, "layout": {"max_length": 96}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo")
    return {name: zoo.make(name, path / name) for name in zoo.FAMILIES}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_copied_stop_has_its_sources_logit_and_the_semantic_token_is_no_rival(folders, name):
    config = config_of(folders[name], "eos")
    tokenizer = build_tokenizer(config.student, ROWS)
    model = build_model(config, tokenizer).eval()
    stop, semantic = (tokenizer.convert_tokens_to_ids(token) for token in (STOP_TOKEN, SEMANTIC_TOKEN))
    source = tokenizer.eos_token_id
    ids = torch.tensor([tokenizer("How many are 2 and 3?")["input_ids"]])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = model(input_ids=ids, **more).logits[0]
    torch.testing.assert_close(logits[:, stop], logits[:, source])
    assert not torch.equal(logits[:, semantic], logits[:, source])
    inputs = model.get_input_embeddings().weight
    assert torch.equal(inputs[stop], inputs[source])
    tied = model.get_output_embeddings().weight is inputs
    assert torch.equal(inputs[semantic], inputs[source]) is not tied


@pytest.mark.parametrize("name", ["llama3", "t5"])
def test_an_earlier_student_of_ours_keeps_the_rows_that_it_has_trained(folders, name, tmp_path):
    config = config_of(folders[name], "eos")
    tokenizer = build_tokenizer(config.student, ROWS)
    earlier = build_model(config, tokenizer)
    rows = [tokenizer.convert_tokens_to_ids(token) for token in (STOP_TOKEN, SEMANTIC_TOKEN)]
    with torch.no_grad():
        earlier.get_input_embeddings().weight[rows] += 1.0
    earlier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    later = config_of(tmp_path, "eos")
    model = build_model(later, build_tokenizer(later.student, ROWS))
    for ours, theirs in zip(model.parameters(), earlier.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama3", "llama2", "qwen"])
def test_the_mean_leaves_the_model_as_it_was_resized_before(folders, name):
    from transformers import AutoModelForCausalLM

    config = config_of(folders[name], "mean")
    tokenizer = build_tokenizer(config.student, ROWS)
    ours = build_model(config, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    if len(tokenizer) > plain.get_input_embeddings().weight.shape[0]:
        plain.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    known = plain.get_input_embeddings().weight.shape[0] - 64 if name != "qwen" else None
    assert torch.equal(ours.get_input_embeddings().weight[:known], plain.get_input_embeddings().weight[:known])


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_auto_is_a_newline_for_arms_that_answer_first(folders, name):
    tokenizer = build_tokenizer(config_of(folders[name]).student, ROWS)
    start = token_start(config_of(folders[name]), tokenizer)
    assert start == "newline" and "\n" in tokenizer.decode([source_id(tokenizer, start)])
    assert token_start(config_of(folders[name], arm="pre_thinking"), tokenizer) == "eos"
    assert token_start(config_of(folders[name], arm="adaptive"), tokenizer) == "eos"


def test_auto_is_the_end_where_the_tokenizer_has_no_newline(folders):
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    assert token_start(config_of(folders["gpt2"]), words) == "eos"
    with pytest.raises(ConfigError, match="'newline' is not one token"):
        token_start(config_of(folders["gpt2"], "newline"), words)


def test_a_text_that_is_not_one_token_and_a_fresh_student_are_refused(folders):
    config = config_of(folders["gpt2"], "not one token at all")
    tokenizer = build_tokenizer(config.student, ROWS)
    with pytest.raises(ConfigError, match="new_token_init='not one token at all' is not one token"):
        build_model(config, tokenizer)
    assert source_id(tokenizer, "<|endoftext|>") == tokenizer.eos_token_id
    fresh = Config.model_validate({"student": {"new_token_init": "eos"}})
    with pytest.raises(ConfigError, match="needs a pretrained language model"):
        token_start(fresh, None)
    assert token_start(Config(), None) == "mean"


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_no_end_is_taken_before_the_answers_marker(architecture):
    tiny = Tiny("pre_thinking", architecture).fit()
    ends = torch.tensor([tiny.layout.stop_id, tiny.tokenizer.eos_token_id])
    head = tiny.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, ends, 1e4))
    ask = (tiny.model, tiny.tokenizer, tiny.format, [row.question for row in ROWS])
    boosted = decode_answers(*ask, batch_size=3, max_new_tokens=40)
    given = decode_answers(*ask, batch_size=3, max_new_tokens=40, given=[row.rationales[0] for row in ROWS])
    hook.remove()
    for answer, row in zip(boosted, ROWS, strict=True):
        assert answer.text == f" {row.rationales[0]} -->", "the rationale is whole, and the boosted end follows it"
        assert answer.token_ids[-1] in ends and answer.probability < 1e-6
    assert [len(answer.token_ids) for answer in given] == [1] * len(ROWS), "a given rationale has its marker already"


@pytest.mark.parametrize("start", ["mean", "eos", "newline"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_only_our_tokens_rows_differ_from_the_model_and_they_are_what_the_setting_says(folders, name, start, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    family = AutoModelForSeq2SeqLM if name in ("t5", "bart") else AutoModelForCausalLM
    plain = family.from_pretrained(folders[name], dtype=torch.float32)
    if name == "bart":  # its output bias is zero until it is trained
        plain.final_logits_bias.copy_(torch.arange(plain.final_logits_bias.numel()) / 7)
    zoo.make(name, tmp_path)
    plain.save_pretrained(tmp_path)
    config = config_of(tmp_path, start)
    tokenizer = build_tokenizer(config.student, ROWS)
    before = plain.get_input_embeddings().weight.shape[0]
    known = min(before, len(tokenizer) - 2)  # some tokenizers have a token without a row of the model
    model = build_model(config, tokenizer)
    stop, semantic = (tokenizer.convert_tokens_to_ids(token) for token in (STOP_TOKEN, SEMANTIC_TOKEN))
    ours, theirs = model.state_dict(), plain.state_dict()
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    old_inputs, old_outputs = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    for key, value in theirs.items():
        if value.shape == ours[key].shape and value.shape[0] != before:
            assert torch.equal(ours[key], value), f"{key} is as it was"
    assert torch.equal(inputs[:known], old_inputs[:known]) and torch.equal(outputs[:known], old_outputs[:known])
    assert (inputs is outputs) is (old_inputs is old_outputs), "tied as before"
    if start == "mean":
        if before < len(tokenizer):  # a model's spare rows stay as they are
            torch.testing.assert_close(inputs[stop], old_inputs.mean(0), atol=1e-3, rtol=0)
        return
    source = source_id(tokenizer, start)
    assert source == (tokenizer.eos_token_id if start == "eos" else source) and source < known
    assert torch.equal(inputs[stop], old_inputs[source]) and torch.equal(outputs[stop], old_outputs[source])
    if inputs is not outputs:
        assert torch.equal(inputs[semantic], old_inputs[source])
    assert not torch.equal(outputs[semantic], old_outputs[source])
    if name == "bart":
        assert model.final_logits_bias[0, stop] == plain.final_logits_bias[0, source]
