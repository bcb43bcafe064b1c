"""What stands in a column of answers without being one: a printed list, test cases, a class that is unknown.

Each is refused with a RowError, because training on it is worse than leaving the row out. The template `'{answer}'`
takes a value as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pst_dist.data.sources.options import printed_texts
from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.tasks.scoring import snippet

PRINTED_LIST = re.compile(r"\[\s*['\"].*\]", re.DOTALL)
"""A text that may be a list, as JSON or Python prints it."""
_LABELS = ("label", "labels", "goldlabel")
_PLACEHOLDERS = ("notfound", "proof")
"""What NuminaMath-1.5 has for an answer that was not found, and for a problem that asks for a proof."""


def refuse_no_answer(answer: object, question: str, row: Mapping[str, Any], path: str) -> None:
    """Raise RowError for a value at `path` that cannot be the answer to the question of a row without options."""
    if plain_name(path) in _LABELS and isinstance(answer, int) and not isinstance(answer, bool) and answer == -1:
        # The class `datasets.ClassLabel` has it so; see also https://github.com/huggingface/datasets/issues/245.
        raise RowError("missing", f"{path} is -1, which marks a row without a label{_otherwise(path)}")
    if not isinstance(answer, str):
        return
    if PRINTED_LIST.fullmatch(answer) and printed_texts(answer):
        what = f"answer {snippet(answer)} is a list printed as text"
        first = f"data.columns.answer={path}[0] takes its first text"
        raise RowError("type", f"{what}; {first}, {_as_it_is(path)} all of it")
    if answer in _PLACEHOLDERS and any(plain_name(name) in ("questiontype", "problemtype") for name in row):
        raise RowError("missing", f"answer is {answer!r}, which stands for a missing answer{_otherwise(path)}")
    if _has_test_cases(answer):
        raise RowError("type", f"answer {snippet(answer)} has test cases of a program{_otherwise(path)}")
    if _is_marked_up(answer, question):
        what = f"{path} repeats the question with marks in it, such as labels of its steps"
        raise RowError("answer", f"{what}{_otherwise(path)}")


def _as_it_is(path: str) -> str:
    """The setting that takes a value at a path as the answer, whatever it is, to paste into a shell."""
    return f"data.columns.answer=\"'{{{path}}}'\""


def _otherwise(path: str) -> str:
    return f"; if it is the answer, {_as_it_is(path)} takes it"


def refuse_prose(answer: object, path: str, *, explained: bool) -> None:
    """Raise RowError for an answer in which a guess would take a whole solution for the answer.

    Beside a rationale (`explained`) only a column with the name of a solution is suspected.
    """
    if not isinstance(answer, str) or (explained and not plain_name(path).endswith("solution")):
        return
    if _is_prose(answer) and ("\n" in answer or explained):
        what = "no mark separates the answer from the reasoning"
        raise RowError("unmarked", f"{what}; end it with `The answer is …`, or {_as_it_is(path)} takes all of it")


def _is_prose(text: str) -> bool:
    """Whether a text has several sentences; a formula, a table or a program has hardly any."""
    words = text.split()
    ends = sum(word[-1] in ".!?" and word[:-1].isalnum() for word in words)
    return ends > 1 and 4 * sum(len(word) > 1 and word[:2].isalpha() for word in words) >= len(words)


_CASES = {"inputs", "outputs", "fn_name", "test_cases", "unit_tests", "testtype", "functional", "assert_case"}


def _has_test_cases(text: str) -> bool:
    if not (text.startswith("{") and text.endswith("}")):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(_CASES & value.keys())


def _is_marked_up(answer: str, question: str) -> bool:
    """Whether an answer is its question with other marks in the places of one mark, as in Math-Shepherd
    (https://huggingface.co/datasets/peiyi9979/Math-Shepherd)."""
    asked, told = question.split(), answer.split()
    if len(asked) != len(told) or len(asked) < _FEW_WORDS:
        return False
    differ = [(one, other) for one, other in zip(asked, told, strict=True) if one != other]
    marks = {one for one, _ in differ}
    return len(marks) == 1 and len(*marks) <= 3 and all(other in ("+", "-", "0", "1") for _, other in differ)


_FEW_WORDS = 12
