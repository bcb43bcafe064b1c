"""The values of fields: a text, an answer, rationales and an id, checked and without what does not belong to them."""

from __future__ import annotations

import datetime
import math
import re
from decimal import Decimal
from typing import Any

from pst_dist.data.sources.context import is_blank
from pst_dist.data.sources.no_answers import PRINTED_LIST
from pst_dist.data.sources.options import printed_texts
from pst_dist.data.sources.paths import texts_at
from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.sources.thoughts import has_thought_tag, rationale_of
from pst_dist.data.tasks.scoring import kind_of

NO_VALUE = ("NaN", "NaT", "<NA>", "\\N", "#N/A", "#REF!", "#DIV/0!", "#VALUE!", "#NAME?", "#NUM!", "#NULL!")
"""What programs write for a missing value in a table of texts, if it can be no word: last letters may be `nan`. Also
the errors of a spreadsheet's formulas."""
_NO_RATIONALE = (*NO_VALUE, "nan", "None", "none", "null", "NULL", "NA", "N/A", "n/a", "-")
_IMAGE_TAG = re.compile(r"^[ \t]{0,8}<image>|<image>[ \t]{0,8}$", re.MULTILINE)
"""The place of a picture in a question, as LLaVA's rows have it."""


def as_text(value: Any, name: str) -> str:
    """A non-empty text without leading and trailing white space; raises RowError."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError("missing", f"{name} is missing")
    if not isinstance(value, str):
        raise RowError("type", f"{name} is {kind_of(value)}, expected text")
    if "\x00" in value:
        raise RowError("nul", f"{name} contains a NUL character")
    if not value.strip():
        raise RowError("empty", f"{name} is empty")
    if name == "question" and _IMAGE_TAG.search(value):
        raise RowError("context", "question has <image>, which a text prompt cannot contain")
    if value.strip() in NO_VALUE:
        raise RowError("missing", f"{name} is {value.strip()!r}, which stands for a missing value")
    return value.strip()


def as_answer(value: Any, column: str = "COLUMN") -> object:
    """A text, a number, a Boolean, or a list with one of them. Which one is valid depends on the task."""
    if isinstance(value, list):
        if len(value) != 1:
            # Of numbers, the first may be a flag: one for each option, as in [0, 1].
            named = all(isinstance(one, str) for one in value) and value
            hint = f"; data.columns.answer={column}[0] takes the first" if named else ""
            raise RowError("type", f"answer is a list of {len(value)}, expected one answer{hint}")
        value = value[0]
    if isinstance(value, Decimal) and value.is_finite():
        # A value that a float cannot represent exactly stays text, with every digit.
        plain = int(value) if value == value.to_integral_value() else float(value)
        return plain if Decimal(repr(plain)) == value else format(value, "f")
    if isinstance(value, datetime.datetime) and value.time() != datetime.time():
        return value.isoformat(" ")
    if isinstance(value, datetime.date):
        return value.strftime("%Y-%m-%d")
    if isinstance(value, bool) or (isinstance(value, int | float) and value == value):
        return value
    return as_text(value, "answer")


def names_steps(path: str) -> bool:
    """Whether a list in a column has the steps of one rationale: `reasoning_steps`, `solution.steps`, a `chain`."""
    return plain_name(path.rpartition(".")[2]).endswith(("steps", "chain", "chainofthought"))


def refuse_unclear_list(value: Any, path: str) -> None:
    """Raise RowError for a list in the place of one rationale."""
    if isinstance(value, str) and PRINTED_LIST.fullmatch(value.strip()):
        value = printed_texts(value)
    told = [item for item in value if not is_blank(item)] if isinstance(value, list) else []
    if len(told) < 2:
        return
    joined = texts_at(value, path)
    ways = [f"data.columns.rationale={joined} joins them"] if joined else []
    if all(isinstance(item, str) for item in told):
        ways.insert(0, f"data.columns.rationales={path} reads one from each text")
    raise RowError("type", f"rationale is a list of {len(told)}: {', '.join(ways) or 'select a part of it'}")


def as_rationales(value: Any, *, are_steps: bool = False) -> tuple[str, ...]:
    """The rationales in a text, a list of texts or a list printed as text, without thought tags. Blank and missing ones
    are skipped. With `are_steps`, a list of texts is one rationale, with a line for each, and a list of such lists
    several."""
    if isinstance(value, str) and PRINTED_LIST.fullmatch(value.strip()):
        value = printed_texts(value)
        if not value:
            raise RowError("type", "rationale looks like a printed list, but cannot be read as one")
    values = value if isinstance(value, list) else [value]
    if are_steps and isinstance(value, list):
        several = bool(value) and all(isinstance(item, list) for item in value)
        values = [_joined_steps(steps) for steps in (value if several else [value])]
    present = [item for item in values if item is not None and not (isinstance(item, str) and _is_nothing(item))]
    texts = [as_text(item, "rationale") for item in present]
    whole = [rationale_of(text) if has_thought_tag(text) else text for text in texts]
    if None in whole:
        raise RowError("cut", "rationale is cut off: a thought has no closing tag")
    return tuple(text for text in whole if text)


def _joined_steps(steps: list[Any]) -> str:
    return "\n".join(as_text(step, "a step of the rationale") for step in steps if not is_blank(step))


def _is_nothing(text: str) -> bool:
    return not text.strip() or text.strip() in _NO_RATIONALE


def as_id(value: Any) -> str | None:
    """An id as text, from a text or a number; None if it is missing."""
    if value is None or isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None
