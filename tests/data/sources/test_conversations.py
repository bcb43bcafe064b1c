"""What a question depends on is written into it, and what text cannot hold is refused by name."""

from __future__ import annotations

import json

import pytest

from pst_dist.config.schema import Config
from pst_dist.data.sources import survey
from pst_dist.data.sources.column_guess import as_yaml, choose_columns, guess_columns
from pst_dist.data.sources.columns import field_map
from pst_dist.data.sources.rows import RowError

USER = {"role": "user", "content": "And twice that?"}
REPLY = {"role": "assistant", "content": "<think>Twice 3.</think>6"}
KEPT = "You count.\n\nUser: What is 3?\nAssistant: 3\nUser: And twice that?"
THOUGHTFUL = "<think>Three is 3.\n</think>\n\n3"
EARLIER = [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "You count."}, *EARLIER, USER, REPLY]},
        {"messages": [{"role": "developer", "content": "You count."}, *EARLIER, USER, REPLY]},
        {"system": "You count.", "messages": [*EARLIER, USER, REPLY]},
        {"system": "You count.", "messages": [EARLIER[0], {**EARLIER[1], "content": THOUGHTFUL}, USER, REPLY]},
        {"system": "You count.", "history": [["What is 3?", THOUGHTFUL]], "messages": [USER, REPLY]},
        {"system": "You count.", "history": [["What is 3?", "3"]], "messages": [USER, REPLY]},
        {
            "instruction": "And twice that?",
            "input": "",
            "output": "Twice 3. The answer is 6.",
            "system": "You count.",
            "history": [["What is 3?", "3"]],
        },
        {
            "query": "And twice that?",
            "response": "<think>Twice 3.</think>6",
            "history": EARLIER,
            "system_prompt": "You count.",
        },
        {"prompt": [{"role": "system", "content": "You count."}, *EARLIER, USER], "completion": [REPLY]},
        {
            "system": "You count.",
            "conversations": [
                {"from": "human", "value": "What is 3?"},
                {"from": "gpt", "value": "3"},
                {"from": "human", "value": "And twice that?"},
                {"from": "gpt", "value": "<think>Twice 3.</think>6"},
            ],
        },
    ],
)
def test_system_text_and_earlier_turns_are_written_into_the_question(row):
    found = guess_columns([row], "f").fields(row)
    assert (found.question, found.answer, found.rationales) == (KEPT, "6", ("Twice 3.",))
    asked = (("user", "What is 3?"), ("assistant", "3"), ("user", "And twice that?"))
    assert found.turns == (("system", "You count."), *asked)


@pytest.mark.parametrize(
    ("text", "code", "what"),
    [
        ("<think>Three", "cut", "a thought is cut off"),
        ("<think>Three</think>", "context", "an earlier assistant turn has a thought and no reply after it"),
    ],
)
def test_an_earlier_thought_without_its_reply_is_a_bad_row(text, code, what):
    row = {"messages": [EARLIER[0], {"role": "assistant", "content": text}, USER, REPLY]}
    with pytest.raises(RowError, match=what) as caught:
        guess_columns([row], "f").fields(row)
    assert caught.value.code == code


def test_system_text_alone_precedes_the_question_without_roles():
    row = {"system": "Answer in dozens.", "messages": [USER, REPLY], "history": [], "tools": "[]", "images": None}
    found = guess_columns([row], "f").fields(row)
    assert found.question == "Answer in dozens.\n\nAnd twice that?"
    assert found.turns == (("system", "Answer in dozens."), ("user", "And twice that?"))
    assert guess_columns([row], "f").fields({"messages": [USER, REPLY]}).turns == ()


