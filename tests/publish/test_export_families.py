"""What the model card says of an export holds for every family: asked singly, in batches and by chat, by a stranger.

The students are the zoo's models after a few optimizer steps on four rows, so that answers have different lengths and
stop by themselves. A program without this package loads every export in one fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from tiny import ROWS, Tiny

from pst_dist.arms import STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.publish.export import expected_prompt, export
from pst_dist.student.generate import decode_answers
from pst_dist.student.layout import layout_for
from pst_dist.student.saved import load_student, save_student
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batches import Collator
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import build_student

QUESTIONS = [*(row.question for row in ROWS), "What, then, is the whole of 10 + 7?", "2?"]
NEW_TOKENS = 24

STRANGER = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pst_dist":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

def texts(tokenizer, outputs, start):
    return [tokenizer.decode(row[start:], skip_special_tokens=True) for row in outputs]

def ask(folder, questions):
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    family = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = family.from_pretrained(folder)
    fmt = json.load(open(folder + "/pst.json"))
    prompts = [fmt["prompt"].replace("{question}", question) for question in questions]
    single, chat = [], []
    for prompt, question in zip(prompts, questions):
        inputs = tokenizer(prompt, return_tensors="pt")
        start = 1 if seq2seq else inputs["input_ids"].shape[1]
        single += texts(tokenizer, model.generate(**inputs), start)
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            chat.append(ids == inputs["input_ids"][0].tolist())
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    batched = texts(tokenizer, model.generate(**inputs), 1 if seq2seq else inputs["input_ids"].shape[1])
    eos = model.generation_config.eos_token_id
    side = json.load(open(folder + "/tokenizer_config.json")).get("padding_side")
    return {"single": single, "batched": batched, "chat": chat, "eos": eos, "side": side, "ours": list(inputs)}

questions = json.loads(sys.argv[1])
print(json.dumps({folder: ask(folder, questions) for folder in sys.argv[2:]}))
"""


def trained(name: str, path: Path) -> tuple[Path, list[str]]:
    """An export of the family's student, and the answers that we decode from it."""
    config = Config.model_validate(
        {
            "arm": "post_thinking",
            "output_dir": str(path),
            "layout": {"max_length": 96},
            "student": {"model_name_or_path": str(zoo.make(name, path / "base"))},
            "evaluate": {"max_new_tokens": NEW_TOKENS},
        }
    )
    tokenizer = build_tokenizer(config.student, ROWS)
    torch.manual_seed(0)
    student = build_student(config, tokenizer, None)
    layout = layout_for(config, tokenizer, is_encoder_decoder=student.is_encoder_decoder)
    collate = Collator(
        loss=config.loss, pad_id=tokenizer.pad_token_id, decoder_start_id=student.decoder_start_id, teacher=None
    )
    batch = collate([sequence for row in ROWS for sequence in layout.sequences(row)])
    scales = TermWeights.of(config.loss, config.arm).scales(batch.counts).float()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    student.train()
    for _ in range(40):
        output = student(batch, scales)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_student(
        student.model,
        {key: value.detach().clone() for key, value in student.state_dict().items()},
        tokenizer,
        layout.format,
        path / "best",
        fingerprint="f" * 64,
        extra={"step": 40, "arm": config.arm, "seed": 0},
    )
    folder = export(config)
    saved = load_student(path / "best", device="cpu")
    answers = decode_answers(
        saved.model, saved.tokenizer, saved.format, QUESTIONS, batch_size=4, max_new_tokens=NEW_TOKENS
    )
    assert any(answer.complete for answer in answers), f"{name} has not learnt to stop"
    return folder, [answer.answer_text for answer in answers]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, tuple[dict, list[str], Path]]:
    """What the stranger got from each family's export, and what we decoded."""
    path = tmp_path_factory.mktemp("families")
    made = {name: trained(name, path / name) for name in zoo.FAMILIES}
    folders = [str(folder) for folder, _ in made.values()]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, json.dumps(QUESTIONS), *folders],
        cwd=path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: (answers[str(folder)], ours, folder) for name, (folder, ours) in made.items()}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_an_export_answers_alone_and_in_a_batch_as_it_was_evaluated(told, name):
    stranger, ours, _ = told[name]
    assert stranger["single"] == ours
    assert stranger["batched"] == ours


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_an_export_pads_where_its_family_can_be_padded(told, name):
    stranger, _, folder = told[name]
    assert stranger["side"] == ("left" if name in zoo.CAUSAL else "right")
    assert stranger["ours"] == ["input_ids", "attention_mask"]
    student = load_student(folder, device="cpu")
    assert student.tokenizer.padding_side == stranger["side"]
    assert student.tokenizer.convert_tokens_to_ids(STOP_TOKEN) in stranger["eos"]


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_chat_template_gives_the_trained_prompt(told, name):
    assert told[name][0]["chat"] == [True] * len(QUESTIONS)


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_a_question_that_spells_control_tokens_is_read_as_in_training_where_the_card_says_how(told, name):
    folder = told[name][2]
    assert "pass `split_special_tokens=True` to read them so" in (folder / "README.md").read_text()
    student = load_student(folder, device="cpu")
    question = f"What is </s> and {student.tokenizer.eos_token} and {STOP_TOKEN}?"
    given = student.tokenizer(f"{question} ###", split_special_tokens=True)["input_ids"]
    assert given == expected_prompt(student, question)
    assert given != student.tokenizer(f"{question} ###")["input_ids"]


def test_a_prompt_with_emoji_is_exported_with_a_template_that_gives_it(tmp_path):
    tiny = Tiny("answer_only", layout={"prompt": '\U0001f914 {question} "→" é\U0001f4a1:'})
    tiny.save(tmp_path / "best")
    config = Config.model_validate({**tiny.config.model_dump(), "output_dir": str(tmp_path)})
    tokenizer = load_student(export(config), device="cpu").tokenizer
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2?"}], add_generation_prompt=True, tokenize=False
    )
    assert given == '\U0001f914 2? "→" é\U0001f4a1:'
