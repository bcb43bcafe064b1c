"""Mathematical answers: equal by meaning, unparsed where that is not certain, and never slower than the limit."""

from __future__ import annotations

import os
import time

import pytest

from pst_dist.data.tasks import get_task, math_answers
from pst_dist.data.tasks.math_answers import math_answer, same_math
from pst_dist.errors import EnvironmentFault

MATH = get_task(None, "math")


@pytest.fixture(scope="module", autouse=True)
def needs_math_verify():
    pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("1/2", "0.5"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"so $x$ is \boxed{50\%}", "50"),
        (r"$\dfrac12$", ".5"),
        ("1,234", "1234"),
        ("The answer is 12.", "12"),
        ("So 12 pens.", "12"),
        ("2:30", "02:30"),
        ("The answer is 2:30 p.m.", "2:30 PM"),
        ("3 : 4", "3:4"),
        (r"x^2+2x+1", "(x+1)^2"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        ("1/sqrt(2)", r"\sqrt{2}/2"),
        (r"\boxed{2\pi}", "pi * 2"),
        ("x = 5", "5"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        (r"(1, \frac{1}{2})", "(1, 0.5)"),
        (r"6\sqrt{2}\text{ cm}", r"6 \sqrt 2"),
        (r"\text{Even}", "even"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2/2 \\ 2 \end{pmatrix}"),
    ],
)
def test_equal(prediction, gold):
    assert MATH.is_correct(MATH.cleanse(prediction), MATH.gold(gold))


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("2:30", "2:03"),
        ("2:30 am", "2:30 pm"),
        ("2:30", "230"),
        ("2:30", r"\frac{1}{15}"),
        ("0.33", "1/3"),
        (r"\sqrt{2}", "1.4142"),
        ("(x+1)^3", "(x+1)^2"),
        (r"\{1, 2\}", "1"),
        ("3 or 4", "4"),
        ("odd", "even"),
        ("x", "y"),
        ("[1, 2)", "(1, 2)"),
    ],
)
def test_different(prediction, gold):
    found = MATH.cleanse(prediction)
    assert found is not None and not MATH.is_correct(found, MATH.gold(gold))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "I do not know",
        "3 apples or 4 pears",
        r"\boxed{3} or \boxed{4}",
        r"\boxed{3",
        r"\frac{1}{",
        "(x + 1",
        "about 5",
        "x^2 +",
        "first 2x then 3y",
        r"5\text{ or more}",
        "x : y",
        "sqrt(2",
    ],
)
def test_what_is_not_certain_is_unparsed(text):
    assert MATH.cleanse(text) is None
    assert not MATH.is_correct(None, "3")
    with pytest.raises(ValueError, match=r"is not a number, a time or a mathematical expression"):
        MATH.gold(text)


def test_gold_answers_are_stored_in_one_form_that_reads_back():
    for gold, stored in (
        (r"$\frac{1}{2}$", "0.5"),
        (3, "3"),
        (0.25, "0.25"),
        ("02:30", "2:30"),
        (r"\boxed{x+1}", "x+1"),
    ):
        assert MATH.gold(gold) == stored == MATH.cleanse(stored)
    with pytest.raises(ValueError, match="is true or false"):
        MATH.gold(True)


def test_without_the_marker_nothing_is_taken():
    assert MATH.extract("first 3, then 4", "-->") is None
    assert MATH.extract(r"so --> \frac{6}{8}", "-->") == "0.75"


def test_an_expression_that_never_ends_costs_the_limit_and_the_next_one_works(monkeypatch, caplog):
    assert same_math("x+1", "1+x")
    monkeypatch.setattr(math_answers, "SECONDS", 1.0)
    math_answers._ask_cached.cache_clear()
    started = time.monotonic()
    assert not same_math("9^{9^{9^{9}}}", "9^{9^{9^{9}}}+1")
    assert time.monotonic() - started < 30
    monkeypatch.undo()
    assert same_math(r"\sqrt{8}", r"2\sqrt{2}"), "a new worker"


def test_a_worker_that_dies_is_replaced():
    assert same_math("y+1", "1+y")
    child = math_answers._worker()._child
    os.kill(child.pid, 9)
    child.wait()
    assert same_math("z+1", "1+z")


def test_without_the_extra_numbers_still_compare_and_expressions_say_what_to_install(monkeypatch):
    monkeypatch.setattr(math_answers, "_workers", [])
    monkeypatch.setattr(math_answers.importlib.util, "find_spec", lambda name: None)
    math_answers._ask_cached.cache_clear()
    assert same_math(math_answer("1/2"), "0.5") and math_answer("2:30") == "2:30"
    with pytest.raises(EnvironmentFault, match=r"needs math-verify; pip install 'pst-dist\[math\]'"):
        math_answer("x+1")
