"""Which columns a guess takes for question, answer, rationales and options, and which guesses it refuses."""

from __future__ import annotations

import pytest
import yaml

from pst_dist.config.overrides import parse_override
from pst_dist.data.sources.column_guess import as_yaml, choose_columns, guess_columns
from pst_dist.data.sources.rows import RowError
from pst_dist.errors import DataError

LAYOUT_ROWS = {
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
            {"role": "assistant", "reasoning_content": "I add.", "content": "4"},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "I add.\n#### 4"}]},
    "conversation": {
        "conversation": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "I add.\n#### 4"}]
    },
    "prompt_completion": {"prompt": "2+2?\n\n###\n\n", "completion": " I add. --> 4 END"},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "I add. The answer is 4."},
    "gsm8k": {"question": "2+2?", "answer": "I add<<2+2=4>>.\n#### 4"},
    "think": {"problem": "2+2?", "generation": "<think>I add.</think>4"},
}


@pytest.mark.parametrize("name", LAYOUT_ROWS)
def test_known_layouts_are_recognised_and_read_alike(name):
    row = LAYOUT_ROWS[name]
    columns = guess_columns([row], "file.jsonl")
    assert columns.name == name
    found = columns.fields(row)
    assert (found.question, found.rationales, found.answer) == ("2+2?", ("I add.",), "4")
    assert as_yaml(columns) == f"columns: {name}"


def test_conversational_prompt_and_completion_are_read_too():
    row = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": "<think>I add.</think>4"}],
    }
    found = guess_columns([row], "f").fields(row)
    assert (found.question, found.rationales, found.answer) == ("2+2?", ("I add.",), "4")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "q", "answer": "a", "rationale": "r"},
            {"question": "question", "answer": "answer", "rationale": "rationale"},
        ),
        (
            {"Problem": "q", "Rationale": "r", "Final Answer": "3"},
            {"question": "Problem", "answer": "Final Answer", "rationale": "Rationale"},
        ),
        (
            {"uid": 4, "query": "q", "label": 1, "chain_of_thought": "r"},
            {"question": "query", "answer": "label", "rationale": "chain_of_thought", "id": "uid"},
        ),
        ({"Body": "b", "Question": "q", "Answer": "1.0"}, {"question": "{Body} {Question}", "answer": "Answer"}),
        (
            {"question": "q", "answer": "a", "rationales": ["r", "s"]},
            {"question": "question", "answer": "answer", "rationales": "rationales"},
        ),
        (
            {"Question": "q", "Result": 5, "Explanation": "r"},
            {"question": "Question", "answer": "Result", "rationale": "Explanation"},
        ),
        ({"question": "q", "correct": True, "output": "5"}, {"question": "question", "answer": "output"}),
        ({"question": "q", "Correct": "False", "output": "5"}, {"question": "question", "answer": "output"}),
        ({"question": "q", "correct": "B", "output": "5"}, {"question": "question", "answer": "correct"}),
        ({"statement": "s", "question": "q", "correct": True}, {"question": "question", "answer": "correct"}),
    ],
)
def test_unknown_files_are_mapped_by_names_that_mean_the_same_and_the_yaml_gives_the_map_back(row, expected):
    columns = guess_columns([row], "file.csv")
    assert columns.paths == expected
    assert yaml.safe_load(as_yaml(columns)) == {"columns": expected}


def test_two_columns_with_different_gold_answers_are_refused():
    rows = [{"question": "q", "answer": 5, "final_answer": "5.0"}, {"question": "p", "answer": "Yes", "gold": "yes."}]
    assert guess_columns(rows, "f").paths == {"question": "question", "answer": "answer"}
    rows.append({"question": "o", "answer": "He has 5 because 2 + 3 = 5.", "final_answer": "5"})
    with pytest.raises(DataError, match="columns 'answer' and 'final_answer' have different answers, 'He has 5"):
        guess_columns(rows, "f")
    options = [{"question": "q", "choices": ["cat", "dog"], "answer": "dog", "gold": "B"}]
    assert guess_columns(options, "f").paths["answer"] == "answer"


