"""Multiple choice: every layout of options and every way to name the right one ends in one letter, or is refused."""

from __future__ import annotations

import csv
import json
import math

import pytest
import yaml

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.sources import load_data, survey
from pst_dist.data.sources.choices import Convention, chosen, convention_of, gold_answer
from pst_dist.data.sources.column_guess import guess_columns
from pst_dist.data.sources.columns import field_map
from pst_dist.data.sources.options import Options, listed_options, option_columns, read_options, with_choices
from pst_dist.data.sources.rows import RowError
from pst_dist.data.tasks import get_task
from pst_dist.diagnostics.rows import check
from pst_dist.errors import ConfigError, DataError
from pst_dist.evaluation.scores import chance_of

ANIMALS = Options(("cat", "dog", "cow", "pig"))
NUMBERS = Options(("4", "3", "2", "1"))


def _config(folder, **data):
    return Config.model_validate({"arm": "answer_only", "data": {"root": str(folder), "validation_size": 0, **data}})


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _loaded(folder, rows, **data):
    """(question, answer, choices) of every row kept, and what was said about the others."""
    _write(folder / "rows.jsonl", rows)
    found = survey(_config(folder, train="rows.jsonl", **{"answer_type": "choice", "max_bad": "100%", **data}))
    return [(s.question, s.answer, s.choices) for s in found.splits["train"]], [str(r) for r in found.rejects]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (["A)5", "B)6"], ("5", "6")),
        (["(A) x", "(B) y"], ("x", "y")),
        (["a. x", "b. y"], ("x", "y")),
        (["1. x", "2. y"], ("x", "y")),
        (["1.5", "2.5"], ("1.5", "2.5")),
        (["A) x", "y"], ("A) x", "y")),
        ([1, 2.5], ("1", "2.5")),
        ({"label": ["A", "B"], "text": ["x", "y"]}, ("x", "y")),
        ({"text": ["x", "y"], "label": ["B", "A"]}, ("y", "x")),
        ({"A": "x", "B": "y"}, ("x", "y")),
        ({"b": "y", "a": "x", "c": None}, ("x", "y")),
        ({"option_a": "x", "option_b": "y"}, ("x", "y")),
        ({"2": "y", "1": "x"}, ("x", "y")),
        ([{"label": "A", "text": "x"}, {"label": "B", "text": "y"}], ("x", "y")),
        ("a ) 38 , b ) 27.675 , c ) none of these", ("38", "27.675", "none of these")),
        ("(A) x, (B) y", ("x", "y")),
        ('["x", "y"]', ("x", "y")),
        ('{"A": "x", "B": "y"}', ("x", "y")),
        ("A. x\nB. y, z\n", ("x", "y, z")),
        ("(a) x\n\n(b) y", ("x", "y")),
    ],
)
def test_options_are_read_from_every_common_layout(value, texts):
    assert read_options(value).texts == texts


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "choices is missing"),
        ("x, y", "choices is a text in which no options are recognised: 'x, y'"),
        ("['x' y]", "no options are recognised"),
        ("['x', 3]", "no options are recognised"),
        ("['x', 'y'", "no options are recognised"),
        ("b ) x , a ) y", "no options are recognised"),
        (["x"], "choices has 1 options, expected 2 to 26"),
        (["x"] * 27, "choices has 27 options"),
        (["x", None], "choice B is missing"),
        (["x", " "], "choice B is missing or empty"),
        (["x", True], "choice B is true or false"),
        ({"A": "x", "B": None, "C": "y"}, "choice B is missing"),
        ({"A": "x", "C": "y"}, "choices has labels 'A', 'C'"),
        ({"label": ["A"], "text": ["x", "y"]}, "does not have one label for each text"),
        ({"label": ["A", "A"], "text": ["x", "y"]}, "choices has labels 'A', 'A'"),
        ([{"letter": "A"}, {"letter": "B"}], "objects without a text"),
    ],
)
def test_options_that_are_not_understood_are_refused(value, what):
    with pytest.raises(RowError) as caught:
        read_options(value)
    assert what in caught.value.what


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("['cat', 'dog', 'cow']", ("cat", "dog", "cow")),
        ("['cat' 'dog'\n 'cow']", ("cat", "dog", "cow")),
        ("[\"it's\" 'he said \"no\"' 'don\\'t']", ("it's", 'he said "no"', "don't")),
        ('["cat", "dog"]', ("cat", "dog")),
    ],
)
def test_lists_that_python_or_numpy_printed_into_a_csv_cell_are_read(text, texts):
    assert read_options(text).texts == texts


