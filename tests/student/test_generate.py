"""Decoding against a plain greedy loop over the model's own forward pass, and the places where it must stop."""

from __future__ import annotations

import pytest
import torch
from tiny import ROWS, Tiny, fitted

from pst_dist.errors import InputError, IntegrityError
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.manifest import write_json
from pst_dist.student import batch_generation
from pst_dist.student.ask import answer_question, timed_answer
from pst_dist.student.contexts import Decoded, max_positions
from pst_dist.student.generate import decode_answers, decode_rationales
from pst_dist.student.saved import load_student

QUESTIONS = [row.question for row in ROWS]


def greedy(tiny: Tiny, question: str, most: int) -> tuple[list[int], float]:
    """One row, no cache, no padding, no `generate`: the argmax of the full forward pass, token by token, and the
    product of its probabilities.
    """
    prompt = tiny.layout.prompt_ids(question)
    ends = {tiny.layout.stop_id, tiny.tokenizer.eos_token_id}
    semantic = [tiny.layout.semantic_id] * (tiny.format.semantic_tokens if tiny.format.semantic_before else 0)
    made: list[int] = []
    probability = 1.0
    tiny.model.eval()
    with torch.no_grad():
        while len(made) < most and not ends & set(made):
            if tiny.student.is_encoder_decoder:
                decoder = [tiny.model.config.decoder_start_token_id, *semantic, *made]
                logits = tiny.model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoder])).logits
            else:
                logits = tiny.model(input_ids=torch.tensor([[*prompt, *semantic, *made]])).logits
            made.append(int(logits[0, -1].argmax()))
            probability *= float(logits[0, -1].softmax(-1).max())
    return made, probability


