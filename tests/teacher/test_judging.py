"""Which replies become rationales."""

from __future__ import annotations

from pathlib import Path

import pytest

from pst_dist.data.tasks import get_task
from pst_dist.teacher.asking import samplings
from pst_dist.teacher.judging import answer_in, judge_all, strict_task
from pst_dist.teacher.messages import Reply, Usage
from pst_dist.teacher.prompts import make_prompt
from pst_dist.teacher.questions import Question
from pst_dist.teacher.report import quality, report_lines
from pst_dist.teacher.settings import TeachSettings

NUMBER = get_task(None, "number")


def settings(**more) -> TeachSettings:
    base = {"output": Path("o.jsonl"), "endpoint": "http://localhost/v1", "model": "m"}
    return TeachSettings(**base | more)


def said(text: str, finish: str = "stop", thought: str | None = None) -> Reply:
    return Reply(text=text, finish=finish, usage=Usage(prompt=3, completion=7), thought=thought)


def judged(prompt: str, texts: list, *, task=NUMBER, gold: str | None = "7", choices=(), **more):
    """One question asked with one prompt; each of `texts` is a reply or, for two steps, a pair of them."""
    asked = settings(samples=len(texts), **more)
    question = Question(id="q", text="What is 3 + 4?", gold=gold, choices=choices)
    works = samplings([question], [make_prompt(prompt, task, (), 1)], asked, True)
    replies = {}
    for work, text in zip(works, texts, strict=True):
        steps = text if isinstance(text, tuple) else (text,)
        for number, step in enumerate(steps, 1):
            replies[f"{work.key}/{number}"] = step if isinstance(step, Reply) else said(step)
    (answered,) = judge_all(works, replies, task, asked)
    return answered


def verdicts(answered) -> list[str]:
    return [sample.verdict for sample in answered.samples]


def test_a_reply_is_kept_when_the_task_finds_its_answer_right():
    found = judged(
        "few_shot",
        [
            "3 and 4 are 7. The answer is 7.",
            "3 + 4 = 8, so the answer is 8.",
            "Three plus four is seven.",
            "7",
            "3 and 4  are 7.  The answer is 7.0.",
            said("3 and 4 make", "length"),
            said("no", "refused"),
            said(" "),
            "Adding gives seven. #### 7",
        ],
    )
    assert verdicts(found) == [
        *("kept", "wrong", "unparsed", "no_rationale", "duplicate", "cut", "refused", "empty", "kept")
    ]
    assert [sample.rationale for sample in found.kept] == ["3 and 4 are 7.", "Adding gives seven."]


def test_right_answers_whose_reasoning_is_only_in_a_thought_are_counted():
    replies = [said("The answer is 7.", thought="3 and 4."), said("The answer is 7."), said("The answer is 8.")]
    found = quality([judged("few_shot", replies)], NUMBER)
    assert (found["verdicts"], found["only_thoughts"]) == ({"no_rationale": 2, "wrong": 1}, 1)
    line = "1 right answers have their reasoning only in the thought: the same command with --thoughts keep uses it"
    assert line in report_lines({"quality": found})
    kept = judged("few_shot", replies, thoughts="keep")
    assert [sample.rationale for sample in kept.kept] == ["3 and 4."]


def test_two_steps_take_the_answer_from_the_second_and_the_rationale_from_the_first():
    found = judged(
        "zero_shot",
        [
            ("3 and 4 are counted together.", "7"),
            ("3 and 4 are counted together, again.", "Therefore 7 apples."),
            ("First I add. The answer is 8.", "7"),  # it contradicts itself
            ("I add 3 and 4.", "9"),
            (said("I add 3 and 4 and", "length"),),
            ("I add 3 to 4.", said("the answer", "length")),
        ],
    )
    assert verdicts(found) == ["kept", "kept", "wrong", "wrong", "cut", "cut"]
    assert found.kept[0].rationale == "3 and 4 are counted together."


def test_an_explanation_of_the_gold_answer_is_kept_unless_it_states_another():
    found = judged("explain", ["Because 3 + 4 = 7.", "It is so. The answer is 7.", "In fact the answer is 8."])
    assert verdicts(found) == ["kept", "kept", "wrong"]
    assert [sample.rationale for sample in found.kept] == ["Because 3 + 4 = 7.", "It is so."]
    assert [sample.answer for sample in found.samples] == [None, None, None], "it was told, so it shows nothing"


