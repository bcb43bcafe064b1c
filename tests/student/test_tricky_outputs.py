"""Outputs that are easy to misread, labelled by hand as Fine-tune-CoT's evaluator reads them.

Two readings are in use: of a whole completion, in which the first candidate after `-->` counts and without the marker
the last one of all; and of an answer that comes first, in which the first candidate counts. A label says whether the
output is right for that gold answer under the published rule, also where a person would be kinder or stricter.
"""

import pytest

from pst_dist.data.tasks import TASKS, get_task

RIGHT, WRONG = True, False

COMPLETIONS = {
    # Compared as numbers within a millionth.
    "single_eq": [
        ("3 + 4 = 7 --> 7", "7", RIGHT),
        ("3 + 4 = 7 --> 7.0", "7", RIGHT),
        ("--> $1,250.50 in all", "1250.5", RIGHT),
        ("--> 1,250", "1250", RIGHT),
        ("--> 7 apples, not 8", "7", RIGHT),
        ("--> not 8 but 7", "7", WRONG),  # the first candidate after the marker
        ("It is 8, no, 7", "7", RIGHT),  # no marker: the last candidate
        ("It is 7 of 8", "7", WRONG),
        ("--> 0.75", "0.75", RIGHT),
        ("--> .75", "0.75", WRONG),  # digits must stand before a point: 75
        ("--> 3/4", "0.75", WRONG),  # a fraction is read as its numerator
        ("--> 7.0000005", "7", RIGHT),
        ("--> 7.00001", "7", WRONG),
        ("", "7", WRONG),
        ("-->", "7", WRONG),
        ("7 -->", "7", WRONG),  # the marker came, nothing after it
    ],
    "addsub": [
        ("--> -3", "3", WRONG),
        ("--> 10-3", "10", RIGHT),
        ("so 10-3", "3", WRONG),  # the last candidate is -3
        ("so 10 - 3", "3", RIGHT),
        ("--> 3 --> 4", "3", RIGHT),  # the first marker counts
        ("4 --> none. 3", "3", RIGHT),
        ("--> seven", "7", WRONG),
        ("--> 7.", "7", RIGHT),
        ("--> 7.50", "7.5", RIGHT),
        ("--> 1,2", "12", RIGHT),  # commas go wherever they stand
        ("--> 1 2", "12", WRONG),
        ("--> 07", "7", RIGHT),
        ("--> 5km", "5", RIGHT),
        ("--> A7", "7", RIGHT),
    ],
    "svamp": [
        ("--> 145", "145", RIGHT),
        ("--> 145.00 dollars", "145", RIGHT),
        ("--> -0", "0", RIGHT),
        ("--> 1e3", "1000", WRONG),  # read as 1
        ("--> 2 x 3 = 6", "6", WRONG),
        ("2 x 3 = 6", "6", RIGHT),
        ("--> 100%", "100", RIGHT),
        ("--> 50 % of 2", "50", RIGHT),
        ("->  9", "9", RIGHT),  # not the marker, but the last candidate all the same
        ("-> 9 of 10", "9", WRONG),
        ("-- > 9 of 10", "9", WRONG),
        ("--> 1.234.567", "1234567", WRONG),  # 1.234
        ("the answer is \n\n--> \n 12", "12", RIGHT),
        ("--> 12:30", "12", RIGHT),
    ],
    # Compared as strings: the same number written otherwise is wrong.
    "gsm8k": [
        ("--> 18", "18", RIGHT),
        ("--> 18.0", "18", WRONG),
        ("--> 18.", "18", RIGHT),  # a full stop is no decimal point
        ("--> 018", "18", WRONG),
        ("--> $70,000", "70000", RIGHT),
        ("--> 70 000", "70000", WRONG),
        ("--> +18", "18", RIGHT),
        ("--> -18", "18", WRONG),
        ("--> 18/1", "18", RIGHT),
        ("#### 18", "18", RIGHT),
        ("#### 18 (of 20)", "18", WRONG),
        ("--> 1.80", "1.8", WRONG),
        ("--> eighteen (18)", "18", RIGHT),
        ("She has 9 * 2 = 18", "18", RIGHT),
    ],
    "multiarith": [
        ("--> 6", "6", RIGHT),
        ("--> 6.0", "6", WRONG),
        ("--> 6 boxes of 5", "6", RIGHT),
        ("--> each 5, so 6", "6", WRONG),
        ("6 boxes", "6", RIGHT),
        ("5 each, 6 boxes", "6", RIGHT),
        ("6 boxes of 5 each", "6", WRONG),
        ("--> six", "6", WRONG),
        ("5 boxes --> six", "5", WRONG),  # before the marker nothing counts
        ("--> 1,000,000", "1000000", RIGHT),
        ("--> 6-1", "6", RIGHT),
    ],
    # The first capital letter of the range, wherever it stands.
    "aqua": [
        ("--> B", "B", RIGHT),
        ("--> (B)", "B", RIGHT),
        ("--> b", "B", WRONG),
        ("--> (b)", "B", WRONG),
        ("--> The answer is B", "B", RIGHT),
        ("--> Answer: B", "B", WRONG),  # the A of Answer
        ("--> BECAUSE", "B", RIGHT),
        ("--> F or B", "B", RIGHT),  # F is no choice
        ("A or B", "B", RIGHT),
        ("B, A is out", "B", WRONG),
        ("--> A) 21", "A", RIGHT),
        ("--> 21", "A", WRONG),
        ("--> AB", "A", RIGHT),
        ("--> none of them", "E", WRONG),
        ("--> None of them (E)", "E", RIGHT),
    ],
    "commonsense_qa": [
        ("--> (C) bank", "C", RIGHT),
        ("--> bank (C)", "C", RIGHT),
        ("--> Bank (C)", "C", WRONG),  # the B of Bank
        ("--> Canada", "C", RIGHT),
        ("--> c", "C", WRONG),
        ("People bank at a bank (C)", "C", RIGHT),
        ("(C), said Ben", "C", WRONG),  # without a marker the last: the B of Ben
        ("--> (D)(C)", "C", WRONG),
        ("--> G", "C", WRONG),
        ("--> \n\nC", "C", RIGHT),
    ],
    "date_understanding": [
        ("--> (F)", "F", RIGHT),
        ("--> F", "F", RIGHT),
        ("--> 05/04/2019", "A", WRONG),
        ("--> (A) 05/04/2019", "A", RIGHT),
        ("--> April 5th (B)", "B", WRONG),  # the A of April
        ("--> Monday (B)", "B", RIGHT),
        ("--> Friday (B)", "B", WRONG),  # the F of Friday
        ("It is December, so (C)", "C", RIGHT),
        ("(C) is in December", "C", WRONG),
        ("--> G", "F", WRONG),
        ("--> f", "F", WRONG),
        ("", "A", WRONG),
    ],
    "tracking_shuffled_objects": [
        ("--> A", "A", RIGHT),
        ("--> (C).", "C", RIGHT),
        ("--> D or C", "C", RIGHT),
        ("--> Alice has it (B)", "B", WRONG),
        ("Claire gets the ball (B)", "B", RIGHT),
        ("(B) is for Claire", "B", WRONG),
        ("--> the green ball", "B", WRONG),
        ("--> Bob: (C)", "C", WRONG),
        ("--> c", "C", WRONG),
    ],
    # Lower case; only quotes, space, dot, colon and comma part words.
    "strategy_qa": [
        ("--> yes", "yes", RIGHT),
        ("--> Yes.", "yes", RIGHT),
        ("--> YES, it is", "yes", RIGHT),
        ("--> yes!", "yes", WRONG),  # an exclamation mark belongs to the word
        ("--> (yes)", "yes", WRONG),
        ('--> "no"', "no", RIGHT),
        ("--> know", "no", WRONG),
        ("--> nothing is known", "no", WRONG),
        ("--> no, yes", "no", RIGHT),
        ("--> it is not so", "no", WRONG),
        ("yes and no", "no", RIGHT),
        ("no; yes", "yes", RIGHT),
        ("no;yes", "yes", WRONG),
        ("--> yes/no", "yes", WRONG),
        ("--> answer:yes", "yes", RIGHT),
        ("--> true", "yes", WRONG),
        ("--> 'yes'", "yes", RIGHT),
        ("--> yes-and-no", "yes", WRONG),
    ],
    "coin_flip": [
        ("It is heads up --> yes", "yes", RIGHT),
        ("--> no\nyes", "no", RIGHT),
        ("--> No: it is tails up", "no", RIGHT),
        ("--> heads up", "yes", WRONG),
        ("--> yes.no", "yes", RIGHT),
        ("nobody flips --> no", "no", RIGHT),
        ("nobody flips, no one", "no", RIGHT),
        ("So the coin is, yes", "yes", RIGHT),
        ("Yes --> ", "yes", WRONG),
        ("--> Yes?", "yes", WRONG),
    ],
    # Quotes, dots and white space go, then the whole is compared.
    "last_letter_concatenation": [
        ("--> yajo", "yajo", RIGHT),
        ('--> "yajo".', "yajo", RIGHT),
        ("--> y a j o", "yajo", RIGHT),
        ("--> y.a.j.o.", "yajo", RIGHT),
        ("--> y, a, j, o", "yajo", WRONG),  # commas stay
        ("--> y-a-j-o", "yajo", WRONG),
        ("--> Yajo", "yajo", WRONG),
        ("--> the answer is yajo", "yajo", WRONG),
        ("yajo", "yajo", RIGHT),
        ("The letters are yajo", "yajo", WRONG),  # without a marker the whole output is the candidate
        ("--> 'yajo'\n", "yajo", RIGHT),
        ("--> \u201cyajo\u201d", "yajo", WRONG),  # curly quotes stay
        ("--> yajo --> k", "yajo", WRONG),
        ("-->", "yajo", WRONG),
    ],
}

