"""Whether an explanation reaches the answer before it, and whether it argues for whatever answer stands there."""

from __future__ import annotations

import pytest

from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks.registry import get_task
from pst_dist.evaluation.explanations import (
    conclusion,
    explanation_lines,
    explanation_rows,
    explanation_scores,
    swapped,
)
from pst_dist.student.contexts import Decoded

NUMBERS = get_task("arithmetic")
HALF = "50.0 % ± 25.0 (4 rows)"


@pytest.mark.parametrize(
    ("task", "rationale", "reached"),
    [
        ("arithmetic", "13 - 8 = 5. 5 - 3 = 2. 2 * 2 = 4. So 4 nuts.", "4"),
        ("arithmetic", "13 - 8 = 5. The answer is 5. I have 3 dogs.", "5"),
        ("arithmetic", "Nobody knows.", None),
        ("gsm8k", "There are 3 boxes. 3 * 4 = 12. #### 12", "12"),
        ("last_letter_concatenation", "lfzmq ends in q, enlys ends in s. Together: qs.", "qs"),
        ("last_letter_concatenation", 'The last letter of "Tj" is "j". So, the final answer is "yj".', "yj"),
        ("coin_flip", "Ann flips it: tails. Therefore, the final answer is no, it is tails.", "no"),
        ("coin_flip", "Ann: tails. So it is tails up.", None),
        ("date_understanding", "Today is April 30. The answer is (F).", "F"),
        ("arithmetic", "", None),
        ("arithmetic", None, None),
    ],
)
def test_a_rationales_conclusion_is_read_or_left_unread(task, rationale, reached):
    assert conclusion(get_task(task), rationale) == reached


def answer(text: str, complete: bool = True) -> Decoded:
    return Decoded(text, text, 1, complete, [1], 1.0)


def test_another_answer_comes_from_the_next_row_that_has_a_different_one():
    answers = [answer("4"), answer("4"), answer("7"), answer("9", complete=False), answer("x")]
    assert swapped(answers, ["4", "4", "7", "9", None]) == [2, 2, 0, 0, 0]
    assert swapped([answer("4"), answer("4")], ["4", "4"]) == [None, None]


def test_agreement_and_following_are_those_counted_by_hand():
    samples = [
        ReasoningSample(id=f"r{k}", question="q", answer=gold, answer_type="number", rationales=(f"So {gold}.",))
        for k, gold in enumerate(["4", "5", "6", "7"])
    ]
    own = ["4", "5", "9", None]  # two right, one wrong, one unparsed
    written = ["So 4.", "So 8.", "So 9.", "So 7."]
    forced = [("5", "So 5."), ("4", "So 5."), ("4", "So 1."), (None, "")]
    scores = explanation_scores([NUMBERS] * 4, samples, own, written, forced)
    assert scores is not None
    assert (scores["rows"], scores["read"]) == (3, 3)
    assert scores["agree"]["share"] == pytest.approx(2 / 3)
    assert scores["agree"]["stderr"] == pytest.approx((2 / 9 / 3) ** 0.5)
    assert (scores["agree_when_right"]["share"], scores["agree_when_right"]["rows"]) == (0.5, 2)
    assert (scores["agree_when_wrong"]["share"], scores["agree_when_wrong"]["rows"]) == (1.0, 1)
    assert scores["follows_other"]["share"] == pytest.approx(1 / 3)
    assert scores["returns_to_own"]["share"] == pytest.approx(1 / 3)
    assert scores["teacher_agrees"]["share"] == 1.0
    assert explanation_lines(scores)[0] == (
        "explanations that reach the student's own answer",
        "66.7 % ± 27.2 (3 rows)",
    )


def test_a_line_that_one_evaluation_has_is_shown_beside_the_others():
    share = {"rows": 4, "share": 0.5, "stderr": 0.25}
    both, one = {"agree": share, "agree_when_right": share}, {"agree": share}
    assert explanation_rows([one, None, both]) == [
        ("explanations that reach the student's own answer", [HALF, "not measured", HALF]),
        ("… where the answer is right", ["not measured", "not measured", HALF]),
    ]


def test_without_a_conclusion_nothing_is_claimed():
    sample = ReasoningSample(id="a", question="q", answer="4", answer_type="number")
    assert explanation_scores([NUMBERS], [sample], ["4"], ["No idea."], [(None, "")]) is None
    assert explanation_lines(None) == []
