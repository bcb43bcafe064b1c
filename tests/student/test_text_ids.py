"""Control tokens that are spelled out in rows and questions are text, in training and in decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN, Segment
from pst_dist.data.sample import ReasoningSample
from pst_dist.models.load import load_tokenizer
from pst_dist.models.locate import locate_model
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.layout import Layout
from pst_dist.student.text_ids import TextIds
from pst_dist.student.tokenizer import with_special_tokens

SPELLED = (
    "</s>",
    "<s>",
    "<|endoftext|>",
    "<|pad|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<eos>",
    "<bos>",
    "<pad>",
    "<extra_id_3>",
)
TEXT = "He wrote " + " then ".join((*SPELLED, STOP_TOKEN, SEMANTIC_TOKEN)) + "</s></s> and more."
PLAIN = ("2 + 3?", " the answer is  17.", "What?\nA new line: one.", " two and three", "a")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The tokenizer of each family with our two tokens, loaded from a folder as a run loads it."""
    path: Path = tmp_path_factory.mktemp("zoo")
    return {
        name: with_special_tokens(load_tokenizer(locate_model(str(zoo.make(name, path / name)))))
        for name in zoo.FAMILIES
    }


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_spelled_out_control_token_is_text(tokenizers, name):
    tokenizer = tokenizers[name]
    text_ids = TextIds(tokenizer)
    ids = text_ids.text(TEXT)
    assert not set(ids) & set(tokenizer.all_special_ids)
    # As text it comes back whole; skip_special_tokens would have swallowed a control token.
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() == TEXT


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_text_without_control_tokens_keeps_the_ids_that_the_tokenizer_gives(tokenizers, name):
    tokenizer = tokenizers[name]
    text_ids = TextIds(tokenizer)
    for text in PLAIN:
        assert text_ids.text(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert text_ids.prompt("Q: {question} ###", text) == tokenizer(f"Q: {text} ###")["input_ids"]
        # The way round for tokenizers such as T5's gives the same ids where nothing has to be cut.
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert text_ids._by_pieces(text, plain) == plain


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_question_adds_no_control_token_to_the_prompt(tokenizers, name):
    tokenizer = tokenizers[name]
    text_ids = TextIds(tokenizer)
    control = text_ids.control

    def controls(ids: list[int]) -> list[str]:
        return [control[index] for index in ids if index in control]

    usual = controls(tokenizer("a")["input_ids"])
    assert controls(text_ids.prompt("{question} ###", TEXT)) == usual
    # Those that a template puts around a question on purpose stay control tokens.
    own = tokenizer.eos_token
    asked = text_ids.prompt(f"one{own}{{question}}{own}two", TEXT)
    assert controls(asked) == controls(tokenizer(f"one{own}a{own}two")["input_ids"])
    written = tokenizer.decode(asked, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert TEXT.replace(" ", "") in written.replace(" ", "")


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_row_is_supervised_on_its_text_and_on_one_stop(tokenizers, name):
    tokenizer = tokenizers[name]
    fmt = AnswerFormat("post_thinking", "{question} ###", " -->", 2048, "after", 1)
    layout = Layout(tokenizer, fmt, is_encoder_decoder=name in ("t5", "bart"))
    sample = ReasoningSample(id="r", question=TEXT, answer="grey</s>", rationales=(f"It is{STOP_TOKEN} grey</s>.",))
    (sequence,) = layout.sequences(sample)
    answer = [token for token, of in zip(sequence.target_ids, sequence.segments, strict=True) if of is Segment.ANSWER]
    assert sequence.target_ids.count(layout.stop_id) == 1 and answer[-1] == layout.stop_id
    assert sequence.target_ids.count(tokenizer.eos_token_id) == 1 and sequence.target_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1], clean_up_tokenization_spaces=False).strip() == "grey</s>"
