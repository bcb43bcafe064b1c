"""Which tokens an arm makes of a sample, and that an answer is never cut."""

import dataclasses

import pytest

from pst_dist.arms import ARMS, SEMANTIC_TOKEN, STOP_TOKEN, Segment
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.errors import ConfigError, DataError
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.layout import layout_for
from pst_dist.student.tokenizer import build_tokenizer

SAMPLE = ReasoningSample(id="s", question="2+2?", answer="4", rationales=("two and two", "a pair of pairs"))
A, S, R = Segment.ANSWER, Segment.SEMANTIC, Segment.RATIONALE


def layout_of(arm, *, seq2seq=False, **sections):
    config = Config.model_validate({"arm": arm, **sections})
    tokenizer = build_tokenizer(config.student, [SAMPLE])
    return layout_for(config, tokenizer, is_encoder_decoder=seq2seq)


def text(layout, ids):
    return layout.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("arm", "target"),
    [
        ("answer_only", f" 4{STOP_TOKEN}"),
        ("pre_thinking", f" two and two --> 4{STOP_TOKEN}"),
        ("post_thinking", f" 4{STOP_TOKEN} two and two<|endoftext|>"),
        ("pst", f" 4{STOP_TOKEN}{SEMANTIC_TOKEN} two and two<|endoftext|>"),
    ],
)
def test_each_arm_orders_answer_and_rationale_in_its_own_way(arm, target):
    layout = layout_of(arm)
    (sequence,) = layout.sequences(SAMPLE)
    assert text(layout, sequence.prompt_ids) == "2+2? ###"
    assert text(layout, sequence.target_ids) == target


def test_the_prefix_arm_makes_two_sequences_with_one_segment_each():
    layout = layout_of("prefix")
    predict, explain = layout.sequences(SAMPLE)
    assert text(layout, predict.prompt_ids) == "predict: 2+2? ###"
    assert text(layout, explain.prompt_ids) == "explain: 2+2? ###"
    assert set(predict.segments) == {A} and set(explain.segments) == {R}


def test_the_semantic_token_can_stand_before_the_answer():
    layout = layout_of("pst", layout={"semantic_position": "before", "semantic_tokens": 2})
    (sequence,) = layout.sequences(SAMPLE)
    assert sequence.segments[:3] == [S, S, A]


def test_pure_pst_holds_no_rationale_tokens_but_span_pooling_keeps_them():
    (pure,) = layout_of("pst", loss={"rationale_weight": 0}).sequences(SAMPLE)
    (span,) = layout_of("pst", loss={"rationale_weight": 0, "pooling": "span"}).sequences(SAMPLE)
    assert R not in pure.segments and R in span.segments


ODD = (
    SAMPLE,
    ReasoningSample(id="t", question="Which? ###", answer="a <|endoftext|> b", rationales=("a <stop>", "or " * 9)),
    ReasoningSample(id="u", question="2+2?", answer="4", rationales=("two", f"{STOP_TOKEN} and {SEMANTIC_TOKEN}")),
    ReasoningSample(id="v", question=f"why {STOP_TOKEN}?", answer="4 ", rationales=("-->", "x")),
)


@pytest.mark.parametrize("seq2seq", [False, True])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("separator", [" ", "\n"])
def test_many_samples_at_once_have_the_sequences_that_each_has_alone(arm, seq2seq, separator):
    layout = layout_of(arm, seq2seq=seq2seq, loss={"control": "shuffle_rationale_tokens"})
    layout.format = dataclasses.replace(layout.format, separator=separator)
    rows = [(sample, rationale) for sample in ODD for rationale in (0, 1)]
    assert layout.many(rows) == [layout.sequences(*row) for row in rows]
    assert layout.many([]) == []