@pytest.mark.parametrize(
    ("row", "code", "what"),
    [
        ({"messages": [USER, {"role": "tool", "content": "6"}, REPLY]}, "context", "messages[1] is a tool turn"),
        ({"messages": [USER, {"role": "critic", "content": "6"}, REPLY]}, "role", "unknown role 'critic'"),
        ({"messages": [USER, REPLY, {"role": "system", "content": "x"}]}, "context", "a system turn after"),
        ({"messages": [USER, REPLY, USER]}, "type", "2 user and 1 assistant turns"),
        ({"messages": [USER, {**REPLY, "tool_calls": [{"id": 1}]}]}, "context", "messages[1] has tool_calls"),
        ({"messages": [USER, REPLY], "images": ["a.png"]}, "context", "images is not empty"),
        ({"messages": [USER, REPLY], "tools": [{"name": "calc"}]}, "context", "tools is not empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, REPLY]},
            "context",
            "messages[0] has a part of type 'image_url'",
        ),
        ({"messages": [USER, REPLY], "history": "earlier"}, "context", "history is neither question-reply pairs"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "context", "observation turn"),
    ],
)
def test_what_a_text_prompt_cannot_hold_is_refused_by_name(row, code, what):
    with pytest.raises(RowError) as caught:
        guess_columns([row], "f").fields(row)
    assert caught.value.code == code
    assert what in caught.value.what


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"Passage": "It rains.", "Question": "Where?", "Answer": "here"}, "It rains.\n\nWhere?"),
        ({"question": "Where?", "Context": "It rains.", "response": "The answer is here."}, "It rains.\n\nWhere?"),
        ({"question": "Where?", "context": "It rains.", "answer": "x\n#### 3"}, "It rains.\n\nWhere?"),
        ({"instruction": "Add up.", "input": "2 and 3", "answer": "5"}, "Add up.\n2 and 3"),
        ({"instruction": "Add up.", "input": "2 and 3", "response": "The answer is 5."}, "Add up.\n2 and 3"),
        ({"instruction": "Say x.", "input": "", "answer": "x"}, "Say x."),
        ({"question": "Where is it?", "text": "Q: Where is it? A: here", "answer": "here"}, "Where is it?"),
        ({"question": "Where is it?", "prompt": "zero_shot", "answer": "here"}, "Where is it?"),
        ({"question": "Where is it?", "document": 17, "answer": "here"}, "Where is it?"),
    ],
)
def test_what_a_question_depends_on_is_read_in_every_layout(row, question):
    assert guess_columns([row], "f").fields(row).question == question


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"Hint": "Look at the map.", "question": "Who?", "answer": "me"}, "Hint"),
        ({"text": "It rains in Spain.", "question": "Where?", "answer": "there"}, "text"),
        ({"premise": "A man is asleep.", "question": "Is he up?", "answer": "no"}, "premise"),
        ({"Context": ["It rains."], "question": "Where?", "response": "The answer is here."}, "Context"),
    ],
)
def test_a_column_that_the_question_may_depend_on_is_not_left_out(row, column):
    columns = guess_columns([row, {"question": "Who?", **{name: row[name] for name in row if name != column}}], "f")
    with pytest.raises(RowError, match=f"column '{column}' (would not be read|is not empty)"):
        columns.fields(row)


def test_guessed_columns_put_a_passage_before_the_question_and_never_leave_one_out(tmp_path):
    rows = [{"context": f"There are {n}.", "question": "How many?", "answer": str(n), "rationale": "r"} for n in (3, 4)]
    columns = guess_columns(rows, "f")
    assert columns.fields(rows[0]).question == "There are 3.\n\nHow many?"
    assert as_yaml(columns).splitlines()[1] == '  question: "{context}\\n\\n{question}"'
    some = [*rows, {"question": "Who?", "answer": "me", "rationale": "r"}]
    late = [*some[2:] * 50, *rows]  # a column that the rows which are looked at do not have
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in late))
    data = {"root": str(tmp_path), "train": "rows.jsonl", "validation_size": 0}
    loaded = survey(Config.model_validate({"data": data}))
    assert [sample.question for sample in loaded.splits["train"]] == ["Who?"]
    assert "column 'context' would not be read" in loaded.rejects[0].what
    named = {"question": "question", "answer": "answer", "rationale": "rationale"}
    loaded = survey(Config.model_validate({"data": {**data, "columns": named, "duplicates": "keep"}}))
    assert not loaded.rejects  # columns named by the user are taken as seen


@pytest.mark.parametrize("blank", [{}, {"context": None}, {"context": ""}, {"context": " \n"}])
def test_a_passage_that_only_some_rows_have_is_read_where_it_is(blank):
    rows = [
        {"instruction": "How many?", "context": "There are 3.", "response": "3", "system": "You count."},
        {"instruction": "Who?", "response": "me", "system": "You count.", **blank},
    ]
    columns = guess_columns(rows, "f")
    assert [columns.fields(row).question for row in rows] == [
        "There are 3.\n\nYou count.\n\nHow many?",
        "You count.\n\nWho?",
    ]


