"""What stands in a column of answers without being one: a printed list, test cases, a class that is unknown.

Each is refused with a RowError, because training on it is worse than leaving the row out. The template `'{answer}'`
takes a text or number as it is.
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
    """Raise RowError for a value at `path` that cannot be the answer to the question of a row."""
    if plain_name(path) in _LABELS and isinstance(answer, int) and not isinstance(answer, bool) and answer == -1:
        # https://huggingface.co/docs/datasets/about_dataset_features: "a missing label has the value -1"
        raise RowError("missing", f"{path} is -1, which marks a row without a label; '{{{path}}}' takes it as it is")
    if not isinstance(answer, str):
        return
    if PRINTED_LIST.fullmatch(answer) and printed_texts(answer):
        what = f"answer {snippet(answer)} is a list printed as text"
        raise RowError("type", f"{what}; data.columns.answer={path}[0] takes its first text, '{{{path}}}' all of it")
    if answer in _PLACEHOLDERS and any(plain_name(name) in ("questiontype", "problemtype") for name in row):
        raise RowError("missing", f"answer is {answer!r}, which stands for a missing answer")
    if _is_object(answer):
        raise RowError("type", f"answer {snippet(answer)} is a JSON object, such as test cases of a program")
    if _is_marked_up(answer, question):
        raise RowError("answer", f"{path} repeats the question with marks in it, such as labels of its steps")


def refuse_prose(answer: object, path: str) -> None:
    """Raise RowError for an answer in which a guess would take a whole solution for the answer."""
    if isinstance(answer, str) and "\n" in answer and len(answer.split()) > _FEW_WORDS:
        what = f"no mark separates the answer from the reasoning: {answer.count(chr(10)) + 1} lines"
        raise RowError("answer", f"{what}; data.columns.answer='{{{path}}}' takes all of it as the answer")


_FEW_WORDS = 8


def _is_object(text: str) -> bool:
    if not (text.startswith("{") and text.endswith("}")):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


def _is_marked_up(answer: str, question: str) -> bool:
    """Whether an answer is its question with other marks, word for word, as in Math-Shepherd
    (https://huggingface.co/datasets/peiyi9979/Math-Shepherd)."""
    asked, told = question.split(), answer.split()
    if len(asked) != len(told) or len(asked) < 12:
        return False
    return sum(one == other for one, other in zip(asked, told, strict=True)) >= 0.8 * len(asked)
