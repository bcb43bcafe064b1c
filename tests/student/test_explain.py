"""A rationale that continues from its answer's keys and values is the one that is written from the beginning."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tiny import ROWS, Tiny, fitted

from pst_dist.student.ask import answer_question, answer_questions
from pst_dist.student.explain import decode_explained
from pst_dist.student.generate import decode_answers
from pst_dist.student.saved import load_student
from pst_dist.student.stream import AnswerStreamer

QUESTIONS = [row.question for row in ROWS]
# Neither the students nor their answers know these, so answers of many lengths end side by side.
STRANGE = [*QUESTIONS, "Why?", "A much longer question than the others, so that padding matters?", "2 + 3? 9 - 9", "10"]


def explained(tiny: Tiny, questions, *, reuse: bool, batch_size: int = 4, most: int = 24):
    return decode_explained(
        tiny.model,
        tiny.tokenizer,
        tiny.format,
        questions,
        batch_size=batch_size,
        max_new_tokens=most,
        reuse=reuse,
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("arm", "layout"),
    [
        ("pst", {}),
        ("pst", {"semantic_position": "before", "semantic_tokens": 2}),
        ("pst", {"semantic_tokens": 3}),
        ("post_thinking", {}),
        ("prefix", {}),
        ("pre_thinking", {}),
    ],
    ids=["pst", "before", "three", "post", "prefix", "pre"],
)
def test_reuse_gives_the_same_answers_and_rationales(architecture, arm, layout):
    tiny = Tiny(arm, architecture, layout=layout, seed=5)
    for batch_size in (1, 8):
        plain = explained(tiny, STRANGE, reuse=False, batch_size=batch_size)
        again = explained(tiny, STRANGE, reuse=True, batch_size=batch_size)
        assert [answer.token_ids for answer in again[0]] == [answer.token_ids for answer in plain[0]]
        assert again[1] == plain[1]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_trained_student_explains_each_row_of_a_padded_batch(architecture):
    tiny = fitted("pst", architecture)
    calls = []
    whole = tiny.model.forward

    @functools.wraps(whole)  # transformers looks at its parameters
    def forward(*args, **keys):
        calls.append(keys["input_ids"].shape[1])
        return whole(*args, **keys)

    tiny.model.forward = forward
    try:
        answers, rationales = explained(tiny, STRANGE, reuse=True, batch_size=8, most=40)
        assert rationales[: len(ROWS)] == [row.rationales[0] for row in ROWS]
        longest = max(len(tiny.layout.prompt_ids(question)) for question in STRANGE)
        assert calls[0] == longest and max(calls[1:]) <= 2, "prompt and answer are computed once"
        calls.clear()
        plain = explained(tiny, STRANGE, reuse=False, batch_size=8, most=40)
        # Without reuse the rows that have ended are dropped, so that others are computed in smaller batches.
        assert [answer.token_ids for answer in plain[0]] == [answer.token_ids for answer in answers]
        likely = [answer.probability for answer in answers]
        assert [answer.probability for answer in plain[0]] == pytest.approx(likely, rel=1e-4) and plain[1] == rationales
        assert sum(length > 3 for length in calls) == 2, "without reuse they are computed again"
    finally:
        del tiny.model.forward


def test_an_answer_that_was_cut_gets_no_rationale_and_its_neighbours_do():
    tiny = fitted("pst")
    answers, rationales = explained(tiny, QUESTIONS, reuse=True, batch_size=4, most=4)
    complete = [answer.complete for answer in answers]
    assert True in complete and False in complete, "140 needs five tokens, 5 needs three"
    assert [bool(text) for text in rationales] == complete


def test_positions_limit_the_rationale_of_each_row():
    tiny = Tiny("pst", max_length=40, seed=5)
    questions = ["Hm?", "x" * 30, "2 + 3?"]
    assert explained(tiny, questions, reuse=True, most=60)[1] == explained(tiny, questions, reuse=False, most=60)[1]


def test_confidence_is_the_geometric_mean_over_the_answers_own_tokens(tmp_path):
    tiny = Tiny("pst", seed=5)
    (answer,) = decode_answers(tiny.model, tiny.tokenizer, tiny.format, ["Hm?"], batch_size=1, max_new_tokens=6)
    assert len(answer.log_probabilities) == answer.answer_tokens
    assert math.exp(sum(answer.log_probabilities)) == pytest.approx(answer.probability)
    tiny.save(tmp_path / "pst")
    asked = answer_question(load_student(tmp_path / "pst", "cpu"), "Hm?", explain=False, max_new_tokens=6)
    assert asked.confidence == pytest.approx(answer.probability ** (1 / answer.answer_tokens))
    fitted("pre_thinking").save(tmp_path / "pre")
    student = load_student(tmp_path / "pre", "cpu")
    row = ROWS[2]
    (thought,) = decode_answers(
        student.model, student.tokenizer, student.format, [row.question], batch_size=1, max_new_tokens=40
    )
    assert len(thought.log_probabilities) == len(row.answer) + 2, "a space, the digits, the stop: not the rationale"


def test_a_stream_gives_the_answer_in_pieces(tmp_path):
    for arm in ("pst", "pre_thinking", "adaptive"):
        fitted(arm).save(tmp_path / arm)
        student = load_student(tmp_path / arm, "cpu")
        for think_below in (0.0, 2.0) if arm == "adaptive" else (0.0,):
            for explain in (False, True):
                pieces: list[str] = []
                settings = {"explain": explain, "max_new_tokens": 40, "think_below": think_below}
                answer = answer_question(student, "Say 140", on_text=pieces.append, **settings)
                assert "".join(pieces).strip() == answer.text == "140"
                assert len(pieces) >= (3 if not think_below else 1), pieces
                assert answer.rationale == (ROWS[2].rationales[0] if explain else None)
                assert answer_questions(student, ["Say 140"], batch_size=2, **settings)[0].text == "140"


def test_a_character_of_several_tokens_is_told_whole():
    tiny = Tiny("pst")
    pieces: list[str] = []
    streamer = AnswerStreamer(tiny.tokenizer, tiny.format, pieces.append)
    streamer.put(torch.tensor([[1, 2]]))
    for token in tiny.tokenizer(" é½!", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == [" ", "é", "½", "!"]