@pytest.mark.parametrize(
    "rest",
    [
        {"id": "batch_req_1", "response": {"status_code": 200, "body": {"choices": []}}, "error": None},
        {"result": {"type": "succeeded", "message": {"role": "assistant", "content": []}}},
    ],
)
def test_the_output_of_a_batch_api_is_named_as_what_it_is(rest):
    with pytest.raises(DataError, match="output of a batch API, which contains replies but no questions; join them by"):
        guess_columns([{"custom_id": "row-1"} | rest], "output.jsonl")


def test_solutions_that_box_their_answer_need_no_column_for_it():
    row = {"problem": "2+2?", "level": "Level 1", "solution": "I add. So $\\boxed{4}$."}
    found = guess_columns([row], "f").fields(row)
    assert (found.question, found.rationales, found.answer) == ("2+2?", ("I add. 4",), "4")


Q = {"question": "2+2?", "answer": "4"}


STEPS = ["Add 2 and 2.", "That is 4."]


@pytest.mark.parametrize(
    ("row", "rationales"),
    [
        ({"steps": STEPS}, ("Add 2 and 2.\nThat is 4.",)),
        ({"reasoning_steps": ["Add 2 and 2.", "", None, "That is 4."]}, ("Add 2 and 2.\nThat is 4.",)),
        ({"Reasoning Steps": str(STEPS)}, ("Add 2 and 2.\nThat is 4.",)),  # a list in a cell of a table
        ({"chain_of_thought": STEPS}, ("Add 2 and 2.\nThat is 4.",)),
        ({"steps": [STEPS, ["Count."]]}, ("Add 2 and 2.\nThat is 4.", "Count.")),
        ({"steps": "Add 2 and 2."}, ("Add 2 and 2.",)),
        ({"steps": []}, ()),
        ({"explanations": STEPS}, ("Add 2 and 2.", "That is 4.")),  # several rationales
    ],
)
def test_a_list_of_steps_is_one_rationale(row, rationales):
    columns = guess_columns([Q | row, Q | {name: ["x"] for name in row}], "f")
    assert columns.fields(Q | row).rationales == rationales
    with pytest.raises(RowError, match="a step of the rationale is an object"):
        guess_columns([{**Q, "steps": ["x"]}], "f").fields({**Q, "steps": [{"text": "x"}]})


@pytest.mark.parametrize("cell", ["['I add.', \"It's 4.\"]", '["I add.", "It\'s 4."]', "['I add.'\n \"It's 4.\"]"])
def test_rationales_that_were_printed_into_a_cell_are_read_one_by_one(cell):
    row = {"question": "2+2?", "answer": "4", "rationales": cell}
    assert guess_columns([row], "f").fields(row).rationales == ("I add.", "It's 4.")
    with pytest.raises(RowError, match="looks like a printed list"):
        guess_columns([row], "f").fields({**row, "rationales": "['I add.', np.str_('4')]"})


@pytest.mark.parametrize("cell", ["['4']", '["4", "four"]', "['4' 'four']"])
def test_an_answer_that_is_a_list_printed_as_text_is_refused_with_both_remedies(cell):
    row = {"question": "2+2?", "answer": cell, "rationale": "I add."}
    with pytest.raises(
        RowError, match=r"data.columns.answer=answer\[0\] takes its first text, data.columns.answer=\"'{answer}'\" all"
    ):
        guess_columns([row], "f").fields(row)
    assert choose_columns({"answer": "answer[0]"}, [row], "f").fields(row).answer == "4"
    assert choose_columns({"answer": "{answer}"}, [row], "f").fields(row).answer == cell
    assert guess_columns([row], "f").fields({**row, "answer": "[4, 5]"}).answer == "[4, 5]"


