"""LoRA students of every model family: what is trained and what is not, their gradients, files and exports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import zoo
from adapted import adapted, family, lora_config

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.loading import load_config
from pst_dist.diagnostics.cost import Machines, make_plan
from pst_dist.diagnostics.cost_page import plan_lines
from pst_dist.errors import ConfigError, EnvironmentFault, InputError
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
    found = {key.removeprefix("model."): gradient for key, gradient in one.gradients().items()}
    rows = row_parameters(one.student.model)
    wanted = reference_gradients(one)
    for key, gradient in found.items():
        if key not in rows:
            torch.testing.assert_close(gradient, wanted[key], atol=2e-6, rtol=2e-4, msg=key)
    for key, (path, ids) in rows.items():
        assert torch.equal(one.student.model.get_submodule(path).weight[ids], one.trained[f"model.{key}"])
        matrix = wanted[f"{path}.weight"] if f"{path}.weight" in wanted else None
        assert matrix is not None, wanted.keys()
        torch.testing.assert_close(found[key], matrix[ids], atol=2e-6, rtol=2e-4, msg=key)


@pytest.mark.parametrize("name", ["llama3", "llama2", "t5", "bart"])
def test_the_semantic_term_reaches_adapters_rows_and_head_whether_the_head_is_fused_or_not(name, tmp_path):
    one = family(name, tmp_path, "pst")
    one.fit(3)
    fused = one.gradients()
    assert one.student._fusible
    one.student._fusible = False
    plain = one.gradients()
    assert fused.keys() == plain.keys() == one.trained.keys() and "head.weight" in fused
    for key, gradient in fused.items():
        torch.testing.assert_close(gradient, plain[key], atol=2e-6, rtol=2e-4, msg=key)
    semantic = one.tokenizer.convert_tokens_to_ids(SEMANTIC_TOKEN)
    rows = {name: ids.index(semantic) for name, (_, ids) in row_parameters(one.student.model).items()}
    inputs = min(rows, key=lambda key: "lm_head" in key)
    assert fused[f"model.{inputs}"][rows[inputs]].abs().max() > 1e-6, "the semantic token's own embedding learns"


def test_an_adapter_on_the_head_trains_with_the_rows_in_it(tmp_path):
    one = family("llama2", tmp_path, target_modules=["q_proj", "lm_head"])
    one.fit(10, 3e-2)
    found, rows = one.gradients(), row_parameters(one.student.model)
    one.save()
    wanted = reference_gradients(one)
    for key, gradient in found.items():
        name = key.removeprefix("model.")
        if name in rows:
            path = name.rpartition(".")[0]
            torch.testing.assert_close(gradient, wanted[f"{path}.weight"][rows[name][1]], atol=2e-6, rtol=2e-4, msg=key)
        else:
            torch.testing.assert_close(gradient, wanted[name], atol=2e-6, rtol=2e-4, msg=key)
    saved, ids = load_student(tmp_path / "best", device="cpu"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        mine = one.student.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(saved.model(input_ids=ids).logits, mine, atol=2e-5, rtol=1e-4)
    with pytest.raises(InputError, match="an adapter and trained rows"):
        export_adapter(one.config)


@pytest.mark.parametrize(
    ("lora", "scale"), [({}, 2.0), ({"alpha": 6}, 1.5), ({"alpha": 6, "rslora": True}, 3.0), ({"dropout": 0.5}, 2.0)]
)
def test_the_adapters_have_the_factor_and_the_dropout_of_the_config(lora, scale, tmp_path):
    one = family("llama2", tmp_path, **lora)
    layer = one.student.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scale
    assert getattr(layer.lora_dropout["default"], "p", 0.0) == lora.get("dropout", 0.0)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "t5"])
def test_frozen_matrices_in_bfloat16_train_as_in_float32(name, tmp_path):
    plain = family(name, tmp_path / "plain")
    half = adapted(lora_config(tmp_path / "half", tmp_path / "plain" / "base", frozen_dtype="bfloat16"))
    kinds = {p.dtype for p in half.student.parameters() if not p.requires_grad and p.dim() >= 2}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in half.student.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)  # of the dropout
        one = plain.fit(8)
        torch.manual_seed(1)
        two = half.fit(8)
    assert two == pytest.approx(one, rel=0.02) and two != one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.lora.alpha=8"], "student.lora has no effect"),
        (["student.lora.rank=4"], "needs a pretrained language model"),
        (["student.lora.rank=4", "+minilm"], "needs a pretrained language model"),
        (["student.lora.rank=4", "+smollm2", "student.lora.frozen_dtype=bfloat16"], "needs train.bf16=true"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config("svamp", words)


def test_4_bit_bases_are_refused_by_name_where_they_cannot_be_loaded(tmp_path):
    with pytest.raises(
        EnvironmentFault, match=r"student\.lora\.quantize=nf4 needs (the package bitsandbytes|an NVIDIA)"
    ):
        family("llama2", tmp_path, quantize="nf4")


@pytest.mark.gpu
def test_a_4_bit_base_trains_and_is_merged_in_full_precision(tmp_path):
    pytest.importorskip("bitsandbytes")
    one = family("llama2", tmp_path, quantize="nf4")
    kinds = {type(module).__name__ for module in one.student.model.modules()}
    assert "Linear4bit" in kinds
    one.student.to("cuda")
    one.batch, one.scales = one.batch.to(torch.device("cuda")), one.scales.cuda()
    losses = one.fit(20, 3e-2)
    assert losses[-1] < 0.95 * losses[0]
    one.save()
    saved = load_student(tmp_path / "best")
    assert {p.dtype for p in saved.model.parameters()} == {torch.float32}


def test_the_plan_counts_what_is_trained(tmp_path):
    base = zoo.make("llama2", tmp_path / "base")
    words = ["data.train=gen:last_letters?rows=64&seed=0", "data.validation_size=0", "layout.max_length=96"]
    words += ["arm=post_thinking", f"student.model_name_or_path={base}"]
    one = adapted(lora_config(tmp_path, base))
    plain, plan = (make_plan(load_config(None, [*words, *more]), Machines()) for more in ([], ["student.lora.rank=4"]))
    trained = sum(p.numel() for p in one.trained.values())
    assert plan.trained == trained and plain.trained == plain.parameters
    assert plan.parameters == plain.parameters + trained
    assert plan.checkpoint_bytes == 12 * trained
    assert plan.memory.gradients == 4 * trained and plan.memory.optimizer == 8 * trained
    assert plan.memory.weights == 4 * plan.parameters
    assert f"({trained:,} of them trained)" in plan_lines(plan)[0]


def test_the_cards_name_the_adapter_and_its_code_runs(tmp_path):
    one = family("llama2", tmp_path)
    one.fit(20, 3e-2)
    one.save()
    merged = (export(one.config) / "README.md").read_text()
    assert "LoRA adapters of rank 4 (alpha 8) on `all-linear`" in merged and "merged into the base's weights" in merged
    assert "library_name: transformers" in merged and "- lora" in merged
    folder = export_adapter(one.config)
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "merged into" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/to/this/folder", str(folder)).replace("path/to/the/base/model", str(tmp_path / "base"))
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace("…", QUESTIONS[0])], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-1500:]
    saved = load_student(folder, device="cpu")
    (answer,) = decode_answers(
        saved.model, saved.tokenizer, saved.format, QUESTIONS[:1], batch_size=1, max_new_tokens=24
    )
    assert made.stdout.strip() == answer.answer_text.strip()


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
