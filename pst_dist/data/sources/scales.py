"""A number whose scale is in another column, as in TAT-QA: `answer: 3.2, scale: million`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.tasks.number_markup import NotANumber
from pst_dist.data.tasks.numbers import read_number
from pst_dist.data.tasks.scoring import snippet

_SCALES = ("scale", "unit", "units", "magnitude", "multiplier")
"""Columns that may scale the answer, also with a prefix or suffix: `answer_scale`, `unit_of_answer`."""


def refuse_unread_scale(row: Mapping[str, Any], read: Collection[str], answer: object, column: str) -> None:
    """Raise RowError for a column that is not `read` and changes the value of the answer: 3.2 to 3.2 million.

    `column` is the place of the answer. A unit that leaves the value as it is, such as kg or percent, may stay unread.
    """
    value = _value(answer)
    if value is None:
        return
    for name, scale in row.items():
        if name in read or not isinstance(scale, str) or not _names_scale(str(name)):
            continue
        scaled = _value(f"{answer} {scale.strip()}")
        if scaled not in (None, value):
            what = f"column {name!r} would not be read, but it scales the answer ({snippet(scale)})"
            own, both = f"{{{column}}}", f"{{{column}}} {{{name}?}}"
            raise RowError("unread", f"{what}; set data.columns.answer={both!r}, or {own!r} to leave it out")


def _names_scale(column: str) -> bool:
    name = plain_name(column).replace("answer", "").removesuffix("of").removeprefix("of")
    return name in _SCALES


def _value(answer: object) -> Fraction | None:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    try:
        return Fraction(read_number(str(answer)))
    except (NotANumber, ValueError):
        return None