@pytest.mark.parametrize("cell", ["['cat', 'dog', 'cow', 'pig']", "['cat' 'dog' 'cow' 'pig']", "cat; dog; cow; pig"])
def test_an_index_into_options_in_a_text_never_becomes_a_number(tmp_path, cell):
    path = tmp_path / "mmlu.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "choices", "answer", "rationale"])
        writer.writerows([f"Which is it in case {k}?", cell, k % 4, "It is known."] for k in range(8))
    words = [f"data.train={path}", "data.validation_size=0"]
    report = check(load_config(None, words))
    assert "answer_type: number" not in report.proposal
    read = check(load_config(None, [*words, "data.answer_type=choice"]))
    if ";" in cell:
        assert not read.ok and "no options are recognised" in str(read.problem)
    else:
        assert "answer_type: choice" in report.proposal
        assert [row.answer for row in read.loaded.splits["train"]] == list("ABCDABCD")


def test_options_are_written_behind_the_question_once_and_in_one_way():
    question = with_choices("Which?", ("x", "y"))
    assert question == "Which? Answer choices: (A) x, (B) y."
    assert with_choices(question, ("x", "y")) == question
    assert with_choices("Which?\nA. x\nB. y", ("x", "y")) == "Which?\nA. x\nB. y"
    # That the digits 1 and 2 occur in the question lists no options.
    assert with_choices("How many of 12?", ("1", "2")) == "How many of 12? Answer choices: (A) 1, (B) 2."
    assert with_choices("A cat or a dog?", ("cat", "dog")).endswith("(A) cat, (B) dog.")


@pytest.mark.parametrize(
    ("question", "count"),
    [
        ("Which? Answer choices: (A) x, (B) y, (C) z.", 3),
        ("Which?\nA. x\nB. y", 2),
        ("Plan A) is it? Answer Choices: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5 (F) 6", 6),
        ("Is vitamin A: good?", 0),
        ("Plan A: run. Plan B: walk. Vitamin A. Vitamin B. Which?", 0),
        ("Which? A) x B) y", 2),
        ("Which?", 0),
    ],
)
def test_the_options_that_a_question_lists_are_counted(question, count):
    assert listed_options(question) == count


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "b)", "B.", "B. dog", "(b) dog", "B: Dog", "dog", "Dog", " dog. "])
def test_letters_and_texts_lead_to_one_letter(answer):
    assert chosen(answer, ANIMALS, convention_of([(answer, ANIMALS)]))[1] == 1


@pytest.mark.parametrize(
    ("answer", "options", "what"),
    [
        ("E", ANIMALS, "answer 'E' is not one of the 4 options"),
        ("horse", ANIMALS, "answer 'horse' is not one of the 4 options"),
        ("B. cat", ANIMALS, "answer 'B. cat' is not option B"),
        (4.5, ANIMALS, "answer '4.5' is not one of"),
        (-1, ANIMALS, "answer '-1' is not one of"),
        (7, ANIMALS, "answer '7' is not one of"),
        (True, ANIMALS, "answer is true or false"),
        ("dog", Options(("dog", "cat", "dog")), "answer 'dog' matches the text of options A and C"),
        ("1/2", Options(("0.5", "50/100", "1")), "answer '1/2' matches the text of options A and B"),
        (1, ANIMALS, "answer '1' may be B as index from 0 or A as index from 1"),
        (2, NUMBERS, "may be C as text or C as index from 0 or B as index from 1"),
        ("B", Options(("B", "A")), "answer 'B' may be A as text or B as letter"),
    ],
)
def test_an_answer_that_is_no_option_or_stays_open_is_refused(answer, options, what):
    with pytest.raises(RowError) as caught:
        chosen(answer, options, convention_of([(answer, options)]))
    assert what in caught.value.what


@pytest.mark.parametrize(
    ("answers", "options", "places"),
    [
        ([0, 1, 3], ANIMALS, [0, 1, 3]),
        (["0", "1"], ANIMALS, [0, 1]),
        ([0.0, 2.0], ANIMALS, [0, 2]),
        ([1, 2, 4], ANIMALS, [0, 1, 3]),
        ([0, 1, 3], NUMBERS, [0, 1, 3]),
        ([10, 20], Options(("20", "10")), [1, 0]),
        ([1, 9], Options(("9", "2", "1")), [2, 0]),
        (["B", "D"], Options(("B", "A", "x", "y")), [1, 3]),
        ([1, 2, 3], Options(("1", "2", "3")), [0, 1, 2]),
        ([2, "dog", "D"], Options(("cat", "dog"), ("1", "2")), [1, 1, None]),
        ([0, 4], ANIMALS, [None, None]),
        ([0, 7, 1], ANIMALS, [0, None, 1]),
    ],
)
def test_the_file_tells_what_its_numbers_mean_or_they_are_refused(answers, options, places):
    # [0, 1, 3] of the texts 4, 3, 2, 1: 0 is no text, so all are indices from 0. [1, 9] of 9, 2, 1: 9 is a text only.
    told = convention_of([(answer, options) for answer in answers])
    found = []
    for answer in answers:
        try:
            found.append(chosen(answer, options, told)[1])
        except RowError:
            found.append(None)
    assert found == places


