"""Every pattern and every function that sees text from outside takes time in proportion to its length."""

from __future__ import annotations

import ast
import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pst_dist
from pst_dist.data.sample import normalise_question, sample_id
from pst_dist.data.sources.common_maps import LAYOUTS
from pst_dist.data.sources.completions import _continuation
from pst_dist.data.sources.options import read_options
from pst_dist.data.sources.paths import look_up
from pst_dist.data.sources.replies import has_mark, split_reply
from pst_dist.data.sources.rows import RowError, excerpt
from pst_dist.data.sources.task_maps import TASK_LAYOUTS
from pst_dist.data.sources.thoughts import rationale_of
from pst_dist.data.tasks import TASKS
from pst_dist.diagnostics.rows_page import _reason

SHORT, LONG = 1_000, 4_000
PIECES = (
    *("\n", " ", "\t", " \n", "a", "A", "9", "0.", "1,", "1/", "-", "=", ".", "'", '"', "(", "[", "{", "}", "$", "*"),
    *("<", "<<", "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "\\boxed{7}", "\\", "####", "\n#### 1\n"),
    *("-->", "the answer is ", "The answer is A. ", "answer: ", "Answer: A. B. ", "\n**Answer**\n", "final answer"),
    *("so ", "wait ", "hmm", "A. ", "(A) ", "a.b ", "a: ", "x=1 ", "1-", "yes ", "2021-01-01", "gpu:", "'a'", "{a}"),
    *("therefore, ", "so   ", ":a", "word word ", "é", "\u3000", "####\n", "\n\n\n-->"),
)


def _seconds(call: Callable[[str], object], text: str) -> float:
    start = time.process_time()
    with contextlib.suppress(RowError, ValueError):
        call(text)
    return time.process_time() - start


def _grows_faster_than_its_input(call: Callable[[str], object], piece: str, end: str = "") -> bool:
    """Whether four times the text takes far more than four times as long; quadratic takes sixteen times, cubic 64."""
    short, long = (piece * (size // len(piece)) + end for size in (SHORT, LONG))
    for _ in range(3):  # one quiet measurement of three is enough: another process may have disturbed the rest
        after = _seconds(call, long)
        if after < 0.005 or after < 9 * _seconds(call, short):
            return False
    return True


def _patterns() -> dict[str, Callable[[str], object]]:
    """Every constant pattern in the package by its place, with the call that is made of it."""
    found: dict[str, Callable[[str], object]] = {}
    root = Path(pst_dist.__file__).parent
    for path in sorted(root.rglob("*.py")):
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        names = {
            node.value: node.targets[0].id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            owner, first = node.func.value, node.args[0]
            if not (isinstance(owner, ast.Name) and owner.id == "re" and isinstance(first, ast.Constant)):
                continue
            if not isinstance(first.value, str):
                continue
            words = [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute) and part.attr.isupper()]
            flags = sum({getattr(re, word) for word in words if isinstance(getattr(re, word, None), re.RegexFlag)})
            pattern = re.compile(first.value, flags)
            # A pattern with a name is used where its name is: only some are searched for from every place of a text.
            calls = {node.func.attr}
            if node.func.attr == "compile" and node in names:
                calls = set(re.findall(rf"\b{names[node]}\.(\w+)\(", source))
            anchored = None
            if calls and calls <= {"match", "fullmatch"}:
                anchored = pattern.match if "match" in calls else pattern.fullmatch
            search = anchored or (lambda text, pattern=pattern: sum(1 for _ in pattern.finditer(text)))
            found[f"{path.relative_to(root)}:{node.lineno} {first.value[:40]}"] = search
    return found


PATTERNS = _patterns()


def test_the_patterns_of_the_package_are_found():
    assert len(PATTERNS) > 60
    assert any(place.startswith("data/sources/marks.py") for place in PATTERNS)


@pytest.mark.parametrize("place", PATTERNS)
def test_a_pattern_takes_linear_time(place):
    assert [piece for piece in PIECES if _grows_faster_than_its_input(PATTERNS[place], piece)] == []


def _chat(text: str) -> object:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    return LAYOUTS["messages"].fields({"messages": turns})


FUNCTIONS: dict[str, Callable[[str], object]] = {
    "split_reply": split_reply,
    "split_reply after a thought": lambda text: split_reply(f"<think>{text}</think>{text}"),
    "split_reply before an answer": lambda text: split_reply(f"{text}\nThe answer is 5."),
    "split_reply after a mark": lambda text: split_reply(f"The answer is {text}"),
    "split_reply in a box": lambda text: split_reply(f"\\boxed{{{text}}}"),
    "rationale_of": rationale_of,
    "has_mark": has_mark,
    "messages": _chat,
    "gsm8k": lambda text: LAYOUTS["gsm8k"].fields({"question": "q", "answer": f"{text}#### 5"}),
    "prompt_completion": lambda text: LAYOUTS["prompt_completion"].fields({"prompt": text, "completion": text}),
    "aqua_human": lambda text: TASK_LAYOUTS["aqua_human"].fields(
        {"instruction": f"{text} Answer Choices: (A) {text} (B) b", "output": text}
    ),
    "read_options": lambda text: read_options([text, text]),
    "look_up": lambda text: look_up({"a": 1}, text[:2000] + "{a}"),
    "continuation": _continuation,
    "normalise_question": normalise_question,
    "sample_id": lambda text: sample_id(text, text, 1),
    "excerpt": excerpt,
    "reason": _reason,
    **{f"candidates of {name}": task.candidates for name, task in TASKS.items()},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_reads_text_takes_linear_time(name):
    assert [piece for piece in PIECES if _grows_faster_than_its_input(FUNCTIONS[name], piece, "x")] == []


def test_the_measure_finds_a_quadratic_pattern():
    quadratic = re.compile(r"\s+END$")
    assert _grows_faster_than_its_input(quadratic.search, " ", "x")
    assert not _grows_faster_than_its_input(lambda text: re.search("END", text), " ", "x")


def test_thousands_of_closing_tags_do_not_recurse():
    assert tuple(split_reply("</think>" * 20_000 + "5")) == (None, "5")