def test_the_gold_answer_of_verls_rows_is_the_ground_truth():
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"style": "rule", "ground_truth": "4"}}
    row |= {"data_source": "sums", "extra_info": {"answer": "Two more.\n#### 5", "index": 0}}
    for more in ({}, {"response": "It is five. The answer is 5."}):
        columns = guess_columns([row | more, row | {"reward_model": {"ground_truth": None}}], "f")
        assert columns.paths == {"question": "prompt", "answer": "reward_model.ground_truth"}
        assert columns.fields(row | more).answer == "4"


def test_none_of_several_judged_answers_is_proposed():
    row = {"question": "2+2?", "answers": [{"text": "5", "is_correct": False}, {"text": "4", "is_correct": True}]}
    with pytest.raises(DataError, match=r"question: question, answer: COLUMN\}'"):
        guess_columns([row], "f")


def test_what_stands_for_a_missing_value_in_a_table_of_texts_is_one():
    row = {"question": "2+2?", "answer": "4", "rationale": "I add."}
    columns = guess_columns([row], "f")
    for word in ("NaN", "#N/A", "<NA>", "#DIV/0!", "#NAME?"):
        for name in ("question", "answer"):
            with pytest.raises(RowError, match="stands for a missing value"):
                columns.fields({**row, name: word})
    for word in ("nan", "None", "N/A", "null"):
        assert columns.fields({**row, "rationale": word}).rationales == ()
    for word in ("None", "nan"):  # "nan" are the last letters of "Hasan Maria Jan"
        assert columns.fields({**row, "answer": word}).answer == word


def test_big_bench_gives_the_option_with_the_best_score():
    row = {"input": "What is the date?", "target_scores": {"01/02/2021": 0, "05/01/2021": 1}}
    columns = guess_columns([row], "task.json")
    found = columns.fields(row)
    assert found.question == "What is the date? Answer choices: (A) 01/02/2021, (B) 05/01/2021."
    assert (found.answer, found.options.texts) == ("B", ("01/02/2021", "05/01/2021"))
    with pytest.raises(RowError, match="2 options have the best"):
        columns.fields({**row, "target_scores": {"a": 1, "b": 1}})


@pytest.mark.parametrize(
    ("row", "question", "answer", "options"),
    [
        (
            {
                "ctx_a": "He wipes",
                "ctx_b": "then",
                "ctx": "He wipes, then",
                "endings": ["stops.", "sings."],
                "label": "1",
            },
            "He wipes, then Answer choices: (A) stops., (B) sings..",
            "1",
            ("stops.", "sings."),
        ),
        (
            {"goal": "Cut bread", "sol1": "a knife", "sol2": "a spoon", "label": 0},
            "Cut bread Answer choices: (A) a knife, (B) a spoon.",
            "0",
            ("a knife", "a spoon"),
        ),
        (
            {"sentence": "Ian ate as _ was hungry.", "option1": "Ian", "option2": "Dennis", "answer": "1"},
            "Ian ate as _ was hungry. Answer choices: (A) Ian, (B) Dennis.",
            "1",
            ("Ian", "Dennis"),
        ),
        (
            {"context": "Some X.", "question": "Which?", "answers": ["one", "two"], "label": 1, "id_string": "t"},
            "Some X.\n\nWhich? Answer choices: (A) one, (B) two.",
            "1",
            ("one", "two"),
        ),
        (
            {"q_text": "Where?", "q_op1": "here", "q_op2": "there", "q_ans": "there", "taskB": "So it is."},
            "Where? Answer choices: (A) here, (B) there.",
            "there",
            ("here", "there"),
        ),
    ],
    ids=["hellaswag", "piqa", "winogrande", "reclor", "ecqa"],
)
def test_public_choice_layouts_have_their_options_in_the_question(row, question, answer, options):
    found = guess_columns([row], "f").fields(row)
    assert (found.question, str(found.answer), found.options.texts) == (question, answer, options)


