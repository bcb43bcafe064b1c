"""What counts as a right answer: the published rules, the published teacher accuracies, the generic tasks."""

from __future__ import annotations

import json
import pickle

import pytest

from pst_dist.data.sample import ANSWER_TYPES
from pst_dist.data.tasks import TASKS, get_task
from pst_dist.errors import ConfigError

TWELVE = (
    "single_eq addsub multiarith gsm8k aqua svamp date_understanding tracking_shuffled_objects "
    "last_letter_concatenation coin_flip commonsense_qa strategy_qa"
).split()


def test_the_twelve_tasks_are_there_in_the_order_of_the_published_tables():
    assert list(TASKS)[:12] == TWELVE


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("svamp", " $1,051.50 in all", "1051.5"),
        ("svamp", " 51.0", "51"),
        ("gsm8k", " 51.0", "51.0"),
        ("gsm8k", " 1,000 or -3", "1000"),
        ("single_eq", " -0.0", "0"),
        ("multiarith", " none", None),
        ("aqua", " (B) or C", "B"),
        ("aqua", " the answer", None),
        ("date_understanding", " (F).", "F"),
        ("tracking_shuffled_objects", " DC", "C"),
        ("coin_flip", ' "Yes, the coin is heads up."', "yes"),
        ("coin_flip", " nobody knows: no.", "no"),
        ("strategy_qa", " yes!", None),
        ("last_letter_concatenation", ' "y a.j\no".', "yajo"),
        ("last_letter_concatenation", ' " "', None),
        ("arithmetic", "So 12 pens.", "12"),
    ],
)
def test_the_first_candidate_is_taken_in_canonical_form(task, text, expected):
    assert get_task(task).cleanse(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "numeric", "exact"),
    [("43", "43", True, True), ("43.0000001", "43", True, False), ("43.1", "43", False, False)],
)
def test_some_number_tasks_compare_within_a_millionth_and_others_as_strings(prediction, gold, numeric, exact):
    assert get_task("svamp").is_correct(prediction, gold) is numeric
    assert get_task("gsm8k").is_correct(prediction, gold) is exact


def test_numbers_beyond_a_float_are_compared_by_their_digits():
    huge = "9" * 400
    assert get_task("svamp").is_correct(huge, huge)
    assert not get_task("svamp").is_correct(huge, huge[:-1] + "8")


def test_a_parse_failure_is_never_right():
    assert not get_task("coin_flip").is_correct(None, "yes")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("3 and 4 make 7 --> 7 or 8", "7"), ("3 and 4 make 7", "7"), ("nothing", None), ("3 --> none", None)],
)
def test_without_its_marker_the_last_candidate_counts(completion, expected):
    assert get_task("gsm8k").extract(completion, "-->") == expected


def test_with_no_marker_asked_for_the_first_candidate_counts():
    assert get_task("gsm8k").extract("7, because 3 and 4 make 7; not 8", None) == "7"


@pytest.mark.parametrize(
    ("answer_type", "text", "expected"),
    [
        ("text", "  New   York ", "New York"),
        ("number", "It is 007.50 euros", "7.5"),
        ("number", "about 7.50 euros", None),
        ("number", "4x", None),
        ("number", "3 or 4", None),
        ("number", r"so \boxed{\frac{1}{2}}", "0.5"),
        ("choice", "I think (c) is it", "C"),
        ("choice", "I think D is it", "D"),
        ("choice", "D is it", "D"),
        ("choice", "B. dog", "B"),
        ("choice", "b)", "B"),
        ("choice", "K", "K"),
        ("choice", "C, as A and B are wrong", "C"),
        ("choice", "(B) or (C)", None),
        ("choice", "B or C", None),
        ("choice", "a dog", None),
        ("bool", "No.", "no"),
        ("date", "on 2021-4-30", "04/30/2021"),
        ("date", "1/2/1999", "01/02/1999"),
        ("date", "13/13/1999", None),
        ("date", "02/30/1999", None),
    ],
)
def test_generic_tasks_serve_rows_of_no_named_task(answer_type, text, expected):
    assert get_task(None, answer_type).cleanse(text) == expected


def test_a_gold_date_is_a_date_and_no_moment_of_it():
    task = get_task(None, "date")
    assert task.gold("2021-04-30T00:00:00") == task.gold("2021-04-30") == "04/30/2021"
    with pytest.raises(ValueError, match="contains more than a date"):
        task.gold("2021-04-30 10:00")


