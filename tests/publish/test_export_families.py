"""What the model card says of an export holds for every family: asked singly, in batches and by chat, by a stranger.

`zoo.exports` trains and asks them; `python -m tests.zoo` prints the same as a table.
"""

from __future__ import annotations

import pytest
import zoo
from tiny import Tiny
from zoo.exports import QUESTIONS, Told, matrix

from pst_dist.arms import STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.publish.export import expected_prompt, export
from pst_dist.student.saved import load_student


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Told]:
    """What the stranger got from each family's export, and what we decoded."""
    return matrix(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_an_export_answers_alone_and_in_a_batch_as_it_was_evaluated(told, name):
    assert told[name].single == told[name].scored
    assert told[name].batched == told[name].scored


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_an_export_pads_where_its_family_can_be_padded(told, name):
    assert told[name].side == ("left" if name in zoo.CAUSAL else "right")
    assert told[name].inputs == ["input_ids", "attention_mask"]
    student = load_student(told[name].folder, device="cpu")
    assert student.tokenizer.padding_side == told[name].side
    assert student.tokenizer.convert_tokens_to_ids(STOP_TOKEN) in told[name].eos


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_chat_template_gives_the_trained_prompt(told, name):
    assert told[name].chat == [True] * len(QUESTIONS)


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_a_question_that_spells_control_tokens_is_read_as_in_training_where_the_card_says_how(told, name):
    folder = told[name].folder
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
