"""Rows laid out as public datasets have them: each is read right, or refused with the reason.

Datasets are named for their layout; the texts are made up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.data.sources import load_data
from pst_dist.data.sources.column_guess import choose_columns, guess_columns
from pst_dist.data.sources.rows import RowError
from pst_dist.errors import ConfigError, DataError

PASSAGES = ["Rain falls on the hills.", "Then the river is high."]
MEDQA = {"question": "How many?", "options": {"A": "1", "B": "2", "C": "3", "D": "4"}, "answer": "3", "answer_idx": "C"}
CREAK = {"sentence": "Cats can fly.", "entity": "Cats", "explanation": "Cats have no wings.", "label": "false"}
MATHQA = {"Problem": "how many ?", "options": "['a ) rs . 400', 'b ) rs . 300']", "correct": "b", "Rationale": "half ."}
DEEPMATH = {
    "question": "2+2?",
    "final_answer": "4",
    "r1_solution_1": "Add. \\boxed{4}",
    "r1_solution_2": "Count. \\boxed{4}",
}
EMPTY_LABELS = {"contexts": PASSAGES, "labels": ["BACKGROUND", "RESULTS"], "meshes": ["Rivers and lakes and seas"]}
HOTPOT = {"title": ["A title of some length", "B"], "sentences": [["Al runs."], ["Bo sits.", "Bo sleeps."]]}
MUSIQUE = [{"idx": k, "title": "A title of some length", "paragraph_text": text} for k, text in enumerate(PASSAGES)]


@pytest.mark.parametrize(
    ("row", "question", "answer", "rationales"),
    [
        ({"premise": "A man runs.", "hypothesis": "He sits.", "label": "no"}, "A man runs.\n\nHe sits.", "no", ()),
        (  # ANLI
            {"premise": "A man runs.", "hypothesis": "He sits.", "label": "no", "reason": "He runs."},
            *("A man runs.\n\nHe sits.", "no", ("He runs.",)),
        ),
        (  # FOLIO
            {"premises": ["All cats purr.", "Tom is a cat."], "conclusion": "Tom purrs.", "label": "True"},
            *("All cats purr.\nTom is a cat.\n\nTom purrs.", "True", ()),
        ),
        (CREAK, "Cats can fly.", "false", ("Cats have no wings.",)),
        (  # PubMedQA
            {"question": "Is it high?", "context": EMPTY_LABELS, "final_decision": "yes"},
            *("Rain falls on the hills.\nThen the river is high.\n\nIs it high?", "yes", ()),
        ),
        (  # HotpotQA
            {"question": "Who sits?", "context": HOTPOT, "answer": "Bo"},
            *("Al runs.\nBo sits.\nBo sleeps.\n\nWho sits?", "Bo", ()),
        ),
        (MEDQA, "How many? Answer choices: (A) 1, (B) 2, (C) 3, (D) 4.", "C", ()),
        (MATHQA, "how many ? Answer choices: (A) rs . 400, (B) rs . 300.", "b", ("half .",)),
        (DEEPMATH, "2+2?", "4", ("Add. \\boxed{4}", "Count. \\boxed{4}")),
        (  # CoS-E
            {"question": "Who?", "choices": ["Al", "Bo"], "answer": "Bo", "abstractive_explanation": "Al is out."},
            *("Who? Answer choices: (A) Al, (B) Bo.", "B", ("Al is out.",)),
        ),
        (  # MegaScience
            {"question": "What force?", "answer": "Twice 3.5.\n\\boxed{7}", "reference_answer": "6 N"},
            *("What force?", "6 N", ("Twice 3.5.",)),
        ),
        (  # OpenThoughts, metadata
            {"problem": "6*7?", "deepseek_reasoning": "Six.", "ground_truth_solution": "It is \\boxed{42}."},
            *("6*7?", "42", ("Six.",)),
        ),
        (  # Alpaca's prompt made of the other columns
            {"instruction": "Add.", "input": "2 and 2", "output": "The answer is 4.", "text": "Add. # 2 and 2 # 4"},
            *("Add.\n2 and 2", "4", ()),
        ),
        (  # DAPO-Math-17k-Processed: the solution is the answer
            {"prompt": "5+1?", "solution": "6", "reward_model": {"ground_truth": "6"}},
            *("5+1?", "6", ()),
        ),
        (  # AM-DeepSeek-R1-Distilled: the reply is in a tag
            {"messages": [{"role": "user", "content": "8*8?"}, {"role": "assistant", "content": "<think>64.</think>\n"
             "<answer>Eight eights.\n\n\\boxed{64}</answer>"}]},
            *("8*8?", "64", ("64.\n\nEight eights.",)),
        ),
        ({"Body": "Al has 3.", "Question": "Al has 3. How many?", "Answer": "3"}, "Al has 3. How many?", "3", ()),
    ],
)  # fmt: skip
def test_public_rows_are_read_right(row, question, answer, rationales):
    found = guess_columns([row], "f").fields(row)
    assert (found.question, found.answer, found.rationales) == (question, answer, rationales)


STEPS = "Al has 16 eggs and eats 3. How many? Step 1: 16 - 3 = 13. {0}\nStep 2: So 13. {0}"
PROSE = "Let us call it x.\n\nx / 10 = 3\n\nx = 30\n\nTherefore, the number is 30."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (  # MAWPS
            {"Question": "Al has N_00 and gets N_01 . How many ?", "Numbers": "8.0 2.0", "Answer": 10.0},
            "question has N_00 in the place of a number, which is in column 'Numbers'",
        ),
        ({"question": "Is it?", "passage": "It is.", "label": -1}, "label is -1, which marks a row without a label"),
        ({"input": STEPS.format("ки"), "label": STEPS.format("+")}, "label repeats the question with marks in it"),
        ({"problem": "Find x.", "answer": "notfound", "question_type": "math"}, "stands for a missing answer"),
        ({"problem": "Prove it.", "answer": "proof", "question_type": "proof"}, "stands for a missing answer"),
        ({"prompt": "Print n.", "reward_model": {"ground_truth": '{"inputs": ["1"]}'}}, "has test cases of a program"),
        ({"question": "A tenth is 3. What is it?", "answer": PROSE}, "no mark separates the answer from the reasoning"),
        (  # ProntoQA of Logic-LM
            {"question": "Is Max sour?", "answer": "yes", "explanation": ["Max is a cat.", "Cats are sour."]},
            "rationale is a list of 2: data.columns.rationales=explanation reads one from each text",
        ),
        ({"question": "What?", "image": {"path": "a.png"}, "answer": "4"}, "a text prompt cannot contain it"),
        ({"question": "2+2?", "response": "The answer is 5.", "score": 0.0}, "so the reply is not the gold answer"),
    ],
)  # fmt: skip
def test_rows_without_a_certain_answer_are_refused(row, said):
    with pytest.raises(RowError) as caught:
        guess_columns([row], "f").fields(row)
    assert said in caught.value.what


def test_what_the_refusals_name_reads_the_rows():
    proof = {"question": "Is Max sour?", "answer": "yes", "explanation": ["Max is a cat.", "Cats are sour."]}
    for setting, rationales in (
        ({"rationale": "explanation[*]"}, ("Max is a cat.\nCats are sour.",)),
        ({"rationales": "explanation"}, ("Max is a cat.", "Cats are sour.")),
    ):
        assert choose_columns(setting, [proof], "f").fields(proof).rationales == rationales
    for row, column in (
        ({"question": "Is it?", "label": -1}, "label"),
        ({"question": "Is it?", "answer": PROSE}, "answer"),
    ):
        found = choose_columns({"answer": f"{{{column}}}"}, [row], "f").fields(row)
        assert str(found.answer) == str(row[column])
    votes = {"question": "2+2?", "response": "The answer is 4.", "score": 0}  # as people voted
    assert guess_columns([votes], "f").fields(votes).answer == "4"


@pytest.mark.parametrize(
    ("row", "path", "text"),
    [
        ({"a": ["x", " y ", None, ""]}, "a[*]", "x\ny"),
        ({"a": "['x', 'y']"}, "a[*]", "x\ny"),
        ({"a": [["x", "y"], ["z"]]}, "a[*][*]", "x\ny\nz"),
        ({"a": [{"b": "x"}, {"b": 2}]}, "a[*].b", "x\n2"),
        ({"a": {"b": ["x"]}}, "{a.b[*]} {a.b[*]}", "x x"),
    ],
)
def test_a_star_joins_the_texts_of_a_list(row, path, text):
    row = {"question": path, "answer": "4"} | row
    assert choose_columns({"question": path, "answer": "answer"}, [row], "f").fields(row).question == text


@pytest.mark.parametrize("broken", [["x", {"b": "y"}], ["x", ["y"]], ["x", True], {"b": "x"}, "x"])
def test_a_list_with_something_else_in_it_is_not_joined_in_part(broken):
    row = {"a": broken, "answer": "4"}
    with pytest.raises(RowError, match="question is missing"):
        choose_columns({"question": "a[*]", "answer": "answer"}, [row, row | {"a": ["x"]}], "f").fields(row)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        # What looks like no answer, and is one.
        (
            {"question": "Which?", "choices": ["So. It is.\nIt was. Yes.", "no"], "answer": "So. It is.\nIt was. Yes."},
            None,
        ),
        ({"question": "Which?", "choices": ['{"inputs": 1}', "{}"], "answer": '{"inputs": 1}'}, None),
        ({"question": "Extract: Tom, 4.", "answer": '{"name": "Tom"}'}, None),
        ({"question": "Invert it.", "answer": "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}"}, None),
        ({"question": "Solve it.", "answer": "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1"}, None),
        (
            {"question": "Fix: he go to the market with his old friend on every day", "rationale": "Third person."}
            | {"answer": "Fix: he goes to the market with his old friend on every day"},
            None,
        ),
        ({"question": "def f(number1, number2): ... f(3, 4)?", "numbers": [3, 4], "answer": "7"}, None),
        ({"question": "2+2?", "answer": "4", "rationale": "Add.", "score": 0.0}, None),
        # An answer beside something that looks like a better one.
        ({"question": "2+2?", "response": "<think>Add</think>The answer is 5.", "correct_answer": True}, "5"),
        ({"question": "Why?", "answer": "\\boxed{7}", "reference_answer": "It is 6 N because mass times"}, "7"),
        ({"question": "How?", "options": {"A": "1", "B": "2"}, "answer": "2", "answer_idx": "A"}, "2"),
        ({"input": "2+2?", "answer": "4", "chosen": True, "rejected": False, "reasoning": "Add."}, "4"),
    ],
)
def test_good_rows_are_not_refused(row, answer):
    assert guess_columns([row], "f").fields(row).answer == (row["answer"] if answer is None else answer)


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (  # the prompt has the task
            {"prompt": "Does 'Al runs.' imply 'He sits.'?", "premise": "Al runs.", "hypothesis": "He sits."}
            | {"label": "no"},
            "Does 'Al runs.' imply 'He sits.'?",
        ),
        (
            {"question": "Which?", "choices": ["A .5 mg", "B .3 mg"], "answer": "A"},
            "Which? Answer choices: (A) A .5 mg, (B) B .3 mg.",
        ),
        (
            {"question": "Which?", "choices": ["A ) 0", "B ) 7"], "answer": "A ) 0"},
            "Which? Answer choices: (A) 0, (B) 7.",
        ),
    ],
)  # fmt: skip
def test_a_question_keeps_its_words(row, question):
    assert guess_columns([row], "f").fields(row).question == question


TWO_PARTS = {"text": "The table shows sales.", "table": [["year", "sales"], ["2001", "5"]]}
LATER = {"intro": "Rain falls on hills.", "more": "But the valley stays dry."}


@pytest.mark.parametrize(
    ("first", "context"),
    [
        (None, TWO_PARTS),
        ({"intro": "Rain falls on hills.", "more": ""}, LATER),
        (
            None,
            [{"heading": "The long heading here", "body_text": ""}, {"heading": "Al", "body_text": "Bo sits there."}],
        ),
        (["One.", "Two."], ["One.", ["Two."]]),
        (["One.", "Two."], "plain text is here"),
        (["One.", "Two."], [{"text": "Rain falls on hills."}]),
    ],
)
def test_a_context_that_would_be_read_in_part_is_refused(first, context):
    rows = [
        {"question": f"How many in {k}?", "context": one, "answer": "4"} for k, one in enumerate([first, None, context])
    ]
    for seen in (rows, rows[:2]):  # the last row may come long after the ones that are looked at
        with pytest.raises(RowError, match="column 'context' would not be read"):
            guess_columns(seen, "f").fields(rows[2])


def test_what_a_template_may_leave_out_is_a_blank_column_and_nothing_else():
    rows = [
        {"q": "How?", "c": one, "a": "4"} for one in (["Al runs.", None], [], None, {"x": 1}, ["Al", ["runs"]], "Al")
    ]
    columns = choose_columns({"question": "{c[*]?} {q}", "answer": "a"}, rows, "f")
    assert [columns.fields(row).question for row in rows[:3]] == ["Al runs. How?", "How?", "How?"]
    for row in rows[3:]:
        with pytest.raises(RowError, match="question is missing"):
            columns.fields(row)


def test_a_template_before_turns_with_a_list_that_cannot_be_joined_is_refused():
    turns = [{"role": "user", "content": "How?"}]
    rows = [{"c": one, "m": turns, "a": "4"} for one in (["Al runs."], ["Al", ["runs"]])]
    columns = choose_columns({"question": "{c[*]} {m}", "answer": "a"}, rows, "f")
    assert columns.fields(rows[0]).question == "Al runs.\n\nHow?"
    with pytest.raises(RowError, match="question is missing"):
        columns.fields(rows[1])


GRADED = {"thinking_trajectories": ["I think."], "attempt": "So \\boxed{12}.", "question": "How many?"}


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("First $\\boxed{3}$ is the base. Then we multiply by four and obtain twelve.", "12"),
        ("The answer is the number of such pairs that fit. We count them.", "12"),
        ("We count them all and find \\[\\boxed{13}.\\]", "13"),
        ("13", "13"),
    ],
)
def test_only_the_box_at_the_end_of_a_long_reference_is_its_answer(solution, gold):
    row = GRADED | {"solution": solution}
    assert guess_columns([row], "f").fields(row).answer == gold


def test_an_attempt_that_cannot_be_read_gives_way_to_another_one():
    row = S1K | WRONG | {"solution": "64", "gemini_thinking_trajectory": "t", "gemini_attempt": "\\boxed{6"}
    found = guess_columns([row], "f").fields(row)
    assert (found.answer, found.rationales[0]) == ("64", "I believe 64.") and found.known_wrong


def test_a_column_with_a_long_question_is_compared_in_no_time():
    lines = "\n".join(f"line {k} of the question" for k in range(9_000))
    row = {"question": lines, "table": [["a", "b"]] * 3_000, "text": "  " + lines.replace("\n", "\n  "), "answer": "4"}
    with pytest.raises(RowError, match="column 'table' would not be read"):
        guess_columns([row], "f").fields(row)


def write(rows: list[dict]) -> None:
    with open("rows.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


WRONG = {"deepseek_thinking_trajectory": "I believe 64.", "deepseek_attempt": "\\boxed{64}", "deepseek_grade": "No"}
RIGHT = {"deepseek_thinking_trajectory": "9 * 9.", "deepseek_attempt": "\\boxed{81}", "deepseek_grade": "Yes"}
S1K = {"question": "3^4?", "solution": "81"}


def test_keep_drops_what_a_verdict_calls_wrong_in_a_ready_made_map_too():
    write([S1K | RIGHT, S1K | WRONG | {"question": "What is 3^4?"}])
    with pytest.raises(DataError, match="deepseek_grade is 'No', so the rationale is wrong"):
        load_data(Config.model_validate({"data": {"train": "rows.jsonl", "validation_size": 0}}))
    loaded = load_data(
        Config.model_validate({"data": {"train": "rows.jsonl", "keep": "teacher_correct", "validation_size": 0}})
    )
    assert [sample.question for split in loaded.splits.values() for sample in split] == ["3^4?"]
    assert loaded.report["teacher_wrong_dropped"] == 1


def test_a_test_row_is_read_without_the_rationale_that_a_verdict_calls_wrong():
    write([S1K | RIGHT])
    Path("test.jsonl").write_text(json.dumps(S1K | WRONG | {"question": "What is 3^4?"}) + "\n")
    data = {"train": "rows.jsonl", "test": "test.jsonl", "validation_size": 0}
    loaded = load_data(Config.model_validate({"data": data}))
    assert [(sample.answer, sample.rationales) for sample in loaded.splits["test"]] == [("81", ())]


def test_keep_without_answers_of_the_teacher_is_refused_when_no_row_has_one():
    write([{"question": f"{k}+1?", "answer": str(k + 1), "rationale": "Add."} for k in range(3)])
    with pytest.raises(ConfigError, match="needs the teacher's answers"):
        load_data(
            Config.model_validate({"data": {"train": "rows.jsonl", "keep": "teacher_correct", "validation_size": 0}})
        )


def test_numbers_of_classes_are_not_proposed_as_numbers(capsys):
    write([{"passage": f"It is {k}.", "question": f"Is it {k}?", "label": k % 2} for k in range(9)])
    run_verb(["check", "rows.jsonl"])
    said = capsys.readouterr().out
    assert "the answers are only 0, 1, which may be numbers of classes" in said and "answer_type:" not in said
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml", "data.answer_type=bool"]) == 0
    assert {sample.answer for rows in load_data(load_config("my.yaml")).splits.values() for sample in rows} == {
        "yes",
        "no",
    }


def test_a_reply_after_turns_gives_rationales_to_the_config_that_is_written():
    ask = [[{"role": "user", "content": f"What is 4*{k}?"}] for k in range(9)]
    write([{"input": turns, "output": f"<think>\nFour.\n</think>\n\\boxed{{{4 * k}}}"} for k, turns in enumerate(ask)])
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 0
    assert load_config("my.yaml").arms == ["pst", "answer_only"]


def test_a_map_without_a_question_and_a_column_that_is_not_read_is_one_line(capsys):
    write([{"instruction": f"Add {k}.", "response": "4", "context": {"a": "b c d", "e": "f g h"}} for k in range(9)])
    assert run_verb(["check", "rows.jsonl", "data.columns.answer=response", "--write", "my.yaml"]) == 2
    said = capsys.readouterr().err
    assert "column 'context' would not be read" in said and "name the question too" in said


def test_what_an_object_has_beside_a_question_is_proposed_with_it():
    row = {"train": {"question": "Degree?", "choices": ["0", "4"], "answer": 1}}
    with pytest.raises(DataError) as caught:
        guess_columns([row], "f")
    assert "{question: train.question, answer: train.answer, choices: train.choices}" in str(caught.value)
    drop = {"passage": "Al won.", "question": "Who?", "answers_spans": {"spans": ["Al", "Bo"]}}
    with pytest.raises(DataError, match=r"answer: answers_spans\.spans}"):
        guess_columns([drop], "f")


def test_a_judges_comparison_is_no_rationale():
    row = {"input": "2+2?", "chosen": "The answer is 4.", "rejected": "It is 5.", "rationale": "The second is wrong."}
    with pytest.raises(DataError) as caught:
        guess_columns([row], "f")
    assert "{question: input, answer: chosen}" in str(caught.value)