def test_a_gold_yes_or_no_says_so_and_does_not_begin_a_sentence():
    task = get_task(None, "bool")
    assert [task.gold(text) for text in ("Yes.", "No, it cannot.", " no - never", '"yes"')] == [
        "yes",
        "no",
        "no",
        "yes",
    ]
    for text in ("No one knows", "not yes", "It is no secret"):
        with pytest.raises(ValueError, match="contains more than yes or no"):
            task.gold(text)


def test_without_name_and_type_the_answer_is_free_text_compared_without_case():
    task = get_task(None)
    assert task.answer_type == "text"
    assert task.is_correct("new york.", "New York")
    assert not task.is_correct("york", "New York")
    assert {get_task(None, kind).answer_type for kind in ANSWER_TYPES} == set(ANSWER_TYPES)


@pytest.mark.parametrize(
    ("task", "value", "expected"),
    [
        ("svamp", 5.0, "5"),
        ("svamp", 1e-7, "0.0000001"),
        ("svamp", "\u22123", "-3"),
        ("svamp", "$3 million", "3000000"),
        ("gsm8k", 1200, "1200"),
        ("gsm8k", "51.0", "51.0"),
        ("gsm8k", "12,5", "12.5"),
        ("strategy_qa", True, "yes"),
        ("strategy_qa", "False", "no"),
        ("aqua", "(b)", "B"),
        ("aqua", "C) 12", "C"),
    ],
)
def test_gold_answers_may_come_in_the_forms_that_data_has(task, value, expected):
    assert get_task(task).gold(value) == expected


@pytest.mark.parametrize(
    ("task", "value", "reason"),
    [
        ("svamp", "12 of 15", "'12 of 15' is not a number: it has 'of 15' after the number"),
        ("svamp", "1/3", "which task svamp requires"),
        ("svamp", "many", "is not a number"),
        ("svamp", True, "is true or false"),
        ("aqua", "Apple", "not a choice letter from A to E"),
        ("aqua", 7, "is a number"),
        ("coin_flip", 1, "is a number, expected yes or no"),
        ("coin_flip", ["yes"], "is a list"),
        ("svamp", float("nan"), "not a finite number"),
    ],
)
def test_a_gold_answer_that_fits_no_type_says_why(task, value, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        get_task(task).gold(value)


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [("1/2", "0.5", True), ("0.50", "1/2", True), ("0.333333", "1/3", False), ("50", "50", True), ("x", "5", False)],
)
def test_numbers_of_no_named_task_are_compared_by_value(prediction, gold, right):
    assert get_task(None, "number").is_correct(prediction, gold) is right


@pytest.mark.parametrize("text", ["50 %", "50%", "1/2", "0.5", r"$\frac{1}{2}$", r"50\%"])
def test_a_percentage_is_a_share_only_where_the_task_says_so(text):
    assert get_task("proportion").gold(text) == get_task("proportion").cleanse(text) == "0.5"
    assert get_task(None, "number").gold(text) == ("50" if "%" in text else "0.5")


def test_an_output_without_its_marker_is_never_guessed_from_for_rows_of_no_named_task():
    said = "3 and 4 make 7, so (B), on 4/30/2021"
    assert [get_task(None, kind).extract(said, "-->") for kind in ("number", "choice", "date")] == [None] * 3
    assert get_task(None, "number").extract("3 and 4 make 7 --> 7 apples", "-->") == "7"


def test_an_unknown_task_is_answered_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'last_letter_concatenation'"):
        get_task("last_letters_concat")
    with pytest.raises(ConfigError, match="has number answers"):
        get_task("svamp", "text")
    with pytest.raises(ConfigError, match="not one of number, choice"):
        get_task(None, "essay")


def test_tasks_cross_process_borders():
    assert pickle.loads(pickle.dumps(get_task("aqua"))) == get_task("aqua")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "published"), [("addsub", "76.71"), ("single_eq", "81.50"), ("svamp", "64.20"), ("strategy_qa", "53.45")]
)
def test_rescoring_the_teacher_gives_its_published_accuracy(shared_data, name, published):
    # The published number is over all rows, train and test, the first completion of each, the first candidate in it.
    task = get_task(name)
    data = json.loads((shared_data / f"teacher_completions_davinci002/D_{name}.json").read_text())["data"]
    right = sum(
        task.is_correct(task.cleanse(entries[0]["completion"]), task.gold(entries[0]["answer"]))
        for entries in data.values()
    )
    assert f"{100 * right / len(data):.2f}" == published
