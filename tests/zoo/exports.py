"""The matrix of families: a student of each is trained for a moment, exported, and asked by a program without pst_dist.

The students learn four rows in a few optimizer steps, so that answers have different lengths and stop by themselves.
The program loads every export in one fresh process, with this interpreter's transformers or another's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from exported import exported
from tiny import ROWS

from pst_dist.config.schema import Config

from .families import CAUSAL, FAMILIES, make

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
    return {"single": single, "batched": batched, "chat": chat, "eos": eos, "side": side, "inputs": list(inputs)}

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
            "student": {"model_name_or_path": str(make(name, path / "base"))},
            "evaluate": {"max_new_tokens": NEW_TOKENS},
        }
    )
    folder, answers, _ = exported(config, ROWS, QUESTIONS)
    return folder, answers


@dataclass(frozen=True)
class Told:
    """What a stranger got from one export, beside what we scored."""

    folder: Path
    scored: list[str]
    """The answers that evaluation decodes, one a question."""
    single: list[str]
    batched: list[str]
    chat: list[bool]
    """Whether the chat template gives the trained prompt; empty without a template."""
    eos: list[int]
    side: str | None
    """padding_side in tokenizer_config.json."""
    inputs: list[str]
    """Names of what the tokenizer returns."""

    def faults(self, name: str) -> dict[str, int]:
        """How often each claim of the model card fails."""
        return {
            "single": sum(a != b for a, b in zip(self.single, self.scored, strict=True)),
            "batched": sum(a != b for a, b in zip(self.batched, self.scored, strict=True)),
            "chat": sum(not same for same in self.chat) if self.chat else len(QUESTIONS),
            "padding": int(self.side != ("left" if name in CAUSAL else "right")),
            "inputs": int(self.inputs != ["input_ids", "attention_mask"]),
        }


def matrix(path: Path, names: tuple[str, ...] = tuple(FAMILIES), *, python: str = sys.executable) -> dict[str, Told]:
    """Train and export each family below `path`, and have the exports asked by `python`, a path of an interpreter.

    Raises RuntimeError, with the end of its output, when that program fails.
    """
    made = {name: trained(name, path / name) for name in names}
    folders = [str(folder) for folder, _ in made.values()]
    done = subprocess.run(
        [python, "-I", "-c", STRANGER, json.dumps(QUESTIONS), *folders],
        cwd=path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: Told(folder, scored, **answers[str(folder)]) for name, (folder, scored) in made.items()}