def test_a_source_is_the_question_only_beside_a_target():
    row = {"source": "2+2? OPTIONS: 3, 4", "target": "4", "rationale": "I add.", "task": "sums"}
    found = guess_columns([row], "f").fields(row)
    assert (found.question, found.answer, found.rationales) == ("2+2? OPTIONS: 3, 4", "4", ("I add.",))
    with pytest.raises(DataError, match="no column 'question'"):
        guess_columns([{"source": "cn_k12", "answer": "4"}], "f")


def test_several_answers_are_options_only_if_another_column_chooses_one():
    row = {"question": "Which?", "answers": ["one", "two"], "label": "it depends"}
    assert guess_columns([row], "f").fields(row).options is None


DEEPSEEK = {"deepseek_thinking_trajectory": "Two more.", "deepseek_attempt": "It is \\boxed{4}."}
S1K = {"question": "2+2?", "cot_type": "math", "thinking_trajectories": ["I add.", "It is 4."], "attempt": "\\boxed{4}"}


@pytest.mark.parametrize(
    ("row", "answer", "rationale", "teacher"),
    [
        (S1K | {"solution": "Let x = 2.\nThen 4."}, "4", "I add.\n\nIt is 4.", None),
        (S1K | {"solution": "4"}, "4", "I add.\n\nIt is 4.", "4"),
        (
            S1K
            | DEEPSEEK
            | {"solution": "5", "gemini_attempt": "\\boxed{3}", "gemini_grade": "No"}
            | {"gemini_thinking_trajectory": "No."},
            *("5", "Two more.", "4"),
        ),
        (  # DeepSeek's attempt is graded wrong, and Gemini's is not
            S1K
            | DEEPSEEK
            | {"solution": "5", "gemini_attempt": "\\boxed{5}", "deepseek_grade": "No"}
            | {"gemini_thinking_trajectory": "Add."},
            *("5", "Add.", "5"),
        ),
        # The reference ends in a box; the attempt does not agree with it.
        (S1K | {"solution": "By symmetry\nthe sum is $\\boxed{5}$."}, "5", "I add.\n\nIt is 4.", "4"),
    ],
)
def test_s1k_rows_are_read_with_their_thought(row, answer, rationale, teacher):
    found = guess_columns([row], "f").fields(row)
    assert (found.answer, found.teacher_answer) == (answer, teacher)
    assert found.rationales[0].startswith(rationale)


def test_an_attempt_that_is_graded_wrong_is_no_gold_answer():
    row = {"question": "1+2?", "solution": "A proof.\nQ.E.D.", "gemini_thinking_trajectory": "t"}
    row |= {"gemini_attempt": "\\boxed{3}"}
    with pytest.raises(RowError, match="gemini_grade says that the attempt is wrong"):
        guess_columns([row], "f").fields(row | {"gemini_grade": "No"})
    assert guess_columns([row], "f").fields(row | {"gemini_grade": "Yes"}).answer == "3"
    with_gold = guess_columns([row], "f").fields(row | {"gemini_grade": "No", "solution": "4"})
    assert (with_gold.answer, with_gold.teacher_answer) == ("4", "3")
    assert with_gold.known_wrong.startswith("gemini_grade is 'No', so the rationale is wrong")


def test_a_missing_column_is_named_with_those_that_exist_and_the_nearest():
    rows = [{"quesiton": "q", "answer": "a"}]
    with pytest.raises(DataError) as caught:
        guess_columns(rows, "train.jsonl")
    assert "no column 'question' for question among: quesiton, answer" in str(caught.value)
    assert "the closest is 'quesiton'" in str(caught.value)
    with pytest.raises(DataError, match="no column 'awnser'"):
        choose_columns({"question": "quesiton", "answer": "awnser"}, rows, "train.jsonl")
    with pytest.raises(DataError, match="no column 'why'"):
        choose_columns({"question": "quesiton", "answer": "answer", "rationale": "why"}, rows, "train.jsonl")
    with pytest.raises(DataError, match="no column 'messages' for map messages"):
        choose_columns("messages", rows, "train.jsonl")