def test_only_a_place_with_a_question_mark_may_be_blank():
    columns = field_map({"question": "{passage?}\n\n{which?} {query}", "answer": "a"})
    assert columns.fields({"query": "Who?", "a": "me", "which?": "x"}).question == "x Who?"
    with pytest.raises(RowError, match="question is missing"):
        columns.fields({"passage": "It rains.", "a": "me"})
    with pytest.raises(RowError, match="question is missing"):
        columns.fields({"passage": ["It rains."], "query": "Who?", "a": "me"})


ASKED = [{"role": "system", "content": "You count."}, *EARLIER, USER]
TURNS = (("system", "You count."), ("user", "What is 3?"), ("assistant", "3"), ("user", "And twice that?"))


@pytest.mark.parametrize(
    "row",
    [
        {"question": ASKED, "answer": "6"},
        {"prompt": ASKED, "ground_truth": 6, "rationale": "Twice 3."},
        {"prompt": ASKED, "response": "Twice 3. The answer is 6."},
        {"question": KEPT, "turns": ASKED, "answer": "6"},
        {"question": "And twice that?", "turns": ASKED, "answer": "6"},
    ],
)
def test_a_question_may_be_a_list_of_turns_or_have_them_beside_it(row):
    found = guess_columns([row], "f").fields(row)
    assert (found.question, found.turns, str(found.answer)) == (KEPT, TURNS, "6")


def test_turns_beside_a_question_are_read_where_a_row_has_them_and_must_end_with_it():
    plain = {"question": "What is 3?", "answer": "3", "turns": None}
    columns = guess_columns([plain], "f")
    assert columns.fields(plain).turns == ()
    assert columns.fields({"question": KEPT, "turns": ASKED, "answer": "6"}).turns == TURNS
    with pytest.raises(RowError, match="turns end with another question"):
        columns.fields({"question": "And thrice that?", "turns": ASKED, "answer": "9"})
    for other in (3, ["What is 3?", "And twice that?"], "[]"):  # the columns of other files
        row = {"question": "What is 3?", "answer": "3", "turns": other}
        assert guess_columns([row], "f").fields(row).turns == ()
    one = {"question": [{"role": "user", "content": "What is 3?"}], "answer": "3"}
    found = guess_columns([one], "f").fields(one)
    assert (found.question, found.turns) == ("What is 3?", ())


def test_choices_are_listed_in_the_last_turn():
    row = {"question": [*EARLIER, {"role": "user", "content": "Which?"}], "choices": ["a cat", "a dog"], "answer": "B"}
    found = guess_columns([row], "f").fields(row)
    assert found.question == "User: What is 3?\nAssistant: 3\nUser: Which? Answer choices: (A) a cat, (B) a dog."
    assert found.turns[-1] == ("user", "Which? Answer choices: (A) a cat, (B) a dog.")


def test_a_context_column_beside_a_list_of_turns_is_not_left_out():
    row = {"question": ASKED, "answer": "6", "passage": "On Monday."}
    with pytest.raises(RowError, match="column 'passage' would not be read"):
        guess_columns([row], "f").fields(row)


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"body": "There are 3.", "question": "How many?", "answer": "3"}, "There are 3.\n\nHow many?"),
        ({"Narrative": "It rains.", "question": "Where?", "answer": "here"}, "It rains.\n\nWhere?"),
        ({"theory": "Bob is big.", "question": "Bob is big.", "answer": True}, "Bob is big.\n\nBob is big."),
        ({"puzzle": "Two houses.", "question": "Whose?", "response": "The answer is Al."}, "Two houses.\n\nWhose?"),
        ({"prompt": "Q: Where is it?\nA:", "question": "Where is it?", "answer": "here"}, "Where is it?"),
        ({"documents": ["Where is it?"], "question": "Where is it?", "answer": "here"}, "Where is it?"),
    ],
)
def test_other_names_of_passages_are_read_too(row, question):
    assert guess_columns([row], "f").fields(row).question == question


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "How many?", "table": [["year", "pens"], ["2019", "4"]], "answer": "4"}, "table"),
        ({"question": "How many?", "table": {"pens": [4, 5]}, "answer": "4"}, "table"),
        ({"question": "How many?", "pre_text": ["There are 4."], "answer": "4"}, "pre_text"),
        ({"question": "Who runs?", "contexts": ["Al runs.", "Bo sits."], "response": "The answer is Al."}, "contexts"),
        ({"code": "def f(x): return x + 1", "input": "f(3)", "output": "4"}, "code"),
        ({"Definition": ["Say the opposite."], "inputs": "hot", "targets": "cold"}, "Definition"),
        ({"question": "What is this?", "image_path": "a.png", "answer": "4"}, "image_path"),
        ({"question": "Max is a cat.", "query": "Is Max an animal?", "answer": "yes"}, "query"),
    ],
)
def test_lists_and_tables_that_a_question_may_depend_on_are_not_left_out(row, column):
    with pytest.raises(RowError, match=f"column '{column}' (would not be read|is not empty)"):
        guess_columns([row], "f").fields(row)


