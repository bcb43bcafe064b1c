"""A student trained on its own chat template is asked by a stranger exactly as in training, turns and system text too.

The students are the zoo's models with chat templates like those of the public families, after a few optimizer steps. A
program without this package loads every export in one fresh process and puts conversations to it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import chats
import pytest
import zoo
from exported import exported
from tiny import ROWS

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample

NEW_TOKENS = 12
FAMILIES = tuple(name for name in chats.TEMPLATES if name != "llama2")
"""llama2's tokenizer puts a space before a text, but not behind the template's own BOS: see test_prompt."""
EARLIER = (("user", "2 + 3?"), ("assistant", 'It is "5", {five}.'))


def row(name: str, answer: str, *turns: tuple[str, str]) -> ReasoningSample:
    text = "\n".join(f"{role}: {text}" for role, text in turns)
    return ReasoningSample(id=name, question=text, answer=answer, rationales=("so it is",), turns=turns)


def rows_for(name: str) -> list[ReasoningSample]:
    """Plain questions, one behind an earlier turn, and where the family takes it also behind a system text."""
    found = [*ROWS, row("t-0", "9", *EARLIER, ("user", "And 4 more?"))]
    if name in chats.TAKES_SYSTEM:
        told = ("system", "Answer {{ with }} a number.")
        found += [row("s-0", "8", told, ("user", "2 + 3?")), row("s-1", "1", told, *EARLIER, ("user", "And 4 more?"))]
    return found


STRANGER = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pst_dist":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM, AutoTokenizer

def ask(folder, conversations):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"add_generation_prompt": True, "return_dict": True}
    ids, single, refused = [], [], []
    for turns in conversations:
        inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", **settings)
        ids.append(inputs["input_ids"][0].tolist())
        new = model.generate(**inputs)[0, len(ids[-1]):]
        single.append(tokenizer.decode(new, skip_special_tokens=True))
    parted = [[{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in one]
              for one in conversations]
    parts = [list(tokenizer.apply_chat_template(one, **settings)["input_ids"]) for one in parted]
    inputs = tokenizer.apply_chat_template(conversations, return_tensors="pt", padding=True, **settings)
    made = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
    batched = [tokenizer.decode(new, skip_special_tokens=True) for new in made]
    odd = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2?"}],
           [{"role": "user", "content": "2?"}, {"role": "user", "content": "3?"}],
           [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3?"}]]
    for turns in odd:
        try:
            tokenizer.apply_chat_template(turns, add_generation_prompt=True)
            refused.append(None)
        except Exception as error:
            refused.append(str(error))
    return {"ids": ids, "parts": parts, "single": single, "batched": batched, "refused": refused}

asked = json.loads(sys.argv[1])
print(json.dumps({folder: ask(folder, conversations) for folder, conversations in asked.items()}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the stranger got from each family's export, what we decoded, and the ids of training."""
    path = tmp_path_factory.mktemp("chats")
    made, asked = {}, {}
    for name in FAMILIES:
        base = zoo.make(name, path / name / "base")
        (base / "chat_template.jinja").write_text(chats.TEMPLATES[name])
        config = Config.model_validate(
            {
                "arm": "post_thinking",
                "output_dir": str(path / name),
                "layout": {"max_length": 200, "prompt": "auto"},
                "student": {"model_name_or_path": str(base)},
                "evaluate": {"max_new_tokens": NEW_TOKENS},
            }
        )
        rows = rows_for(name)
        folder, answers, layout = exported(config, rows, rows, steps=25)
        ids = [layout.sequences(one)[0].prompt_ids for one in rows]
        made[name] = (str(folder), answers, ids, layout)
        turns = [one.turns or (("user", one.question),) for one in rows]
        asked[str(folder)] = [[{"role": role, "content": text} for role, text in one] for one in turns]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, json.dumps(asked)], cwd=path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    return {name: (got[folder], *rest) for name, (folder, *rest) in made.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_exported_template_gives_the_ids_of_training(told, name):
    stranger, _, ids, layout = told[name]
    assert layout.format.turns is not None, "the family's own chat template is used"
    assert stranger["ids"] == ids
    assert stranger["parts"] == ids, "of contents that are lists of texts"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_answered_alone_and_in_a_batch_as_it_was_scored(told, name):
    stranger, ours, _, _ = told[name]
    assert stranger["single"] == ours
    assert stranger["batched"] == ours


@pytest.mark.parametrize("name", FAMILIES)
def test_the_exported_template_refuses_what_the_student_cannot_read(told, name):
    system, twice, replied = told[name][0]["refused"]
    assert (system is None) is (name in chats.TAKES_SYSTEM)
    assert system is None or "takes no system message" in system
    assert "must alternate" in twice and "must be from the user" in replied


@pytest.mark.parametrize("name", FAMILIES)
def test_training_has_the_ids_that_the_familys_own_template_gives(told, name):
    _, _, ids, layout = told[name]
    own = layout.tokenizer
    own.chat_template = chats.TEMPLATES[name]
    for one, mine in zip(rows_for(name), ids, strict=True):
        turns = one.turns or (("user", one.question),)
        given = own.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if name == "llama3":  # it writes today's date, where training has a fixed one
            given, mine = own.decode(given), own.decode(mine)
            assert "Today Date: 26 Jul 2024" in mine
            start = given.index("Today Date: ")
            given = given[:start] + "Today Date: 26 Jul 2024" + given[start + 23 :]
        assert list(given) == list(mine)


def test_the_answer_follows_the_prompt_as_in_a_text_of_both(told):
    """The ids of an answer are those in a text of prompt and answer, with the template's own text between them."""
    between = {"qwen": "", "llama3": "", "gemma": "", "mistral": " ", "neox": " ", "gpt2": "", "opt": ""}
    for name in FAMILIES:
        layout = told[name][3]
        assert layout.format.separator == between[name]
        sequence = layout.sequences(ROWS[1])[0]
        answer = sequence.target_ids[: sequence.target_ids.index(layout.stop_id)]
        text = layout.format.render(ROWS[1].question) + between[name] + ROWS[1].answer
        assert layout.tokenizer(text)["input_ids"] == [*sequence.prompt_ids, *answer], name