CONTEXT = {"id": "s1", "context": "Normandy is in France.", "question": "Where?"}


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            {**CONTEXT, "answers": {"text": ["France"], "answer_start": [15]}},
            'data.columns={question: "{context}\\n\\n{question}", answer: "answers.text[0]", id: id}',
        ),
        (
            {"prompt": [{"role": "user", "content": "2+2?"}], "reward": {"style": "rule", "ground_truth": "4"}},
            "data.columns={question: prompt, answer: reward.ground_truth}",
        ),
        (
            {"question": "2+2?", "answer": {"aliases": ["four"], "value": "4"}},
            "data.columns={question: question, answer: answer.value}",
        ),
        (
            {"prompt": "2+2?", "chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
            'data.columns={question: prompt, answer: "chosen[-1].content"}',
        ),
        (
            {"problem": "2+2?", "r1_reasoning": "I add.", "r1_reply": "So \\boxed{4}."},
            "data.columns={question: problem, answer: r1_reply}",
        ),
        (
            {"prompt": [{"role": "user", "content": "2+2?"}], "solution": "4"},
            "data.columns={question: prompt, answer: solution}",
        ),
        (
            {"question_id": "2+2?", "ground_truth": "4"},
            "data.columns={question: COLUMN, answer: ground_truth, id: question_id}",
        ),
        (
            {"fields": {"instruction": "2+2?"}, "suggestions": {}, "responses": {"answer": [{"value": "4"}]}},
            'data.columns={question: fields.instruction, answer: "responses.answer[0].value"}',
        ),
        ({"problem": "2+2?", "my_answer": "4"}, "data.columns={question: problem, answer: my_answer}"),
        ({"title": "2+2?", "response": {"code": 200}}, "data.columns={question: COLUMN, answer: COLUMN}"),
    ],
)
def test_the_remedy_for_a_missing_column_is_a_whole_map_that_reads_the_row(row, remedy):
    with pytest.raises(DataError) as caught:
        guess_columns([row], "f")
    assert f"set '{remedy}'" in str(caught.value)
    if "COLUMN" not in remedy:
        (_, setting) = parse_override(remedy)
        found = choose_columns(setting, [row], "f").fields(row)
        assert found.question.endswith(("2+2?", "Where?")) and found.answer in ("4", "France")


def test_a_number_in_the_place_of_a_question_has_no_part_to_select():
    with pytest.raises(DataError, match=r"it contains a number; set data.columns.question to another column"):
        guess_columns([{"question": 3, "answer": "4"}], "f")


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"label": 1, "label_text": "positive"}, "positive"),
        ({"target": 15, "target_text": "son"}, "son"),
        ({"label": "1", "label_text": "positive"}, "1"),
        ({"label": 1, "label_text": None}, 1),
        ({"answer": 12, "answer_text": "a dozen"}, 12),
    ],
)
def test_the_name_of_a_class_is_the_answer_and_not_its_number(row, answer):
    row = {"question": "q", **row}
    assert guess_columns([row], "f").fields(row).answer == answer


def test_the_number_of_a_class_chooses_an_option():
    row = {"question": "q", "choices": ["a b", "c d"], "label": 1, "label_text": "c d"}
    assert guess_columns([row], "f").fields(row).answer == 1


@pytest.mark.parametrize("stem", ["explanation_", "Rationale ", "cot"])
def test_numbered_columns_have_a_rationale_each(stem):
    rows = [
        {"question": "2+2?", "answer": "4", f"{stem}1": "I add.", f"{stem}2": "I count.", f"{stem}3": ""},
        {"question": "3+2?", "answer": "5", f"{stem}1": "I add.", f"{stem}2": None, f"{stem}3": "Five."},
    ]
    columns = guess_columns(rows, "f")
    assert [columns.fields(row).rationales for row in rows] == [("I add.", "I count."), ("I add.", "Five.")]
    assert choose_columns(yaml.safe_load(as_yaml(columns))["columns"], rows, "f").paths == columns.paths