@pytest.mark.parametrize(
    "answers, agree, wanted",
    [
        (["7", "7", "8"], 0.5, "7"),
        (["7", "7.0", "14/2"], 0.9, "7"),
        (["7", "7", "8", "8"], 0.4, None),  # a tie
        (["7", "7", "8", "9"], 0.5, None),  # half is not more than half
        (["7", "7", "8", "9"], 0.4, "7"),
        (["7"], 0.0, None),  # one sample agrees with nobody
    ],
)
def test_without_a_gold_answer_the_samples_must_agree(answers, agree, wanted):
    # Each has a rationale of its own, so none is a duplicate.
    texts = [f"Way {n}. The answer is {answer}." for n, answer in enumerate(answers)]
    found = judged("few_shot", texts, gold=None, agree=agree)
    assert found.answer == wanted
    for answer, verdict in zip(answers, verdicts(found), strict=True):
        assert verdict == ("kept" if wanted == "7" and answer in ("7", "7.0", "14/2") else "disagrees")


def test_a_thought_is_left_out_or_kept():
    reply = said("<think>Hm. 3, 4.</think>They make 7. The answer is 7.", thought="Earlier.")
    assert judged("few_shot", [reply]).kept[0].rationale == "They make 7."
    kept = judged("few_shot", [reply], thoughts="keep").kept[0].rationale
    assert kept == "Earlier.\n\nHm. 3, 4.\n\nThey make 7."
    assert verdicts(judged("few_shot", [said("<think>Hm. 3", "stop")])) == ["cut"]


def test_a_question_with_an_open_request_is_left_out():
    asked = settings(samples=2)
    works = samplings([Question(id="q", text="?", gold="1")], [make_prompt("zero_shot", NUMBER, (), 1)], asked, True)
    assert judge_all(works, {"q/zero_shot/0/1": said("so")}, NUMBER, asked) == []


@pytest.mark.parametrize("name", ["svamp", "gsm8k", "multiarith"])
@pytest.mark.parametrize(
    "text, wanted",
    [
        ("The answer is 4.", "4"),
        ("The answer is $4.00.", "4"),
        ("The answer is 4 apples.", "4"),
        ("The answer is 2 + 2 = 4.", "4"),  # the rule for students would take the 2
        ("The answer is 5 boxes * 100 dollars = 500 dollars.", "500"),
        ("The answer is 3 or 4.", None),
        ("The answer is about 4.", None),
    ],
)
def test_numbers_of_a_teacher_are_read_strictly(name, text, wanted):
    task = strict_task(get_task(name))
    assert answer_in(text, task, Question(id="q", text="?", gold="4"), whole=False) == wanted


def test_gold_answers_are_compared_by_value():
    assert verdicts(
        judged("few_shot", ["So. The answer is 51."], task=strict_task(get_task("gsm8k")), gold="51.0")
    ) == ["kept"]


@pytest.mark.parametrize(
    "text, whole, wanted",
    [
        ("(B)", True, "B"),
        ("B", True, "B"),
        ("The answer is (C).", False, "C"),
        ("The answer is dog.", False, "B"),
        ("Based on this, (C).", True, "C"),  # Fine-tune-CoT's rule would take the B of "Based"
        ("A cat or a dog.", True, None),
        ("(B) or (C)", True, None),
        ("I think so.", False, None),
    ],
)
def test_letters_of_choices_are_read_strictly(text, whole, wanted):
    question = Question(id="q", text="?", gold="B", choices=("cat", "dog", "cow", "pig", "hen"))
    assert answer_in(text, get_task("commonsense_qa"), question, whole=whole) == wanted


def test_the_report_counts_by_prompt():
    one = judged("few_shot", ["a b c. The answer is 7.", "d e. The answer is 7.", "f. The answer is 8."])
    found = quality([one], NUMBER)
    assert found["samples"] == 3 and found["kept"] == 2 and found["share_kept"] == 0.6667
    assert found["agreement"] == 0.6667 and found["majority_right"] == 1.0
    assert found["by_prompt"]["few_shot"]["words_in_a_kept_rationale"] == {
        "mean": 2.5,
        "median": 3,
        "p95": 3,
        "most": 3,
    }
    assert found["verdicts"] == {"kept": 2, "wrong": 1} and found["questions_kept"] == 1
