"""PEFT folders as models: found with their base, merged as peft merges them, and refused when they do not fit."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from adapted import adapted, family, lora_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pst_dist.arms import STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, InputError, StaleError
from pst_dist.models.identity import base_identity
from pst_dist.models.load import load_language_model, load_tokenizer
from pst_dist.models.locate import locate_model
from pst_dist.publish.adapter import export_adapter
from pst_dist.student.pretrained import base_of, build_model
from pst_dist.student.saved import load_student
from pst_dist.student.tokenizer import build_tokenizer

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def foreign(base: Path, folder: Path, *, rows: int = 0, **settings) -> torch.Tensor:
    """A folder that peft has written by itself, with random weights; its logits, unmerged, as peft computes them."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, **{"target_modules": "all-linear", **settings}))
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.05 if "magnitude" not in name else 1.0)
    made = logits(model)
    model.save_pretrained(folder)
    return made


CASES = {
    "all-linear": {},
    "attention alone": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "grown embeddings": {"rows": 500},
    "trained tokens": {"trainable_token_indices": [3, 9]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_is_merged_as_peft_computes_it(case, tmp_path):
    base = zoo.make("llama2", tmp_path / "base")
    wanted = foreign(base, tmp_path / "adapter", **CASES[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of libraries among themselves; a user can do nothing about it
        model = load_language_model(locate_model(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base))[..., :400], wanted[..., :400])
    assert type(model).__name__ == "LlamaForCausalLM" and not any("lora" in key for key in model.state_dict())
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(model))


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_a_student_starts_from_an_adapter_of_ours_and_may_be_one_again(name, tmp_path):
    one = family(name, tmp_path / "one")
    one.fit(30, 3e-2)
    one.save()
    folder = export_adapter(one.config)
    two = adapted(lora_config(tmp_path / "two", folder))
    student = load_student(tmp_path / "one" / "best", device="cpu")
    # A new training starts the stop token anew.
    stop = two.tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    found, wanted = logits(two.student.model), logits(student.model)
    found[..., stop] = wanted[..., stop]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert len(two.tokenizer) == len(one.tokenizer), "our tokens are not added twice"
    two.fit(10, 3e-2)
    two.save()
    again = load_student(tmp_path / "two" / "best", device="cpu")
    torch.testing.assert_close(logits(again.model), logits(two.student.model), atol=2e-5, rtol=1e-4)
    with pytest.raises(InputError, match="its base is an adapter too"):
        export_adapter(two.config)
    whole = Config.model_validate({"student": {"model_name_or_path": str(folder)}, "layout": {"max_length": 96}})
    plain = build_model(whole, build_tokenizer(whole.student, ()))
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_the_identity_of_a_base_covers_its_adapter(tmp_path):
    base = zoo.make("llama2", tmp_path / "base")
    foreign(base, tmp_path / "adapter")
    place = locate_model(str(tmp_path / "adapter"))
    first = base_identity(place)
    assert first["sha256"] != base_identity(locate_model(str(base)))["sha256"]
    values = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({key: value * 2 for key, value in values.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    base_identity.cache_clear()
    assert base_identity(place)["sha256"] != first["sha256"]


def test_a_student_is_refused_when_its_base_has_changed_or_gone(tmp_path):
    one = family("llama2", tmp_path)
    one.save()
    weights = tmp_path / "base" / "model.safetensors"
    values = load_file(weights)
    save_file({key: value * 2 for key, value in values.items()}, weights, metadata={"format": "pt"})
    base_identity.cache_clear()
    with pytest.raises(StaleError, match="trained on other weights"):
        load_student(tmp_path / "best")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match=r"whose base model .* does not exist"):
        load_student(tmp_path / "best")


def without_a_key(folder: Path) -> None:
    values = load_file(folder / "adapter_model.safetensors")
    values.pop(sorted(values)[0])
    save_file(values, folder / "adapter_model.safetensors")


def with_another_key(folder: Path) -> None:
    values = load_file(folder / "adapter_model.safetensors")
    values["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 32)
    save_file(values, folder / "adapter_model.safetensors")


def with_another_shape(folder: Path) -> None:
    values = load_file(folder / "adapter_model.safetensors")
    key = sorted(values)[0]
    values[key] = torch.zeros(3, 5)
    save_file(values, folder / "adapter_model.safetensors")


def pickled(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def setting(**changes):
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_a_model(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


BAD = {
    "a missing weight": (without_a_key, "1 weights are missing from it"),
    "an unknown weight": (with_another_key, "1 weights fit nothing in its base model"),
    "a wrong shape": (with_another_shape, "shape"),
    "a pickle": (pickled, "is a pickle, which could run code"),
    "another kind": (setting(peft_type="IA3"), "of type 'IA3', which cannot be merged"),
    "no base": (setting(base_model_name_or_path=None), "names no base model"),
    "a base that is gone": (setting(base_model_name_or_path="/no/such/model"), "/no/such/model does not exist"),
    "a base on the hub": (setting(base_model_name_or_path="no-such/model"), "not in the cache"),
    "both": (with_a_model, "a whole model and an adapter"),
    "damaged settings": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_is_not_a_whole_adapter_is_refused_in_one_line(case, tmp_path):
    base = zoo.make("llama2", tmp_path / "base")
    foreign(base, tmp_path / "adapter")
    spoil, words = BAD[case]
    spoil(tmp_path / "adapter")
    from pst_dist.errors import PstError

    with pytest.raises(PstError, match=words) as caught:
        load_language_model(locate_model(str(tmp_path / "adapter")))
    assert "\n" not in str(caught.value)


def test_the_base_of_an_adapter_is_not_itself(tmp_path):
    base = zoo.make("llama2", tmp_path / "base")
    foreign(base, tmp_path / "adapter")
    setting(base_model_name_or_path=str(tmp_path / "adapter"))(tmp_path / "adapter")
    with pytest.raises(InputError, match="leads back to itself"):
        locate_model(str(tmp_path / "adapter"))


def test_the_tokenizer_is_the_adapters_own_where_it_has_one(tmp_path):
    base = zoo.make("llama2", tmp_path / "base")
    foreign(base, tmp_path / "adapter")
    place = locate_model(str(tmp_path / "adapter"))
    tokenizer = load_tokenizer(place)
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert len(load_tokenizer(place)) == len(load_tokenizer(locate_model(str(base)))) + 1


@pytest.mark.parametrize(
    ("family_name", "lora", "words"),
    [
        ("llama2", {"target_modules": ["q_prj"]}, "q_prj"),
        ("llama3", {"target_modules": ["lm_head"]}, "also the language-model head"),
        ("llama3", {"target_modules": ["embed_tokens"]}, "includes the embeddings"),
    ],
)
def test_wrong_target_modules_are_refused(family_name, lora, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        family(family_name, tmp_path, **lora)


def test_the_base_of_a_run_with_an_adapter_is_recorded(tmp_path):
    base = zoo.make("llama2", tmp_path / "base")
    foreign(base, tmp_path / "adapter")
    settings = Config.model_validate({"student": {"model_name_or_path": str(tmp_path / "adapter")}}).student
    assert len(base_of(settings)["sha256"]) == 64


def test_a_base_from_a_gguf_file_is_named_and_merged(tmp_path):
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    folder = zoo.make("llama3", tmp_path / "zoo")
    file = write_gguf(AutoModelForCausalLM.from_pretrained(folder), folder / "tokenizer.json", tmp_path / "base.gguf")
    one = adapted(lora_config(tmp_path / "run", file))
    one.fit(10, 3e-2)
    one.save()
    saved, ids = load_student(tmp_path / "run" / "best", device="cpu"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        mine = one.student.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(saved.model(input_ids=ids).logits, mine, atol=2e-5, rtol=1e-4)
