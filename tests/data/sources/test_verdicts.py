"""A row that says of its own reply that it is wrong or cut off gives no gold answer; settings are no reasoning."""

from __future__ import annotations

import pytest

from pst_dist.data.sources.choices import Convention
from pst_dist.data.sources.column_guess import choose_columns, guess_columns
from pst_dist.data.sources.drafts import make_draft
from pst_dist.data.sources.rows import RawRow, RowError
from pst_dist.data.tasks import get_task

ASK = {"role": "user", "content": "2+2?"}
REPLY = {"role": "assistant", "content": "I add. The answer is 4."}
REPLIED = {"prompt": "2+2?", "completion": "I add. The answer is 4."}


@pytest.mark.parametrize(
    ("row", "flag"),
    [
        (REPLIED, {"label": False}),
        ({"prompt": [ASK], "completion": [REPLY]}, {"label": False}),
        ({"messages": [ASK, REPLY]}, {"is_correct": False}),
        ({"question": "2+2?", "response": "The answer is 4."}, {"is_correct": "False"}),
        ({"instruction": "2+2?", "output": "The answer is 4."}, {"passed": False}),
        ({"question": "2+2?", "output": "4"}, {"Correct": "wrong"}),
        ({"question": "2+2?", "output": "4"}, {"reward": 0.0}),
        ({"messages": [ASK, REPLY]}, {"accuracy_reward": -1}),
        ({"text": "Is it wet?", "label": "wet"}, {"answer": "reject"}),
    ],
)
def test_a_reply_that_the_row_calls_wrong_is_no_gold_answer(row, flag):
    (column,) = flag
    columns = guess_columns([row | flag], "f")
    with pytest.raises(RowError, match=rf"^{column} is"):
        columns.fields(row | flag)
    for right in ("accept",) if column == "answer" else (True, None):
        assert str(columns.fields(row | {column: right}).answer) in ("4", "wet")


@pytest.mark.parametrize(
    "flag", [{"verified": False}, {"accepted": False}, {"correctness": 0}, {"label": 0}, {"reward": 0.2}]
)
def test_a_reply_that_nobody_judged_may_be_right(flag):
    assert guess_columns([REPLIED | flag], "f").fields(REPLIED | flag).answer == "4"


def test_a_map_in_a_config_does_not_make_a_wrong_reply_right():
    row = {"q": "2+2?", "output": "5", "is_correct": False}
    columns = choose_columns({"question": "q", "answer": "output"}, [row], "f")
    with pytest.raises(RowError, match="is_correct is 'False', so the reply is not the gold answer"):
        columns.fields(row)


def test_a_gold_answer_beside_a_wrong_reply_is_kept():
    row = {"question": "2+2?", "answer": "4", "response": "I add 3. So the answer is 5.", "is_correct": False}
    found = guess_columns([row], "f").fields(row)
    assert (found.answer, found.teacher_answer) == ("4", "5")
    assert found.known_wrong.startswith("is_correct is 'False', so the rationale is wrong")
    rewarded = {"question": "2+2?", "answer": "4", "reasoning": "I add.", "reward": 0.2}
    assert guess_columns([rewarded], "f").fields(rewarded).rationales == ("I add.",)
    label = {"question": "Is it hot?", "label": False, "explanation": "It is ice."}
    assert guess_columns([label], "f").fields(label).answer is False


@pytest.mark.parametrize(
    "flag",
    [
        {"is_correct": False},
        {"correctness": "incorrect"},
        {"reward": 0},
        {"reward": "0.0"},
        {"solution_is_valid": "Incomplete"},
        {"passed": "no", "correct": 0},
    ],
)
def test_a_rationale_that_the_row_calls_wrong_is_marked(flag):
    row = {"question": "2+2?", "answer": "4", "rationale": "I add 2 and 3."}
    columns = guess_columns([row | flag], "f")
    if "passed" in flag:  # neither word is a verdict
        assert columns.fields(row | flag).rationales == ("I add 2 and 3.",)
        return
    found = columns.fields(row | flag)
    assert (found.rationales, found.known_wrong[:4]) == (("I add 2 and 3.",), f"{next(iter(flag))} is"[:4])
    assert "so the rationale is wrong; leave the row out" in found.known_wrong
    assert not columns.fields(row | dict.fromkeys(flag, True)).known_wrong