def test_many_samples_at_once_are_refused_as_each_is_alone():
    layout = layout_of("pst", layout={"max_length": 24})
    long = ReasoningSample(id="long", question="2+2? " * 20, answer="4", rationales=("so",))
    with pytest.raises(DataError, match="sample long: question and answer take"):
        layout.many([(SAMPLE, 0), (long, 0)])
    with pytest.raises(DataError, match="sample bare has no rationale"):
        layout.many([(ReasoningSample(id="bare", question="2+2?", answer="4"), 0)])
    assert layout.many([(SAMPLE, 0)]) == [layout.sequences(SAMPLE)]


def test_another_rationale_of_the_same_sample_gives_another_text():
    layout = layout_of("post_thinking")
    assert "a pair of pairs" in text(layout, layout.sequences(SAMPLE, 1)[0].target_ids)


def test_shuffled_rationales_hold_the_same_tokens_in_another_order():
    plain = layout_of("post_thinking").sequences(SAMPLE)[0]
    shuffled = layout_of("post_thinking", loss={"control": "shuffle_rationale_tokens"}).sequences(SAMPLE)[0]
    assert sorted(plain.target_ids) == sorted(shuffled.target_ids)
    assert plain.target_ids != shuffled.target_ids
    assert plain.target_ids[:3] == shuffled.target_ids[:3]  # the answer, its stop and no shuffling there


@pytest.mark.parametrize("arm", ["pre_thinking", "post_thinking", "pst"])
def test_truncation_takes_the_rationales_end_and_never_the_answer(arm):
    whole = layout_of(arm).sequences(SAMPLE)[0]
    limit = len(whole.prompt_ids) + len(whole.target_ids) - 3
    cut = layout_of(arm, layout={"max_length": limit}).sequences(SAMPLE)[0]
    assert cut.truncated and len(cut.prompt_ids) + len(cut.target_ids) == limit
    answers = [token for token, owner in zip(whole.target_ids, whole.segments, strict=True) if owner is A]
    assert [token for token, owner in zip(cut.target_ids, cut.segments, strict=True) if owner is A] == answers
    assert (" -->" in text(layout_of(arm), cut.target_ids)) == (arm == "pre_thinking")


def test_a_question_and_answer_that_do_not_fit_are_refused_by_name():
    with pytest.raises(DataError, match=r"sample s: question and answer take 12 tokens, layout\.max_length is 10"):
        layout_of("pst", layout={"max_length": 10}).sequences(SAMPLE)


def test_an_encoder_decoder_has_the_full_length_for_its_target():
    (sequence,) = layout_of("pst", seq2seq=True, layout={"max_length": 18}).sequences(SAMPLE)
    assert len(sequence.target_ids) == 17 and not sequence.truncated


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.needs_rationale])
def test_an_arm_that_needs_a_rationale_names_the_row_that_has_none(arm):
    bare = ReasoningSample(id="bare", question="q", answer="a", source="rows.jsonl:7")
    with pytest.raises(DataError) as caught:
        layout_of(arm).sequences(bare)
    assert "rows.jsonl:7: sample bare has no rationale" in str(caught.value)


def test_a_row_that_spells_our_special_token_is_read_as_text():
    evil = ReasoningSample(id="evil", question=f"say {STOP_TOKEN}", answer=STOP_TOKEN)
    layout = layout_of("answer_only")
    (sequence,) = layout.sequences(evil)
    assert layout.stop_id not in sequence.prompt_ids
    assert sequence.target_ids.count(layout.stop_id) == 1 and sequence.target_ids[-1] == layout.stop_id
    assert text(layout, sequence.target_ids[:-1]) == f" {STOP_TOKEN}"


def test_a_prompt_template_without_the_question_is_refused():
    with pytest.raises(ConfigError, match=r"must contain \{question\} exactly once"):
        AnswerFormat.of(Config.model_validate({"layout": {"prompt": "Q:"}}))


@pytest.mark.parametrize("arm", ["pre_thinking", "prefix"])
def test_an_arm_that_writes_its_rationale_refuses_a_zero_weight_for_it(arm):
    with pytest.raises(ConfigError, match="must learn to write its rationale"):
        layout_of(arm, loss={"rationale_weight": 0})