FIRST = [
    ("single_eq", " 7 because 3 + 4 = 7", "7", RIGHT),
    ("single_eq", " of 8, 7", "7", WRONG),
    ("addsub", " -3.0", "-3", RIGHT),
    ("svamp", " 1,051", "1051", RIGHT),
    ("gsm8k", " 1,051.0", "1051", WRONG),
    ("multiarith", "", "6", WRONG),
    ("aqua", " (D) or (E)", "D", RIGHT),
    ("aqua", " A number: D", "D", WRONG),
    ("commonsense_qa", " C", "C", RIGHT),
    ("commonsense_qa", " c", "C", WRONG),
    ("date_understanding", " (B) 01/02/1999", "B", RIGHT),
    ("tracking_shuffled_objects", " DB", "B", RIGHT),
    ("strategy_qa", " No, since yes is unknown", "no", RIGHT),
    ("strategy_qa", " unknown", "no", WRONG),
    ("coin_flip", " yesterday no", "no", RIGHT),
    ("coin_flip", " yes --> no", "yes", RIGHT),
    ("last_letter_concatenation", ' "n k"', "nk", RIGHT),
    ("last_letter_concatenation", " nk --> nk", "nk", WRONG),
]


def test_there_are_more_than_enough_of_them_over_all_twelve_tasks():
    assert set(COMPLETIONS) == set(list(TASKS)[:12]) == {task for task, *_ in FIRST}
    assert sum(map(len, COMPLETIONS.values())) + len(FIRST) >= 120
    assert all(
        min(sum(right is label for *_, right in rows) for label in (RIGHT, WRONG)) for rows in COMPLETIONS.values()
    )


@pytest.mark.parametrize(
    ("task", "output", "gold", "right"), [(task, *row) for task, rows in COMPLETIONS.items() for row in rows]
)
def test_a_completion_is_read_as_the_published_evaluator_reads_it(task, output, gold, right):
    rules = get_task(task)
    assert rules.gold(gold) == gold, "the gold answer is one"
    assert rules.is_correct(rules.extract(output, "-->"), gold) is right


@pytest.mark.parametrize(("task", "output", "gold", "right"), FIRST)
def test_an_answer_that_comes_first_is_read_up_to_its_first_candidate(task, output, gold, right):
    rules = get_task(task)
    assert rules.is_correct(rules.cleanse(output), gold) is right