@pytest.mark.parametrize(("base", "letter"), [(0, "C"), (1, "B")])
def test_a_map_may_say_what_an_index_counts_from(tmp_path, base, letter):
    columns = {"question": "q", "choices": "choices", f"answer_from_{base}": "label"}
    rows = [
        {"q": "Which?", "choices": ["cat", "dog", "cow"], "label": 2},
        {"q": "No?", "choices": ["a", "b"], "label": 3},
    ]
    kept, refused = _loaded(tmp_path, rows, columns=columns)
    assert [answer for _, answer, _ in kept] == [letter]
    assert f"answer '3' is not an index of 2 options counted from {base}" in refused[0]


def test_a_map_names_the_answer_once():
    for columns, what in (
        ({"question": "q", "answer": "a", "answer_from_0": "b", "choices": "c"}, "has both answer and answer_from_0"),
        ({"question": "q", "answer_from_1": "b"}, "has answer_from_1, but no choices"),
    ):
        with pytest.raises(ConfigError, match=what):
            field_map(columns)


LAYOUTS = {
    "MMLU": [
        {"question": "Which?", "choices": ["cat", "dog"], "answer": 1},
        {"question": "Who?", "choices": ["a", "b"], "answer": 0},
    ],
    "index from 1": [
        {"question": "Which?", "options": ["cat", "dog"], "label": "2"},
        {"question": "Who?", "options": ["a", "b"], "label": "1"},
    ],
    "object": [
        {"question": "Which?", "options": {"A": "cat", "B": "dog"}, "answer": "B"},
        {"question": "Who?", "options": {"A": "a", "B": "c"}, "answer": "a"},
    ],
    "ARC": [
        {"question": "Which?", "choices": {"text": ["cat", "dog"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "Who?", "choices": {"text": ["a", "c"], "label": ["A", "B"]}, "answerKey": "A"},
    ],
    "OpenBookQA": [
        {"question_stem": "Which?", "choices": {"text": ["cat", "dog"], "label": ["A", "B"]}, "answerKey": "B"}
    ],
    "CSQA": [
        {
            "question": {"stem": "Which?", "choices": [{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}]},
            "answerKey": "B",
        }
    ],
    "columns A to D": [
        {"question": "Which?", "A": "cat", "B": "dog", "C": None, "answer": "B"},
        {"question": "Who?", "A": "x", "B": "y", "C": "z", "answer": "C"},
    ],
    "MedMCQA": [
        {"question": "Which?", "opa": "cat", "opb": "dog", "cop": 1},
        {"question": "Who?", "opa": "x", "opb": "y", "cop": 0},
    ],
    "option_a": [{"question": "Which?", "option_a": "cat", "option_b": "dog", "correct_option": "B"}],
    "SIQA": [
        {"question": "Which?", "answerA": "cat", "answerB": "dog", "answerC": "cow", "label": "2"},
        {"question": "Who?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
    ],
    "SWAG": [
        {"question": "Which?", "ending0": "cat", "ending1": "dog", "label": 1},
        {"question": "Who?", "ending0": "x", "ending1": "y", "label": 0},
    ],
    "PIQA": [
        {"question": "Which?", "sol1": "cat", "sol2": "dog", "label": 1},
        {"question": "Who?", "sol1": "x", "sol2": "y", "label": 0},
    ],
    "HellaSwag": [
        {"question": "Which?", "endings": ["cat", "dog"], "label": "1"},
        {"question": "Who?", "endings": ["x", "y"], "label": "0"},
    ],
    "MathQA": [{"Problem": "Which?", "options": "a ) cat , b ) dog", "correct": "b"}],
    "text": [{"question": "Which?", "choices": ["cat", "dog"], "answer": "dog"}],
    "led text": [{"question": "Which?", "choices": ["cat", "dog"], "answer": "B. dog"}],
    "MedQA": [{"question": "Which?", "options": {"A": "cat", "B": "dog"}, "answer": "dog", "answer_idx": "B"}],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_proposes_a_map_with_which_each_layout_gives_one_letter(name, tmp_path):
    _write(tmp_path / "rows.jsonl", LAYOUTS[name])
    proposal = yaml.safe_load(check(_config(tmp_path, train="rows.jsonl")).proposal)["data"]
    assert proposal["answer_type"] == "choice"
    assert "choices" in proposal["columns"]
    loaded = load_data(_config(tmp_path, train="rows.jsonl", **proposal))
    first = loaded.splits["train"][0]
    listed = "(A) cat, (B) dog, (C) cow" if name == "SIQA" else "(A) cat, (B) dog"
    assert (first.question, first.answer) == (f"Which? Answer choices: {listed}.", "B")
    assert len(loaded.splits["train"]) == len(LAYOUTS[name])


def test_columns_of_one_option_each_are_recognised():
    assert (
        option_columns(
            (
                "question",
                "B",
                "A",
                "C",
                "answer",
            )
        )
        == "A, B, C"
    )
    assert (
        option_columns(
            (
                "opa",
                "opb",
                "cop",
            )
        )
        == "opa, opb"
    )
    assert (
        option_columns(
            (
                "q",
                "a",
            )
        )
        == ""
    )
    assert (
        option_columns(
            (
                "A",
                "C",
            )
        )
        == ""
    )
    assert (
        option_columns(
            (
                "1",
                "2",
            )
        )
        == ""
    )
    assert guess_columns([{"question": "q", "a": "x", "b": "y", "label": "a"}], "f").paths["choices"] == "a, b"


def test_more_than_ten_options_have_letters_too(tmp_path):
    texts = [f"text {k}" for k in range(26)]
    kept, refused = _loaded(tmp_path, [{"question": "Which?", "choices": texts, "answer": "Z"}])
    assert (kept[0][1], refused) == ("Z", [])
    assert "(K) text 10" in kept[0][0] and "(Z) text 25." in kept[0][0]
    _write(tmp_path / "rows.jsonl", [{"question": "Which?", "choices": texts, "answer": "text 6"}])
    config = Config.model_validate(
        {"task": "aqua", "arm": "answer_only", "data": {"root": str(tmp_path), "train": "rows.jsonl"}}
    )
    with pytest.raises(DataError, match="answer is option G, but task aqua has only ABCDE"):
        load_data(config)


def test_a_file_that_does_not_tell_follows_the_others_of_its_layout(tmp_path):
    _write(tmp_path / "train.jsonl", [{"question": f"q{k}", "choices": ["x", "y", "z"], "answer": k} for k in range(3)])
    _write(tmp_path / "test.jsonl", [{"question": "Which?", "choices": ["cat", "dog", "cow"], "answer": 1}])
    loaded = load_data(_config(tmp_path, train="train.jsonl", test="test.jsonl", answer_type="choice"))
    assert [sample.answer for sample in loaded.splits["test"]] == ["B"]
    with pytest.raises(DataError, match="no row of the file decides it; use answer_from_0 or answer_from_1"):
        load_data(_config(tmp_path, train="test.jsonl", answer_type="choice"))


@pytest.mark.parametrize("answer_type", ["number", "text", None])
def test_an_index_never_becomes_the_answer_of_another_type(tmp_path, answer_type):
    rows = [{"question": f"q{k}", "choices": ["x", "y", "z"], "answer": k} for k in range(3)]
    kept, refused = _loaded(tmp_path, rows, answer_type=answer_type)
    assert kept == [] and len(refused) == 3
    assert "names option B by index" in refused[1] and "set data.answer_type=choice" in refused[1]
    kept, refused = _loaded(
        tmp_path, [{"question": "q", "choices": ["5", "7"], "answer": "7"}], answer_type=answer_type
    )
    assert [answer for _, answer, _ in kept] == ["7"], refused


def test_a_letter_beyond_the_options_in_the_question_is_a_bad_row(tmp_path):
    rows = [{"question": "Which? (A) x (B) y", "answer": "C"}, {"question": "Which? (A) x (B) z", "answer": "B"}]
    kept, refused = _loaded(tmp_path, rows)
    assert [answer for _, answer, _ in kept] == ["B"]
    assert "rows.jsonl:1: answer C is not one of the 2 options in the question" in refused[0]
    assert gold_answer(get_task("aqua"), "Which?", "E", None, convention_of([]), None) == "E"


def test_chance_counts_the_options_of_each_row():
    def row(question="q", choices=()):
        return ReasoningSample(id="a", question=question, answer="A", answer_type="choice", choices=choices)

    generic = get_task(None, "choice")
    assert math.isclose(
        chance_of(generic, [row(choices=("x", "y")), row(choices=tuple("abcdefgh"))]), (1 / 2 + 1 / 8) / 2
    )
    assert math.isclose(
        chance_of(generic, [row("Which? (A) x (B) y (C) z"), row(choices=("x", "y"))]), (1 / 3 + 1 / 2) / 2
    )
    assert chance_of(generic, [row(), row(choices=("x", "y"))]) is None, "unknown for one row is unknown for all"
    assert chance_of(get_task("aqua"), [row()]) == 0.2


@pytest.mark.data
def test_chance_of_the_twelve_tasks_counts_the_options_in_their_questions(shared_data):
    # Of the 111 test questions about dates 92 have six options and 19 have five: (92 / 6 + 19 / 5) / 111 = 17.24 %.
    folder = shared_data / "reasoning_teacher"
    for name, chance in (
        ("date_understanding", 17.24),
        ("tracking_shuffled_objects", 33.33),
        ("commonsense_qa", 20.0),
    ):
        rows = json.loads((folder / f"dataset_acl/{name}.json").read_text())
        rows = rows["data"] if isinstance(rows, dict) else rows
        split = json.loads((folder / f"split/{name}__default.json").read_text())["test"]
        samples = [
            ReasoningSample(id="a", question=rows[k]["question"], answer=str(rows[k]["answer"]), answer_type="choice")
            for k in split
        ]
        assert round(100 * chance_of(get_task(name), samples), 2) == chance


MARKED = {
    "reply": {"question": "Which?", "response": "It barks. The answer is B."},
    "think": {"question": "Which?", "response": "<think>It barks.</think>dog"},
    "gsm8k": {"question": "Which?", "answer": "It barks.\n#### dog"},
    "alpaca": {"instruction": "Which?", "input": "", "output": "It barks. The answer is (B) dog."},
    "prompt_completion": {"prompt": "Which?", "completion": "It barks. The answer is B."},
    "generations": {"problem": "Which?", "answer": "dog", "generations": ["<think>It barks.</think>"]},
    "messages": {
        "messages": [
            {"role": "system", "content": "Choose."},
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "It barks. The answer is B."},
        ]
    },
}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("options", [{"Options": ["cat", "dog"]}, {"A": "cat", "B": "dog"}])
def test_options_beside_a_reply_belong_to_the_question_in_every_layout(tmp_path, name, options):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**MARKED[name], **options}) + "\n")
    data = {"train": str(tmp_path / "rows.jsonl"), "validation_size": 0, "answer_type": "choice"}
    loaded = survey(Config.model_validate({"data": data}))
    assert not list(loaded.rejects)
    (sample,) = loaded.splits["train"]
    assert loaded.report["columns"] == {"train: rows": f"columns: {name}"}
    assert sample.question.endswith("Which? Answer choices: (A) cat, (B) dog.")
    assert (sample.answer, sample.choices, sample.rationales) == ("B", ("cat", "dog"), ("It barks.",))
    if sample.turns:
        assert sample.turns[-1] == ("user", "Which? Answer choices: (A) cat, (B) dog.")


