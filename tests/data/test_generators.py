"""The embedded tasks: right answers, rationales that lead to them, unique questions, parts that share none."""

from __future__ import annotations

import re

import pytest

from pst_dist.data.sources.generators import GENERATOR_TASKS, GENERATORS, generate
from pst_dist.errors import ConfigError


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_are_a_pure_function_of_rows_and_seed(name):
    first = GENERATORS[name](50, 3)
    assert first == GENERATORS[name](50, 3)
    assert [sample.question for sample in first] != [sample.question for sample in GENERATORS[name](50, 4)]


@pytest.mark.parametrize("name", GENERATORS)
def test_fewer_rows_are_the_beginning_of_more_rows(name):
    assert GENERATORS[name](20, 0) == GENERATORS[name](60, 0)[:20]


@pytest.mark.parametrize("name", GENERATORS)
def test_questions_are_unique_and_the_parts_share_none_whatever_the_seeds(name):
    parts = [GENERATORS[name](400, seed, part=part) for seed, part in ((0, "train"), (7, "validation"), (0, "test"))]
    questions = [{sample.question for sample in part} for part in parts]
    assert [len(part) for part in questions] == [400, 400, 400]
    assert len(set.union(*questions)) == 1200
    assert len({sample.id for part in parts for sample in part}) == 1200


@pytest.mark.parametrize("name", GENERATORS)
def test_answers_are_canonical_for_the_task_that_scores_them_and_no_class_is_rare(name):
    task = GENERATOR_TASKS[name]
    samples = GENERATORS[name](600, 1)
    assert all(task.gold(sample.answer) == sample.answer for sample in samples)
    if task.answer_type in ("bool", "choice"):
        answers = [sample.answer for sample in samples]
        for answer in set(answers):
            assert 0.8 / len(set(answers)) < answers.count(answer) / 600 < 1.2 / len(set(answers))


def test_coin_flips_are_counted_right():
    for sample in GENERATORS["coin_flip"](200, 5):
        flips = sample.question.count(" flips it.")
        assert sample.answer == ("yes" if flips % 2 == 0 else "no")
        assert sample.rationales[0].endswith("So it is heads up." if flips % 2 == 0 else "So it is not heads up.")


def test_last_letters_are_those_of_the_words():
    for sample in GENERATORS["last_letters"](200, 5, words=5, shortest=2, longest=4):
        words = sample.question.removeprefix("Join the last letters of: ").split()
        assert len(words) == 5
        assert all(2 <= len(word) <= 4 for word in words)
        assert sample.answer == "".join(word[-1] for word in words)
        assert all(f"{word} ends in {word[-1]}" in sample.rationales[0] for word in words)


def test_shuffled_objects_follow_every_swap():
    for sample in GENERATORS["shuffled_objects"](200, 5, swaps=4):
        holds = dict(re.findall(r"(\w+) has (\w+)", sample.question.split(".")[0]))
        swaps = re.findall(r"(\w+) and (\w+) swap", sample.question)
        assert len(swaps) == 4
        for one, other in swaps:
            holds[one], holds[other] = holds[other], holds[one]
        asked = re.search(r"What does (\w+) have", sample.question).group(1)
        options = dict(re.findall(r"\(([ABC])\) (\w+)", sample.question))
        assert options[sample.answer] == holds[asked]


def test_arithmetic_stays_in_its_range_and_its_worked_lines_are_true():
    for sample in GENERATORS["arithmetic"](300, 5, steps=4, largest=30):
        lines = re.findall(r"(\d+) ([+\-*]) (\d+) = (\d+)\.", sample.rationales[0])
        assert len(lines) == 4
        value = re.search(r"has (\d+)", sample.question).group(1)
        for left, sign, right, result in lines:
            assert left == value
            assert int(result) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
            assert 1 <= int(result) <= 30
            value = result
        assert sample.answer == value


def test_a_spec_names_its_difficulty():
    name, samples = generate("gen:last_letters?rows=30&seed=2&words=2", "train")
    assert name == "last_letters"
    assert samples == GENERATORS["last_letters"](30, 2, part="train", words=2)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("gen:coinflip?rows=3", "no generator 'coinflip'"),
        ("gen:coin_flip?row=3", "no parameter 'row'"),
        ("gen:coin_flip?rows=many", "not a whole number"),
        ("gen:coin_flip?rows=0", "rows=0 is not in"),
        ("gen:coin_flip?flips=99", "flips=99 is not in 1..20"),
        ("gen:coin_flip?rows=500&flips=1", "of the 500 different questions requested"),
        ("gen:coin_flip?part=dev", "part='dev' is not one of"),
        ("gen:coin_flip?rows", "not a whole number"),
    ],
)
def test_a_spec_that_cannot_be_met_says_why(spec, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        generate(spec)


@pytest.mark.parametrize("name", GENERATORS)
def test_further_wordings_are_other_texts_of_the_same_rows(name):
    plain, worded = GENERATORS[name](40, 2), GENERATORS[name](40, 2, wordings=4)
    for one, more in zip(plain, worded, strict=True):
        assert (one.question, one.answer) == (more.question, more.answer)
        assert len(more.rationales) == len(set(more.rationales)) == 4 and more.rationales[:1] == one.rationales


def test_all_wordings_say_the_same_things():
    for sample in GENERATORS["last_letters"](50, 5, wordings=4):
        words = sample.question.removeprefix("Join the last letters of: ").split()
        for text in sample.rationales:
            assert all(word in text for word in words) and sample.answer in text
    for sample in GENERATORS["arithmetic"](50, 5, wordings=4):
        usual = re.findall(r"= (\d+)", sample.rationales[0])
        assert all(result in re.findall(r"\d+", text) for text in sample.rationales for result in usual)
    for sample in GENERATORS["coin_flip"](50, 5, wordings=4):
        sides = [re.findall(r"\b(heads|tails)\b", text)[:6] for text in sample.rationales]
        assert all(found == sides[0] for found in sides)
    for sample in GENERATORS["shuffled_objects"](50, 5, wordings=4):
        assert all(text.endswith(f": {sample.answer}.") for text in sample.rationales)


def test_more_wordings_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="wordings=5"):
        generate("gen:arithmetic?rows=3&wordings=5")
