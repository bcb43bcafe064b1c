"""`layout.prompt: auto`: exactly the ids of the tokenizer's chat template, or the plain prompt."""

from __future__ import annotations

import chats
import pytest
import transformers
import zoo
from packaging.version import Version
from tiny import ROWS

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.errors import ConfigError, DataError
from pst_dist.student.chat import chat_prompt, conversation_problem
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
SHOUTING = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
TOLD, ASKED, REPLIED = ("system", "Be brief."), ("user", "2 + 3?"), ("assistant", "5")


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


def text_of(config, tokenizer) -> str:
    return prompt_of(config, tokenizer).template


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
    assert text_of(*parts(folders, name, None)) == PLAIN_PROMPT
    with pytest.raises(ConfigError, match=r"layout\.system is not part of the prompt"):
        prompt_of(*parts(folders, name, None, system="Be brief."))


def test_a_system_text_without_a_place_is_refused(folders):
    with pytest.raises(ConfigError, match=r"does not accept layout\.system"):
        prompt_of(*parts(folders, "gpt2", USERS_ONLY, system="Be brief."))
    assert text_of(*parts(folders, "gpt2", USERS_ONLY)) == "[user] {question}\n[assistant]"
    with pytest.raises(ConfigError, match=r"layout\.system contains the control token <\|endoftext\|>"):
        prompt_of(*parts(folders, "gpt2", TURNS, system="Stop with <|endoftext|>"))
    with pytest.raises(ConfigError, match=r"layout\.system is blank"):
        prompt_of(*parts(folders, "gpt2", TURNS, system=" "))


def test_a_fresh_student_keeps_its_prompt_and_a_given_one_is_never_changed(folders):
    fresh = Config.model_validate({"layout": {"prompt": "auto"}})
    assert text_of(fresh, None) == FRESH_PROMPT
    assert text_of(*parts(folders, "gpt2", TURNS, prompt="Q: {question} A:")) == "Q: {question} A:"


@pytest.mark.parametrize(
    ("name", "template"), [("gpt2", SHOUTING), ("llama2", chats.TEMPLATES["llama2"])], ids=["shouting", "llama2"]
)
def test_a_template_that_fixed_text_cannot_reproduce_gives_way_to_the_plain_prompt(folders, name, template, caplog):
    if name == "llama2" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("some earlier releases put the same space before both, so that fixed text does reproduce it")
    assert prompt_of(*parts(folders, name, template)).turns is None
    assert text_of(*parts(folders, name, template)) == PLAIN_PROMPT
    assert "cannot be reproduced token by token" in caplog.text


def test_what_stands_before_the_answer_follows_from_the_prompt(folders):
    expected = {
        "{question} ###": " ",
        "{question}\n": "",
        "Q {question}</s>": "",
        "{question}": " ",
        "a\n{question}": " ",
    }
    for prompt, separator in expected.items():
        config, tokenizer = parts(folders, "opt", None, prompt=prompt)
        assert prompt_of(config, tokenizer).separator == separator, prompt
        layout = layout_for(config, tokenizer, is_encoder_decoder=False)
        ids = layout.sequences(ROWS[1])[0].target_ids[:-1]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == f"{separator}17"
    given = parts(folders, "opt", None, prompt="{question}\n", separator=" ")
    assert prompt_of(*given).separator == " "
    seq2seq = layout_for(*parts(folders, "bart", None, prompt="{question}\n"), is_encoder_decoder=True)
    assert seq2seq.sequences(ROWS[1])[0].target_ids[:-1] == seq2seq.text_ids.text(" 17"), "a decoder's own start"


def test_a_date_in_a_template_is_the_same_on_every_day(folders):
    made = text_of(*parts(folders, "llama3", chats.TEMPLATES["llama3"]))
    assert "Today Date: 26 Jul 2024" in made


@pytest.mark.parametrize("name", ["llama3", "qwen", "gemma", "opt"])
def test_a_control_token_that_is_spelled_out_in_a_turn_is_text(folders, name):
    config, tokenizer = parts(folders, name, chats.TEMPLATES[name])
    layout = layout_for(config, tokenizer, is_encoder_decoder=False)
    end = tokenizer.eos_token
    spelled = (("user", f"2 {end} 3?"), ("assistant", f"5{end}"), ("user", f"{end} And 4?"))
    plain = tuple((role, text.replace(end, "it")) for role, text in spelled)
    control = layout.text_ids.control
    found, wanted = ([token for token in layout.prompt_ids(one) if token in control] for one in (spelled, plain))
    assert found == wanted
    assert tokenizer.decode(layout.prompt_ids(spelled)).count(end) >= 3


def test_what_a_row_has_and_the_prompt_cannot_hold_is_refused_by_name(folders):
    turns = {
        name: prompt_of(*parts(folders, name, chats.TEMPLATES[name])).turns for name in ("gemma", "mistral", "qwen")
    }
    assert set(turns["qwen"]) == {"system", "reply", "next"}
    assert conversation_problem(turns["qwen"], (TOLD, ASKED, REPLIED, ASKED)) is None
    assert "has a system text" in conversation_problem(turns["gemma"], (TOLD, ASKED))
    assert "has a system text" in conversation_problem(turns["mistral"], (TOLD, ASKED, REPLIED, ASKED))
    assert "has earlier turns" in conversation_problem({}, (ASKED, REPLIED, ASKED))
    for odd in ((ASKED, ASKED), (REPLIED, ASKED), (ASKED, TOLD, ASKED)):
        assert "in alternation" in conversation_problem(turns["qwen"], odd)
    config, tokenizer = parts(folders, "gemma", chats.TEMPLATES["gemma"])
    layout = layout_for(config, tokenizer, is_encoder_decoder=False)
    row = ReasoningSample(
        id="a", question="Be brief.\n\n2 + 3?", answer="5", turns=(TOLD, ASKED), source="rows.jsonl:7"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the row has a system text"):
        layout.sequences(row)
    plain = layout_for(*parts(folders, "gemma", None), is_encoder_decoder=False)
    assert "Be brief." in plain.tokenizer.decode(plain.sequences(row)[0].prompt_ids), "as one text"


def test_the_configs_system_text_is_for_rows_without_one(folders):
    config, tokenizer = parts(folders, "qwen", chats.TEMPLATES["qwen"], system="Count.")
    layout = layout_for(config, tokenizer, is_encoder_decoder=False)
    own = layout.format.render((TOLD, ASKED, REPLIED, ASKED))
    assert own.count("Be brief.") == 1 and "Count." not in own
    assert layout.format.render((ASKED, REPLIED, ASKED)).count("Count.") == 1
    assert chat_prompt(tokenizer, None).template != layout.format.prompt


@pytest.mark.smollm2
def test_smollm2_is_asked_as_it_was_taught():
    """Its template ends in a newline, and a space before the answer costs it more than two nats."""
    config = Config.model_validate(
        {"arm": "answer_only", "student": {"model_name_or_path": "smollm2"}, "layout": {"prompt": "auto"}}
    )
    tokenizer = build_tokenizer(config.student, ROWS)
    layout = layout_for(config, tokenizer, is_encoder_decoder=False)
    assert layout.format.separator == "" and set(layout.format.turns) == {"system", "reply", "next"}
    sequence = layout.sequences(ROWS[1])[0]
    whole = [{"role": "user", "content": ROWS[1].question}, {"role": "assistant", "content": ROWS[1].answer}]
    theirs = list(tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"])
    ours = [*sequence.prompt_ids, *sequence.target_ids[:-1]]
    assert theirs[: len(ours)] == ours and theirs[len(ours)] == tokenizer.eos_token_id