def test_options_of_a_program_are_no_options():
    row = {**MARKED["reply"], "options": {"temperature": 0.7}}
    assert guess_columns([row], "f").fields(row).options is None
    with pytest.raises(RowError, match="no options are recognised"):
        guess_columns([row], "f").fields({**row, "options": "cat or dog"})


def test_a_truth_value_beside_options_is_the_place_of_one(tmp_path):
    rows = [{"question": f"q{n}", "choices": ["yes", "no"], "answer": n} for n in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "validation_size": 0, "answer_type": "bool"}
    loaded = survey(Config.model_validate({"data": data}))
    assert [sample.answer for sample in loaded.splits["train"]] == ["yes", "no"]


@pytest.mark.parametrize(
    ("text", "answer", "texts"),
    [
        ("Answer Choices:\nA. cat\nB. dog", "B", ("cat", "dog")),
        ("Options:\n1. cat\n2. dog", "2", ("cat", "dog")),
        ("1) cat\n2) dog\n", "2", ("cat", "dog")),
    ],
)
def test_options_in_lines_may_be_numbered_and_have_a_heading(text, answer, texts):
    options = read_options(text)
    assert options.texts == texts
    assert chosen(answer, options, Convention()) == ("letter", 1)


def test_options_that_the_question_lists_with_other_letters_are_refused():
    row = {"question": "Which?\nA) a dog\nB) a cat", "options": ["a cat", "a dog"], "answer": "B"}
    with pytest.raises(RowError, match="in another order than choices: B, A"):
        guess_columns([row], "f").fields(row)
    assert with_choices("Is A) a dog a pet?", ["a cat", "a dog"]).endswith("(A) a cat, (B) a dog.")
