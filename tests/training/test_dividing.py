"""Students built for ZeRO-3 on two real ranks: no rank holds the model, and every weight is that of a whole build."""

import json

import pytest
import torch
import zoo
from divided import launch
from tiny_gguf import write_gguf

from pst_dist.config.schema import Config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
FRESH = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
STUDENTS = {
    "gpt2": {"fresh": FRESH},
    "gpt2-untied": {"fresh": FRESH | {"tie_word_embeddings": False}},
    "gpt2-bf16": {"fresh": FRESH},
    "llama": {"fresh": FRESH | {"architecture": "llama"}},
    "t5": {"fresh": FRESH | {"architecture": "t5"}},
    "folder-llama3": {},
    "folder-llama2": {},
    "folder-gpt2": {},
    "folder-t5": {},
    "folder-bart": {},
    "folder-llama2-bf16": {},
    "folder-llama3-lora": {"lora": {"rank": 3}},
    "folder-gpt2-lora-bf16": {"lora": {"rank": 3, "frozen_dtype": "bfloat16"}},
    "gguf": {},
    "gguf-lora": {"lora": {"rank": 3}},
    "warm": {"model_name_or_path": "minilm", "warm_start": "encoder_decoder"},
}


def case(student: dict, **train) -> dict:
    """The config of a divided student."""
    raw = {"student": student, "layout": {"max_length": 96}, "train": {"deepspeed": "zero3", "bf16": False} | train}
    return Config.model_validate(raw).model_dump(mode="json")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("divided")
    cases = {}
    for name, student in STUDENTS.items():
        kind, _, rest = name.partition("-")
        if kind == "folder":
            family = rest.partition("-")[0]
            if not (folder / family).is_dir():
                zoo.make(family, folder / family)
            student = student | {"model_name_or_path": str(folder / family)}
        if kind == "gguf":
            base = zoo.make("llama3", folder / "of-gguf") if not (folder / "of-gguf").is_dir() else folder / "of-gguf"
            model = LlamaForCausalLM.from_pretrained(base)
            student = student | {
                "model_name_or_path": str(write_gguf(model, base / "tokenizer.json", folder / "tiny.gguf"))
            }
        cases[name] = case(student, bf16=name.endswith("bf16"))
    # 85 million weights, 340 MB: eight layers of 40 MB and embeddings of 16 MB.
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12}
    base = zoo.make("llama2", folder / "large")
    words = LlamaForCausalLM.from_pretrained(base).config.vocab_size
    torch.manual_seed(0)
    large = LlamaConfig(vocab_size=words, intermediate_size=2048, max_position_embeddings=128, **shape)
    LlamaForCausalLM(large).save_pretrained(base)
    cases["large-folder"] = case({"model_name_or_path": str(base)})
    fresh = {"architecture": "llama", "hidden_size": 768, "num_layers": 9, "num_heads": 12}
    cases["large-fresh"] = case({"fresh": fresh})
    launch(cases, folder)
    return folder


@pytest.mark.parametrize("name", STUDENTS)
def test_a_divided_student_has_the_weights_of_a_whole_one(built, name):
    found = json.loads((built / f"{name}.json").read_text())
    assert len(found) > 5
    wrong = {key: value for key, value in found.items() if value != 0}
    assert not wrong


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["large-folder", "large-fresh"])
def test_no_rank_ever_holds_the_whole_model(built, name, rank):
    found = json.loads((built / f"{name}-{rank}.json").read_text())
    assert found["model"] > 300e6
    # Half of the weights is this rank's share; the rest is one layer on its way and what the allocator keeps.
    assert found["building"] < 0.75 * found["model"]
    assert found["collecting"] < 0.25 * found["model"], "collected weights go through a file"