def test_a_turn_that_no_model_should_learn_is_no_gold_answer():
    turns = [{**turn, "weight": 0} for turn in EARLIER]
    row = {"messages": [*turns, USER, {**REPLY, "weight": 1}]}
    assert guess_columns([row], "f").fields(row).turns
    for mark in ({"weight": 0}, {"train": False}):
        row["messages"][-1] = {**REPLY, **mark}
        with pytest.raises(RowError, match="no model should learn"):
            guess_columns([row], "f").fields(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED, "ground_truth": "6", "reasoning": "Twice 3."},
        {"conversations": ASKED, "answer": 6, "explanation": "Twice 3."},
        {"system_prompt": "You count.", "input": ASKED[1:], "output": "Twice 3. The answer is 6."},
        {"system": "You count.", "prompt": ASKED[1:], "answer": "6", "rationale": "Twice 3."},
    ],
)
def test_turns_that_end_with_a_question_have_their_answer_in_another_column(row):
    columns = guess_columns([row], "f")
    for found in (columns.fields(row), choose_columns(columns.paths, [row], "f").fields(row)):
        assert (found.question, found.turns, str(found.answer)) == (KEPT, TURNS, "6")
        assert found.rationales == ("Twice 3.",)


def test_a_template_may_end_with_turns_and_then_has_their_system_text():
    columns = field_map({"question": "{system?}\n\n{passage}\n\n{prompt}", "answer": "answer"})
    row = {"passage": "You count.", "prompt": ASKED[1:], "answer": "6"}
    assert columns.fields(row).turns == TURNS
    with pytest.raises(RowError, match="question is missing"):
        columns.fields({**row, "passage": None})


def test_conversations_without_any_reply_or_answer_are_refused_as_such():
    row = {"messages": ASKED}
    with pytest.raises(RowError, match="expected a question and its reply at the end"):
        guess_columns([row], "f").fields(row)


def test_the_turns_of_gemini_are_read():
    row = {
        "systemInstruction": {"role": "system", "parts": [{"text": "You count."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "What is 3?"}]},
            {"role": "model", "parts": [{"text": "3"}]},
            {"role": "user", "parts": [{"text": "And twice that?"}]},
            {"role": "model", "parts": [{"text": "Twice 3.", "thought": True}, {"text": "The answer is 6."}]},
        ],
    }
    found = guess_columns([row], "f").fields(row)
    assert (found.turns, found.rationales, found.answer) == (TURNS, ("Twice 3.",), "6")
    row["contents"][1]["parts"].append({"functionCall": {"name": "f"}})
    with pytest.raises(RowError, match="has a part of type"):
        guess_columns([row], "f").fields(row)


def test_a_passage_beside_a_conversation_is_not_left_out():
    row = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Answer: here"}]}
    assert guess_columns([row], "f").fields({**row, "context": "Where?"}).answer == "here"
    with pytest.raises(RowError, match="column 'context' would not be read"):
        guess_columns([row], "f").fields({**row, "context": ["It rains here."]})


def test_a_question_about_a_picture_is_refused():
    for question in ("<image>\nWhat is this?", "What is this? <image>"):
        row = {"question": question, "answer": "4"}
        with pytest.raises(RowError, match="question has <image>"):
            guess_columns([row], "f").fields(row)
    row = {"question": "What does <image> mean in SVG?", "answer": "4"}
    assert guess_columns([row], "f").fields(row).question == row["question"]
