"""Column maps: paths and templates, fields, and what the error for a missing column proposes."""

from __future__ import annotations

import re

import pytest

from pst_dist.data.sources.column_guess import READY_MADE, choose_columns
from pst_dist.data.sources.columns import field_map
from pst_dist.data.sources.paths import look_up
from pst_dist.data.sources.replies import split_reply
from pst_dist.data.sources.rows import RowError
from pst_dist.errors import ConfigError, DataError

ROW = {"a": {"b": [{"c": "deep"}, "second"]}, "n": 7, "x.y": "dotted", "t": True, "s": "text"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.b[0].c", "deep"),
        ("a.b[-1]", "second"),
        ("a.b[2]", None),
        ("a.c.d", None),
        ("s[0]", None),
        ("x.y", "dotted"),
        ("{s} and {n}: {a.b[1]}", "text and 7: second"),
        ("{s} {missing}", None),
        ("{t}", None),
    ],
)
def test_paths_and_templates_find_values(path, expected):
    assert look_up(ROW, path) == expected


def test_a_field_map_gives_fields():
    columns = field_map(
        {"question": "{ctx} {q}", "answer": "meta.gold", "rationales": "cots", "choices": "opts", "id": "n"}
    )
    row = {"ctx": "C.", "q": "Q?", "meta": {"gold": 5}, "cots": ["one", " ", "two", "one"], "opts": ["x", "y"], "n": 3}
    found = columns.fields(row)
    assert found.question == "C. Q? Answer choices: (A) x, (B) y."
    assert (found.answer, found.rationales, found.options.texts, found.id) == (5, ("one", "two"), ("x", "y"), "3")


@pytest.mark.parametrize(
    ("row", "code", "what"),
    [
        ({"answer": "a"}, "missing", "question is missing"),
        ({"question": None, "answer": "a"}, "missing", "question is missing"),
        ({"question": 3, "answer": "a"}, "type", "question is a number, expected text"),
        ({"question": ["q"], "answer": "a"}, "type", "question is a list, expected text"),
        ({"question": "  ", "answer": "a"}, "empty", "question is empty"),
        ({"question": "q\x00", "answer": "a"}, "nul", "question contains a NUL"),
        ({"question": "q", "answer": ""}, "empty", "answer is empty"),
        ({"question": "q", "answer": float("nan")}, "missing", "answer is missing"),
        ({"question": "q", "answer": {"x": 1}}, "type", "answer is an object, expected text"),
        ({"question": "q", "answer": "a", "rationale": 4}, "type", "rationale is a number, expected text"),
        (
            {"question": "q", "answer": "a", "rationale": ["x", 4]},
            "type",
            "rationale is a list of 2: select a part of it",
        ),
    ],
)
def test_a_row_that_lacks_a_field_says_which_and_what_it_found(row, code, what):
    columns = field_map({"question": "question", "answer": "answer", "rationale": "rationale"})
    with pytest.raises(RowError) as caught:
        columns.fields(row)
    assert caught.value.code == code
    assert what in caught.value.what


def test_a_map_with_an_unknown_field_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'rationale'"):
        field_map({"question": "q", "answer": "a", "rational": "r"})
    with pytest.raises(ConfigError, match="no answer"):
        field_map({"question": "q"})


@pytest.mark.parametrize(
    ("reply", "rationale", "answer"),
    [
        ("<think>\nI add.\n</think>\n42", "I add.", "42"),
        ("I add.</think> The answer is 42.", "I add.", "42"),
        ("2 + 2 = 4\n#### 4", "2 + 2 = 4", "4"),
        ("Add them.\n\n-->\n\n39 END", "Add them.", "39"),
        ("They have 3. Therefore, the answer is 3.", "They have 3.", "3"),
        ("So first. The final answer is: (B)", "So first.", "(B)"),
        ("42", None, "42"),
    ],
)
def test_a_reply_is_cut_at_the_mark_it_has(reply, rationale, answer):
    assert split_reply(reply) == (rationale, answer)


def test_a_conversation_without_a_reply_is_refused():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    with pytest.raises(RowError, match="2 user and 0 assistant turns"):
        READY_MADE["messages"].fields(row)