def test_one_numbered_column_or_steps_are_not_several_rationales():
    for names in (("explanation_1",), ("step_1", "step_2")):
        row = {"question": "2+2?", "answer": "4", **dict.fromkeys(names, "I add.")}
        assert guess_columns([row], "f").fields(row).rationales == ()


WRONG = ["London", "Rome", "Madrid"]


DISTRACTORS = {
    "GPQA": {
        "Question": "Capital of France?",
        "Correct Answer": "Paris",
        **{f"Incorrect Answer {place}": text for place, text in enumerate(WRONG, 1)},
        "Explanation": "It is Paris.",
        "Subdomain": "Geography",
    },
    "SciQ": {
        "question": "Capital of France?",
        "correct_answer": "Paris",
        **{f"distractor{place}": text for place, text in enumerate(WRONG, 1)},
        "support": "It is Paris.",
    },
    "Open Trivia DB": {"question": "Capital of France?", "correct_answer": "Paris", "incorrect_answers": WRONG},
    "TruthfulQA": {
        "question": "Capital of France?",
        "best_answer": "Paris",
        "correct_answers": ["Paris", "The city of Paris"],
        "incorrect_answers": str(WRONG),
    },
}


@pytest.mark.parametrize("name", DISTRACTORS)
def test_wrong_answers_in_columns_of_their_own_are_options(name):
    row = DISTRACTORS[name]
    columns = guess_columns([row, {**row, "question": None, "Question": None}], "f")
    found = columns.fields(row)
    assert columns.name == "distractors" and found.answer == "Paris"
    assert sorted(found.options.texts) == sorted(["Paris", *WRONG])
    assert found.question.startswith("Capital of France? Answer choices: (A) ")
    assert found.rationales == (("It is Paris.",) if name in ("GPQA", "SciQ") else ())
    reordered = dict(reversed(row.items()))
    assert columns.fields(reordered).options == found.options
    with pytest.raises(RowError, match="question is missing"):
        columns.fields({**row, "question": None, "Question": None})
    correct = next(column for column in row if "orrect" in column or "best" in column)
    with pytest.raises(RowError, match="two options are the same"):
        columns.fields({**row, correct: "Rome"})


def test_the_place_of_an_option_tells_nothing_about_the_answer():
    places = []
    for n in range(400):
        row = DISTRACTORS["SciQ"] | {"question": f"Capital of France, {n}?"}
        found = guess_columns([row], "f").fields(row)
        places.append(found.options.texts.index(found.answer))
    assert all(70 <= places.count(place) <= 130 for place in range(4))  # 100 each, 8.7 is one standard error


def test_options_in_the_order_of_the_row_win_over_separate_wrong_answers():
    row = DISTRACTORS["SciQ"] | {"choices": ["Rome", "Paris", "London", "Madrid"]}
    assert guess_columns([row], "f").fields(row).options.texts == ("Rome", "Paris", "London", "Madrid")


@pytest.mark.parametrize("flag", ["correct", "isCorrect", "is_answer"])
@pytest.mark.parametrize("column", ["options", "answerOptions"])
def test_options_that_say_which_one_is_correct_have_the_answer(flag, column):
    options = [{"text": text, flag: text == "Paris"} for text in ("Rome", "Paris", "London")]
    row = {"question": "Capital of France?", column: options, "explanation": "It is Paris."}
    columns = guess_columns([row], "f")
    found = columns.fields(row)
    assert columns.name == "flagged_options"
    assert (found.answer, found.options.texts) == ("B", ("Rome", "Paris", "London"))
    assert found.question == "Capital of France? Answer choices: (A) Rome, (B) Paris, (C) London."
    assert found.rationales == ("It is Paris.",)
    for marked in ([], [0, 1]):
        flags = [{**option, flag: int(place in marked)} for place, option in enumerate(options)]
        with pytest.raises(RowError, match=f"{len(marked)} options are marked as correct"):
            columns.fields({**row, column: flags})