def answers(tiny: Tiny, questions=QUESTIONS, *, batch_size=3, most=40) -> list[Decoded]:
    return decode_answers(
        tiny.model, tiny.tokenizer, tiny.format, questions, batch_size=batch_size, max_new_tokens=most
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("layout", [{}, {"semantic_position": "before", "semantic_tokens": 2}], ids=["after", "before"])
def test_padded_batches_give_what_a_plain_greedy_loop_gives_each_row(architecture, layout):
    tiny = Tiny("pst", architecture, layout=layout, seed=3)
    questions = [*QUESTIONS, "A much longer question than the others, so that padding matters?"]
    for question, answer in zip(questions, answers(tiny, questions, batch_size=4, most=9), strict=True):
        made, probability = greedy(tiny, question, 9)
        assert answer.token_ids == made, question
        assert answer.probability == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_rows_that_have_ended_are_dropped_and_the_others_do_not_notice(architecture, monkeypatch):
    tiny = fitted("pre_thinking", architecture)
    # Repeated words make the prompts longer, so that rows which go on stand anywhere in the batch.
    questions = [*QUESTIONS, *(f"{'What is ' * k}10 + 7?" for k in range(2, 8)), *QUESTIONS[::-1]]
    sizes, generate = [], type(tiny.model).generate

    def seen(model, *args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(tiny.model), "generate", seen)
    together = answers(tiny, questions, batch_size=14)
    assert sizes == [14] if architecture == "t5" else sizes[0] == 14 > sizes[1] > 0, sizes
    assert len({answer.answer_tokens for answer in together}) > 2, "rows end at different times"
    monkeypatch.setattr(batch_generation, "_FEWEST", 99)
    for question, answer, kept in zip(questions, together, answers(tiny, questions, batch_size=14), strict=True):
        assert (answer.token_ids, answer.text) == (kept.token_ids, kept.text), question
        assert answer.probability == pytest.approx(kept.probability, rel=1e-4)
        if question in QUESTIONS:
            made, probability = greedy(tiny, question, 40)
            assert answer.token_ids == made and answer.complete, question
            assert answer.probability == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_a_limit_of_tokens_cuts_batches_and_changes_no_answer(architecture):
    tiny = Tiny("pst", architecture, seed=3)
    questions = ["a" * 3, "b" * 40, "c" * 5, "d" * 4]
    batches: list[int] = []
    tokens: list[int] = []
    limited = decode_answers(
        tiny.model,
        tiny.tokenizer,
        tiny.format,
        questions,
        batch_size=4,
        max_new_tokens=10,
        # Prompts add " ###"; a T5's also its end token, and its decoder starts with one: two rows of 5 + 4 + 10 fit.
        batch_tokens=2 * (5 + 4 + 10) + 4,
        on_batch=batches.append,
        on_token=tokens.append,
    )
    assert batches == [2, 1, 1], "a and d together, c alone, b is longer than the limit"
    alone = answers(tiny, questions, batch_size=1, most=10)
    assert [answer.token_ids for answer in limited] == [answer.token_ids for answer in alone]
    assert tokens.count(1) == 3 and max(tokens) <= 10


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_a_trained_student_answers_its_rows_in_order_and_stops_at_the_stop_token(architecture):
    tiny = fitted("pst", architecture)
    seen: list[int] = []
    decoded = decode_answers(
        tiny.model, tiny.tokenizer, tiny.format, QUESTIONS, batch_size=3, max_new_tokens=40, on_batch=seen.append
    )
    for answer, row in zip(decoded, ROWS, strict=True):
        # Bytes are tokens: a space, the digits, the stop.
        assert answer.answer_text == " " + row.answer and answer.complete
        assert answer.answer_tokens == len(row.answer) + 2
        assert answer.token_ids[-1] == tiny.layout.stop_id
    assert seen == [3, 1]


@pytest.mark.parametrize(
    ("arm", "architecture", "layout"),
    [
        ("pst", "gpt2", {}),
        ("pst", "gpt2", {"semantic_position": "before"}),
        ("post_thinking", "gpt2", {}),
        ("prefix", "gpt2", {}),
        ("pre_thinking", "gpt2", {}),
        ("pst", "t5", {}),
        ("prefix", "t5", {}),
        ("pst", "llama", {}),
    ],
)
def test_every_arm_gives_the_rationale_that_it_was_taught(arm, layout, architecture):
    tiny = fitted(arm, architecture, **layout)
    decoded = answers(tiny)
    reasons = decode_rationales(
        tiny.model, tiny.tokenizer, tiny.format, QUESTIONS, decoded, batch_size=3, max_new_tokens=40
    )
    assert reasons == [row.rationales[0] for row in ROWS]


def test_pre_thinking_counts_the_tokens_of_its_rationale_and_answers_after_the_marker():
    tiny = fitted("pre_thinking")
    for answer, row in zip(answers(tiny), ROWS, strict=True):
        assert answer.text == f" {row.rationales[0]} --> {row.answer}"
        assert answer.answer_text == f" {row.answer}"
        assert answer.answer_tokens == len(answer.text) + 1


def test_an_answer_whose_marker_never_came_is_empty():
    tiny = fitted("pre_thinking")
    for answer in answers(tiny, most=4):
        assert answer.answer_text == "" and not answer.complete and answer.answer_tokens == 4


def test_answers_cut_short_are_not_complete_and_get_no_rationale():
    tiny = fitted("pst")
    (answer,) = answers(tiny, ["Say 140"], most=2)
    assert (answer.answer_text, answer.answer_tokens, answer.complete) == (" 1", 2, False)
    assert decode_rationales(
        tiny.model, tiny.tokenizer, tiny.format, ["Say 140"], [answer], batch_size=1, max_new_tokens=9
    ) == [""]


@pytest.mark.parametrize(("arm", "loss"), [("answer_only", {}), ("pst", {"rationale_weight": 0})])
def test_an_arm_without_rationale_tokens_writes_none(arm, loss):
    tiny = Tiny(arm, loss=loss)
    decoded = [Decoded(" 5", " 5", 3, True, [1, 2, tiny.layout.stop_id], 0.5)] * 4
    reasons = decode_rationales(
        tiny.model, tiny.tokenizer, tiny.format, QUESTIONS, decoded, batch_size=2, max_new_tokens=9
    )
    assert reasons == [""] * 4 and not tiny.format.writes_rationale


def test_generation_ends_with_the_models_positions_and_a_question_that_fills_them_stays_unanswered():
    tiny = Tiny("answer_only", max_length=48)
    assert max_positions(tiny.model) == 48
    short, long, full = "Hm?", "x" * 38, "x" * 90
    decoded = answers(tiny, [full, short, long], batch_size=1, most=40)
    assert (decoded[0].token_ids, decoded[0].complete) == ([], False)
    room = 48 - len(tiny.layout.prompt_ids(long))
    assert decoded[2].token_ids == greedy(tiny, long, room)[0] and len(decoded[2].token_ids) <= room
    assert decoded[1].token_ids == greedy(tiny, short, 40)[0]


def test_the_model_is_left_in_the_mode_and_with_the_settings_it_had():
    tiny = Tiny("pst")
    own = tiny.model.generation_config
    tiny.model.train()
    answers(tiny, most=2)
    assert tiny.model.training and tiny.model.generation_config is own
    tiny.model.eval()
    answers(tiny, most=2)
    assert not tiny.model.training


def test_a_pretrained_models_own_generation_settings_do_not_change_answers():
    tiny = Tiny("answer_only", seed=5)
    plain = answers(tiny, most=12)
    tiny.model.generation_config.repetition_penalty = 5.0
    tiny.model.generation_config.min_new_tokens = 11
    assert [a.token_ids for a in answers(tiny, most=12)] == [a.token_ids for a in plain]


def test_decoding_leaves_the_training_loss_untouched():
    tiny = fitted("pst")
    nll = [tiny.validation_nll(), answers(tiny) and tiny.validation_nll()]
    assert nll[0] == nll[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "best"
    fitted("pst").save(path)
    return path


def test_a_loaded_student_answers_as_the_one_in_memory(folder):
    student = load_student(folder, "cpu")
    answer = answer_question(student, "What is 10 + 7?", explain=True, max_new_tokens=40)
    assert (answer.text, answer.complete, answer.tokens) == ("17", True, 4)
    assert answer.rationale == "ten, seven" and answer.seconds > 0 and 0 < answer.probability <= 1
    assert answer_question(student, "Say 140", explain=False, max_new_tokens=40).rationale is None
    decoded, milliseconds = timed_answer(student, "Say 140", max_new_tokens=40)
    assert decoded.answer_text == " 140" and milliseconds > 0


def test_questions_that_cannot_be_answered_are_refused(folder):
    student = load_student(folder, "cpu")
    with pytest.raises(InputError, match="question is empty"):
        answer_question(student, "  ", explain=False, max_new_tokens=9)
    with pytest.raises(InputError, match="fills all 96 positions"):
        answer_question(student, "x" * 200, explain=False, max_new_tokens=9)


def test_a_damaged_or_absent_student_is_refused(tmp_path):
    with pytest.raises(InputError, match="run `pst train` first"):
        load_student(tmp_path / "none")
    fitted("pst").save(tmp_path / "best")
    weights = tmp_path / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors.*sha256 differs"):
        load_student(tmp_path / "best")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arm": "unknown"}, "arm"),
        ({"prompt": "no place for it"}, "prompt"),
        ({"answer_marker": " "}, "answer_marker"),
        ({"max_length": "64"}, "max_length"),
        ({"max_length": 0}, "max_length"),
        ({"semantic_tokens": -1}, "semantic_tokens"),
        ({"later": 1}, "later"),
    ],
)
def test_an_answer_format_with_anything_unexpected_is_one_line(tmp_path, change, named):
    fmt = {"arm": "pst", "prompt": "{question}", "answer_marker": "answer:", "max_length": 64}
    fmt |= {"semantic_position": "after_answer", "semantic_tokens": 1}
    with Artefact(tmp_path / "best", "student").publish("f") as draft:
        write_json(draft.path / "pst.json", fmt | change)
    with pytest.raises(IntegrityError, match=r"pst\.json") as caught:
        load_student(tmp_path / "best")
    assert named in caught.value.what