def test_aqua_in_both_forms_ends_in_the_same_question():
    first = READY_MADE["aqua"].fields(
        {"question": "How many?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "Count.", "correct": "B"}
    )
    second = READY_MADE["aqua_human"].fields(
        {
            "instruction": "How many? Answer Choices: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5",
            "output": "Let's think about the multi-choice question. Count. The answer is option B",
        }
    )
    assert first.question == second.question == "How many? Answer choices: (A) 1, (B) 2, (C) 3, (D) 4, (E) 5."
    assert first.rationales == second.rationales == ("Count.",)
    assert first.answer == second.answer == "B"


@pytest.mark.parametrize(
    ("ending", "letter"),
    [
        ("x = 2. Answer C", "C"),
        ("x = 2. Hence The answer is 30. i.e D", "D"),
        ("x = 2. The answer is 30", "C"),
        ("x = 2. Choice E is correct.", "E"),
    ],
)
def test_human_endings_are_read_by_letter_or_by_the_text_of_a_choice(ending, letter):
    row = {"instruction": "q Answer Choices: (A) 10 (B) 20 (C) 30 (D) 40 (E) 50", "output": ending}
    found = READY_MADE["aqua_human"].fields(row)
    assert (found.answer, found.rationales) == (letter, ("x = 2.",))


def test_an_ending_without_answer_is_refused():
    row = {"instruction": "q Answer Choices: (A) 10 (B) 20 (C) 30 (D) 40 (E) 50", "output": "Hence x is 7."}
    with pytest.raises(RowError, match="does not end in an answer"):
        READY_MADE["aqua_human"].fields(row)


def test_rows_to_be_scored_may_lack_the_rationale_column():
    columns = choose_columns(
        {"question": "q", "answer": "a", "rationale": "why"}, [{"q": "x", "a": "y"}], "test.jsonl", "test"
    )
    assert columns.fields({"q": "x", "a": "y"}).rationales == ()


def test_several_ready_made_maps_are_tried_in_turn():
    row = {"question": "2+2?", "answer": "I add.\n#### 4"}
    assert choose_columns("aqua, gsm8k", [row], "f").name == "gsm8k"
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        choose_columns("alpacca", [row], "f")


@pytest.mark.parametrize(
    ("setting", "answer", "rationales"),
    [
        ({"answer": "answers[0]"}, "4", ("I add.",)),
        ({"answer": "answers[1]", "rationale": "notes"}, "four", ("Two more.",)),
        ({"answer": "answers[0]", "rationales": "explanation, notes"}, "4", ("I add.", "Two more.")),
        ({"question": "{context} {question}", "rationale": "notes", "answer": "answers[-1]"}, "four", ("Two more.",)),
    ],
)
def test_a_map_without_question_or_answer_is_completed_by_a_guess(setting, answer, rationales):
    row = {"context": "Al asks.", "question": "2+2?", "answers": ["4", "four"], "explanation": "I add."}
    row["notes"] = "Two more."
    found = choose_columns(setting, [row], "f").fields(row)
    assert (found.answer, found.rationales) == (answer, rationales)
    assert found.question.split() == "Al asks. 2+2?".split()


def test_a_column_that_a_map_names_is_not_guessed_for_another_field():
    row = {"question": "2+2?", "solution": "4", "response": "<think>I add.</think>\nFirst.\nThen."}
    columns = choose_columns({"answer": "solution"}, [row], "f")
    assert columns.paths == {"question": "question", "answer": "solution"}


def test_a_completed_map_leaves_no_context_out_and_takes_no_options_from_an_index():
    row = {"question": "2+2?", "hint": "Count your fingers.", "answers": ["4", "four"]}
    columns = choose_columns({"answer": "answers[0]"}, [row], "f")
    with pytest.raises(RowError, match="column 'hint' would not be read"):
        columns.fields(row)
    row = {"question": "Which?", "options": ["a cat", "a dog"], "cop": 1}
    found = choose_columns({"answer_from_1": "cop"}, [row], "f").fields(row)
    assert (found.answer, found.counts_from, found.options.texts) == (1, 1, ("a cat", "a dog"))
    with pytest.raises(ConfigError, match="no answer"):
        choose_columns({"question": "q"}, [{"q": "2+2?", "why": "I add."}], "f")


@pytest.mark.parametrize(
    ("answer", "scale", "refused"),
    [
        (3.2, {"scale": "million"}, True),
        ("3.2", {"answer_scale": "thousand"}, True),
        ("$5", {"Unit": "billion"}, True),
        (3.2, {"scale": ""}, False),
        (3.2, {"scale": None}, False),
        (3.2, {"scale": "percent"}, False),
        (12, {"unit": "kg"}, False),
        ("Paris", {"scale": "million"}, False),
        (3, {"scale": "large"}, False),
        (3, {"source": "million"}, False),
    ],
)
def test_a_scale_in_another_column_is_not_lost(answer, scale, refused):
    """TAT-QA's rows: an answer of 3.2 and a scale of million are 3.2 million."""
    row = {"question": "How much was it?", "answer": answer} | scale
    columns = choose_columns(None, [row], "f")
    if not refused:
        assert columns.fields(row).answer == answer
        return
    (name,) = scale
    remedy = f"set data.columns.answer='{{answer}} {{{name}?}}', or '{{answer}}' to leave it out"
    with pytest.raises(RowError, match=re.escape(remedy)):
        columns.fields(row)
    both = choose_columns({"answer": f"{{answer}} {{{name}?}}"}, [row], "f").fields(row)
    assert both.answer == f"{answer} {scale[name]}"
    assert choose_columns({"answer": "{answer}"}, [row], "f").fields(row).answer == str(answer)


def test_every_column_in_a_list_of_rationales_must_exist():
    row = {"question": "2+2?", "answer": "4", "a": "I add.", "b": "I count."}
    with pytest.raises(DataError, match="no column 'a, c' for rationales"):
        choose_columns({"question": "question", "answer": "answer", "rationales": "a, c"}, [row], "f")
