"""`layout.prompt: auto`: exactly the ids of the tokenizer's chat template, or the plain prompt."""

from __future__ import annotations

import pytest
import zoo
from tiny import ROWS

from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError
from pst_dist.student.layout import layout_for
from pst_dist.student.prompt import FRESH_PROMPT, PLAIN_PROMPT, prompt_of
from pst_dist.student.tokenizer import build_tokenizer

TURNS = (
    "{{ bos_token or '' }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
USERS_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + ("[user] {{ m['content'] }}\n{% endfor %}[assistant]\n")
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo")
    return {name: zoo.make(name, path / name) for name in zoo.FAMILIES}


def parts(folders, name: str, template: str | None, **layout):
    config = Config.model_validate(
        {
            "arm": "answer_only",
            "student": {"model_name_or_path": str(folders[name])},
            "layout": {"prompt": "auto", **layout},
        }
    )
    tokenizer = build_tokenizer(config.student, ROWS)
    tokenizer.chat_template = template
    return config, tokenizer


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "gemma", "opt", "neox"])
@pytest.mark.parametrize("system", [None, "Answer with a number."])
def test_the_prompt_has_exactly_the_ids_of_the_chat_template(folders, name, system):
    config, tokenizer = parts(folders, name, TURNS, system=system)
    layout = layout_for(config, tokenizer, is_encoder_decoder=False)
    assert layout.format.prompt.endswith("[assistant]\n") and layout.format.prompt.count("{question}") == 1
    for row in ROWS:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": row.question})
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert layout.sequences(row)[0].prompt_ids == list(theirs)
        assert tokenizer(layout.format.render(row.question))["input_ids"] == list(theirs)
    spelled = layout.prompt_ids(f"What is {tokenizer.eos_token}?")
    assert spelled.count(tokenizer.eos_token_id) == layout.prompt_ids("What is it?").count(tokenizer.eos_token_id)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_without_a_chat_template_the_prompt_is_the_plain_one(folders, name):
    assert prompt_of(*parts(folders, name, None)) == PLAIN_PROMPT
    with pytest.raises(ConfigError, match=r"layout\.system is not part of the prompt"):
        prompt_of(*parts(folders, name, None, system="Be brief."))


def test_a_system_text_without_a_place_is_refused(folders):
    with pytest.raises(ConfigError, match=r"takes no layout\.system"):
        prompt_of(*parts(folders, "gpt2", USERS_ONLY, system="Be brief."))
    assert prompt_of(*parts(folders, "gpt2", USERS_ONLY)) == "[user] {question}\n[assistant]"
    with pytest.raises(ConfigError, match=r"layout\.system contains the control token <\|endoftext\|>"):
        prompt_of(*parts(folders, "gpt2", TURNS, system="Stop with <|endoftext|>"))
    with pytest.raises(ConfigError, match=r"layout\.system is blank"):
        prompt_of(*parts(folders, "gpt2", TURNS, system=" "))


def test_a_fresh_student_keeps_its_prompt_and_a_given_one_is_never_changed(folders):
    assert (
        prompt_of(Config.model_validate({"layout": {"prompt": "auto"}}), None) == FRESH_PROMPT == Config().layout.prompt
    )
    assert prompt_of(*parts(folders, "gpt2", TURNS, prompt="Q: {question} A:")) == "Q: {question} A:"
