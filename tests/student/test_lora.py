"""LoRA students of every model family: what is trained and what is not, their gradients, files and exports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import zoo
from adapted import family

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.publish.adapter import export_adapter
from pst_dist.publish.export import export
from pst_dist.student.generate import decode_answers
from pst_dist.student.saved import load_student
from pst_dist.student.token_rows import row_parameters

pytest.importorskip("peft")
QUESTIONS = ["2 + 3?", "What is 10 + 7?", "Say 140", "9 - 9 in all?", "2?"]


def reference_gradients(one) -> dict[str, torch.Tensor]:
    """Gradients of every weight by plain autograd: no trained rows, no fused head, each matrix a parameter."""
    import torch.nn.functional as F

    model, batch = one.student.model, one.batch
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    made = one.student._run(batch)
    rows = made.logits.flatten(0, 1)[batch.supervised.rows]
    nll = F.cross_entropy(rows.float(), batch.supervised.targets, reduction="none")
    weights = torch.where(batch.is_answer, one.scales[0], one.scales[1])
    (nll * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_only_adapters_and_added_rows_are_trained_and_the_base_keeps_every_bit(name, tmp_path):
    one = family(name, tmp_path)
    ours = [one.tokenizer.convert_tokens_to_ids(token) for token in (STOP_TOKEN, SEMANTIC_TOKEN)]
    rows = row_parameters(one.student.model)
    tied = one.student.model.get_output_embeddings().weight is one.student.model.get_input_embeddings().weight
    assert len(rows) == (1 if tied else 2)
    for _, ids in rows.values():
        assert set(ours) <= set(ids)
    assert all("lora_" in key or key.endswith(".trained_rows") for key in one.trained)
    before, started = one.frozen, one.trained
    losses = one.fit(20, 3e-2)
    assert losses[-1] < 0.95 * losses[0], losses
    after = one.frozen
    paths = {f"model.{path}.weight": ids for path, ids in rows.values()}
    for key, value in before.items():
        kept = torch.ones(len(value), dtype=torch.bool)
        kept[paths.get(key, [])] = False
        assert torch.equal(value[kept], after[key][kept]), key
    moved = [key for key, value in one.trained.items() if not torch.equal(value, started[key])]
    assert any("lora_A" in key for key in moved) and set(rows) <= {key.removeprefix("model.") for key in moved}
    assert all(p.grad is None for p in one.student.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_gradients_are_those_of_the_whole_matrices(name, tmp_path):
    one = family(name, tmp_path)
    one.fit(3)  # so that the adapters' second matrices are not zero
    one.student.eval()
    one.student(one.batch, one.scales).loss.backward()
    found = {key: p.grad.clone() for key, p in one.student.model.named_parameters() if p.grad is not None}
    rows = row_parameters(one.student.model)
    one.student.zero_grad()
    wanted = reference_gradients(one)
    for key, gradient in found.items():
        if key not in rows:
            torch.testing.assert_close(gradient, wanted[key], atol=2e-6, rtol=2e-4, msg=key)
    for key, (path, ids) in rows.items():
        matrix = wanted[f"{path}.weight"] if f"{path}.weight" in wanted else None
        assert matrix is not None, wanted.keys()
        torch.testing.assert_close(found[key], matrix[ids], atol=2e-6, rtol=2e-4, msg=key)


STRANGER = """
import json, sys
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

def ask(tokenizer, model, fmt, questions):
    def one(prompts):
        inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return [tokenizer.decode(row[start:], skip_special_tokens=True) for row in model.generate(**inputs)]
    prompts = [fmt["prompt"].replace("{question}", question) for question in questions]
    return {"single": [one([prompt])[0] for prompt in prompts], "batched": one(prompts)}


def asked(questions, export, adapter):
    family = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(export).is_encoder_decoder else AutoModelForCausalLM
    fmt = json.load(open(export + "/pst.json"))
    merged = ask(AutoTokenizer.from_pretrained(export), family.from_pretrained(export).eval(), fmt, questions)
    settings = json.load(open(adapter + "/adapter_config.json"))
    base = family.from_pretrained(settings["base_model_name_or_path"])
    rows = 1 + max(max(ids) for ids in settings["trainable_token_indices"].values())
    if rows > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(base, adapter).eval()
    model.generation_config = base.generation_config = GenerationConfig.from_pretrained(adapter)
    return {"export": merged, "adapter": ask(AutoTokenizer.from_pretrained(adapter), model, fmt, questions)}

questions, *folders = json.loads(sys.argv[1])
found = [asked(questions, *pair) for pair in folders]
assert "pst_dist" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[list[str], dict]]:
    """Family -> (what the trained student answers, what a stranger gets from both exports)."""
    folders, answers = {}, {}
    for name in zoo.FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        one = family(name, folder)
        one.fit(40, 3e-2)
        one.save()
        assert not list((folder / "best").glob("model*.safetensors")), "the base's weights are not copied"
        settings = {"batch_size": 4, "max_new_tokens": 24}
        trained = decode_answers(one.student.model.eval(), one.tokenizer, one.layout.format, QUESTIONS, **settings)
        saved = load_student(folder / "best", device="cpu")
        loaded = decode_answers(saved.model, saved.tokenizer, saved.format, QUESTIONS, **settings)
        assert [answer.text for answer in loaded] == [answer.text for answer in trained], name
        assert not any("lora" in key or "trained_rows" in key for key in saved.model.state_dict())
        folders[name] = [str(export(one.config)), str(export_adapter(one.config))]
        answers[name] = [answer.answer_text for answer in trained]
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, json.dumps([QUESTIONS, *folders.values()])]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads(made.stdout.splitlines()[-1])
    return {name: (answers[name], there) for name, there in zip(folders, found, strict=True)}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_merged_export_and_the_adapter_answer_as_the_trained_student(exported, name):
    answers, found = exported[name]
    for kind, asked in found.items():
        assert asked["single"] == answers, kind
        assert asked["batched"] == answers, kind


def test_the_students_answer_differently_from_family_to_family_and_question(exported):
    assert len({tuple(answers) for answers, _ in exported.values()}) > 5
    assert any(len(set(answers)) > 2 for answers, _ in exported.values())
