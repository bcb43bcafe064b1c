"""New questions: parsing them, and keeping away from those that exist."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pst_dist.data.tasks import get_task
from pst_dist.teacher.asking import samplings
from pst_dist.teacher.messages import Reply, Usage
from pst_dist.teacher.near import NearIndex, jaccard, pieces_of
from pst_dist.teacher.new_questions import Inventing, judge_proposal, read_proposals
from pst_dist.teacher.prompts import make_prompt
from pst_dist.teacher.questions import Question
from pst_dist.teacher.settings import TeachSettings

TASK = get_task("svamp")
GIVEN = Question(id="g-1", text="Tom has 3 red apples and buys 4 green ones. How many apples has he?", gold="7")
SETTINGS = TeachSettings(
    output=Path("o.jsonl"), endpoint="http://localhost/v1", model="m", samples=3, new_questions=3, near=0.7
)


def said(text: str, finish: str = "stop") -> Reply:
    return Reply(text=text, finish=finish, usage=Usage(prompt=3, completion=7))


def proposals(text: str, *, finish: str = "stop", given=(GIVEN.text,), avoid=(), settings=SETTINGS):
    work = Inventing(GIVEN, settings, True)
    return read_proposals([work], {work.key: said(text, finish)}, TASK, settings, given, avoid)


BLOCKS = """Sure! Here are three:

1. **Question:** A pond has 12 frogs and 5 jump out. How many frogs are left?
**Reasoning:** 12 - 5 = 7.
**Answer:** 7 frogs

Question 2: Mia reads 20 pages on Monday
and 15 on Tuesday. How many pages is that?
Rationale: 20 + 15 = 35
Answer: 35

### Question: A shelf holds 9 jars. How many jars do 6 shelves hold?
Reasoning: 9 * 6 = 54. The answer is 54.
Answer: The answer is 54.
"""


def test_blocks_are_parsed_in_the_forms_that_models_write():
    found = proposals(BLOCKS)
    assert [(one.question.text.split()[0], one.question.gold, one.reasoning[:9]) for one in found.kept] == [
        ("A", "7", "12 - 5 = "),
        ("Mia", "35", "20 + 15 ="),
        ("A", "54", "9 * 6 = 5"),
    ]
    assert "and 15 on Tuesday" in found.kept[1].question.text
    assert {one.parent for one in found.kept} == {"g-1"} and not +found.dropped
    assert len({one.question.id for one in found.kept}) == 3


def test_the_last_block_of_a_cut_reply_is_left_out():
    found = proposals(BLOCKS, finish="length")
    assert len(found.kept) == 2 and found.dropped["cut"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "I cannot do that.",
        "Question: What?\nReasoning: hm",
        "Question: How many are 2 and 3?\nReasoning: The answer is 6.\nAnswer: 5",  # it contradicts itself
        "Question: How many?\nReasoning: hm\nAnswer: many",
        "Question: " + "very " * 2000 + "long?\nReasoning: hm\nAnswer: 5",
    ],
)
def test_what_is_no_question_with_an_answer_is_dropped(text):
    assert proposals(text).kept == []


def test_questions_that_exist_are_dropped_and_counted():
    text = "\n".join(
        f"Question: {question}\nReasoning: r\nAnswer: 5"
        for question in (
            "Tom has 3 red apples and buys 4 green ones. How many apples does he have?",  # nearly the given one
            "A pond has 12 frogs and 5 jump out. How many frogs are left?",
            "A pond has 12 frogs and 5 jump out. How many frogs are left then?",  # nearly the one before
            "On a bus are 30 people and 8 get off. How many people are on the bus?",  # a test question, other numbers
        )
    )
    test = "On a bus are 41 people and 19 get off. How many people are on the bus?"
    found = proposals(text, avoid=[test])
    assert [one.question.text[:6] for one in found.kept] == ["A pond"]
    assert found.dropped == {"near_given": 1, "near_new": 1, "near_avoided": 1, "unparsed": 0}


def checked(answers: list[str], **more):
    settings = TeachSettings(
        output=Path("o.jsonl"), endpoint="http://localhost/v1", model="m", samples=len(answers), new_questions=1, **more
    )
    (one,) = proposals("Question: How many are 2 frogs and 5 frogs?\nReasoning: 2 + 5 = 7\nAnswer: 7").kept
    works = samplings([one.question], [make_prompt("few_shot", TASK, (), 1)], settings, True)
    replies = {
        f"{work.key}/1": said(f"Way {n}. The answer is {answer}.")
        for n, (work, answer) in enumerate(zip(works, answers, strict=True))
    }
    return judge_proposal(one, works, replies, TASK, settings)


def test_a_new_question_is_kept_when_independent_samples_give_its_answer():
    kept = checked(["7", "7", "8"])
    assert kept.answer == "7"
    assert [sample.rationale for sample in kept.kept] == ["2 + 5 = 7", "Way 0.", "Way 1."]
    assert checked(["7", "8", "8"]).answer is None, "most samples agree, but on another answer"
    assert checked(["7", "8", "9"]).answer is None, "one sample is not enough"
    assert checked(["7", "7", "8", "8"]).answer is None, "half is not more than half"
    assert checked(["7", "7", "7"], agree=0.9).answer == "7"
    assert checked(["7", "7", "8"], agree=0.9).answer is None


def test_the_checks_do_not_see_the_proposed_answer():
    (one,) = proposals("Question: How many are 2 frogs and 5 frogs?\nReasoning: 2 + 5 = 7\nAnswer: 7").kept
    prompts = [make_prompt(name, TASK, (), 1) for name in ("zero_shot", "few_shot")]
    for work in samplings([one.question], prompts, SETTINGS, True):
        request = work.next_request({})
        assert request is not None and "7" not in " ".join(text for _, text in request.turns)


def test_nearness_is_exact():
    """Against a comparison of all pairs: nothing that reaches the threshold is missed, whatever the order."""
    random.seed(3)
    words = "tom mia has buys red green apples pears 3 4 12 how many are left in all bus frogs".split()
    texts = [" ".join(random.choices(words, k=random.randint(1, 12))) for _ in range(300)]
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        index = NearIndex(threshold)
        for text in texts[:200]:
            index.add(text)
        for text in texts[200:] + texts[:20]:
            best = max(jaccard(pieces_of(text), pieces_of(other)) for other in texts[:200])
            found = index.closest(text)
            assert (found[1] if found else 0.0) == (pytest.approx(best) if best >= threshold - 1e-9 else 0.0)


def test_numbers_can_be_ignored():
    one, other = "Tom has 3 apples.", "Tom has 1,250 apples!"
    plain, blind = NearIndex(1.0), NearIndex(1.0, ignore_numbers=True)
    plain.add(one)
    blind.add(one)
    assert plain.closest(other) is None and blind.closest(other) == (one, 1.0)