def draft(row: dict, wrong: str):
    told = (get_task(None, "text"), "rows", 0, None, Convention())
    return make_draft(RawRow(row, "rows.jsonl", 1, "rows.jsonl:1"), guess_columns([row], "f"), *told, wrong=wrong)


def test_a_wrong_rationale_is_refused_in_training_and_left_out_elsewhere():
    row = {"question": "2+2?", "answer": "4", "rationale": "I add 2 and 3.", "is_correct": False}
    refused = draft(row, "refuse")
    assert (refused.code, refused.line) == ("rationale", 1)
    assert draft(row, "drop").code == "rationale", "it has no answer with which data.keep could judge"
    ignored = draft(row, "ignore")
    assert (ignored.sample.answer, ignored.sample.rationales) == ("4", ())
    replied = {"question": "2+2?", "answer": "4", "response": "I add 2 and 3. The answer is 4.", "is_correct": False}
    assert "or set data.keep=teacher_correct" in draft(replied, "refuse").what
    assert draft(replied, "drop").teacher_correct is False


def test_a_rationale_with_an_answer_of_its_own_is_left_to_keep():
    row = {"question": "2+2?", "answer": "4", "rationale": "I add 2 and 3.", "teacher_answer": "5", "is_correct": False}
    names = ("question", "answer", "rationale", "teacher_answer")
    found = choose_columns(dict(zip(names, names, strict=True)), [row], "f").fields(row)
    assert (found.teacher_answer, found.rationales) == ("5", ("I add 2 and 3.",))


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "max_length"])
def test_a_reply_that_ended_for_its_length_is_cut_off(reason):
    row = {"prompt": "9+2?", "response": "First the answer is 10 and", "finish_reason": "stop"}
    columns = guess_columns([row], "f")
    assert columns.fields(row).answer == "10 and"
    with pytest.raises(RowError, match="the reply is cut off") as caught:
        columns.fields({**row, "finish_reason": reason})
    assert caught.value.code == "cut"


def test_a_turn_that_ended_for_its_length_is_cut_off():
    row = {"messages": [ASK, {**REPLY, "finish_reason": "length"}]}
    with pytest.raises(RowError, match=r"messages\[1\] is cut off"):
        guess_columns([row], "f").fields(row)


def test_a_generation_that_ended_for_its_length_is_skipped():
    row = {"problem": "2+2?", "answer": "4", "generations": ["I add.", "I ad"], "finish_reasons": ["stop", "length"]}
    assert guess_columns([row], "f").fields(row).rationales == ("I add.",)


@pytest.mark.parametrize("setting", ["on", "off", "high", "Enabled"])
def test_a_setting_of_the_model_is_no_rationale(setting):
    rows = [
        {"question": "2+2?", "answer": "4", "reasoning": setting, "solution": "I add."},
        {"messages": [ASK, {"role": "assistant", "content": "<think>I add.</think>4"}], "reasoning": setting},
        {"messages": [ASK, {**REPLY, "thinking": setting}]},
        {**REPLIED, "thinking": setting},
        {"input": "2+2?", "output": "<think>I add.</think>4", "reasoning": setting},
    ]
    for row in rows:
        assert guess_columns([row], "f").fields(row).rationales == ("I add.",)


@pytest.mark.parametrize(
    "verdicts",
    [
        {"correctness": [True, False, None]},
        {"is_correct": ["Yes", "no", ""]},
        {"correct": [True, False, None], "correctness_llama": [False, False, None]},
    ],
)
@pytest.mark.parametrize("column", ["generations", "rationales"])
def test_of_several_rationales_those_that_are_called_wrong_are_left_out(column, verdicts):
    row = {"problem": "2+2?", "answer": "4", column: ["I add.", "It is 5.", "Two more."], **verdicts}
    assert guess_columns([row], "f").fields(row).rationales == ("I add.", "Two more.")


def test_a_list_of_flags_is_no_list_of_answers():
    row = {"question": "Which?", "choices": ["a cat", "a dog"], "label": [0, 1]}
    with pytest.raises(RowError, match=r"answer is a list of 2, expected one answer$"):
        guess_columns([row], "f").fields(row)
