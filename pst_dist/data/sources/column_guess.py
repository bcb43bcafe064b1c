"""Choose the column map of a file: the one in the config, or a guess from the first rows of the file.

Guessing tries the certain cases first: layouts with distinctive marks, then our own field names, then synonyms. `pst
check` prints the guessed map as YAML to paste into a config.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pst_dist.data.sources.column_names import GOLD, no_column, quoted, refuse_unusable
from pst_dist.data.sources.columns import GUESSED, ColumnMap, FieldMap, Layout, field_map
from pst_dist.data.sources.common_maps import LAYOUTS, has_options
from pst_dist.data.sources.conversations import (
    TURN_COLUMNS,
    ends_with_reply,
)
from pst_dist.data.sources.field_guess import fields_by_name
from pst_dist.data.sources.paths import columns_in, is_anywhere, options_at
from pst_dist.data.sources.replies import has_mark
from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.sources.task_maps import TASK_LAYOUTS
from pst_dist.data.tasks.number_markup import NotANumber
from pst_dist.data.tasks.numbers import read_number
from pst_dist.data.tasks.scoring import snippet
from pst_dist.errors import ConfigError, DataError

READY_MADE: dict[str, Layout] = {**TASK_LAYOUTS, **LAYOUTS}
"""Every map that `data.columns` may name, the most specific ones first."""


def choose_columns(
    setting: str | Mapping[str, str] | None, rows: Sequence[Mapping[str, Any]], path: str | Path, split: str = "train"
) -> ColumnMap:
    """The column map for a file, given its first rows.

    `setting` is data.columns: a dict of our fields, the names of one or more ready-made maps (the first that fits is
    used), or None to guess. Raises ConfigError for an unknown name, and DataError, listing the existing columns and the
    closest one, when the map does not fit the file.
    """
    if isinstance(setting, str | None):
        found = _named(setting, rows, path) if setting is not None else guess_columns(rows, path)
        if isinstance(found, Layout) and found.name in LAYOUTS:
            # A file whose rows have no options need not be read twice to find out how its answers name them.
            return replace(found, has_options=any(map(has_options, rows)))
        return found
    chosen = _completed(setting, rows)
    for name in [name for name, place in chosen.paths.items() if not _is_there(name, place, rows)]:
        # Rows that are only scored need no rationale.
        if split == "train" or name not in ("rationale", "rationales", "teacher_answer", "id"):
            raise no_column(name, chosen.paths[name], rows, path)
    return chosen


def _is_there(field: str, place: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any row has something in the place of a field; of the options, in any of their columns."""
    if field == "choices":
        return any(options_at(row, place) is not None for row in rows)
    return is_anywhere(rows, place)


def _completed(setting: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> FieldMap:
    """A map from a config. One without question or answer, `{answer: answers[0]}`, is completed by guessed fields."""
    answers = {"answer", "answer_from_0", "answer_from_1"}
    if not setting or ("question" in setting and answers & setting.keys()):
        return field_map(setting)
    taken = set(setting)
    for alike in (answers, {"rationale", "rationales"}):
        taken |= alike if alike & taken else set()
    named = set(setting.values())
    guessed = {name: place for name, place in fields_by_name(rows).items() if name not in taken and place not in named}
    chosen = field_map({**guessed, **setting})
    return chosen if "question" in setting else FieldMap(chosen.paths, GUESSED)


def guess_columns(rows: Sequence[Mapping[str, Any]], path: str | Path) -> ColumnMap:
    """A map guessed from the rows; raises DataError when no column can be the question or the answer."""
    found = guess_paths(rows)
    if isinstance(found, Layout):
        return found
    for name in ("question", "answer"):
        if name not in found:
            refuse_unusable(name, rows, path, found)
            raise no_column(name, name, rows, path, known=found)
    _refuse_two_answers(found, rows, path)
    return FieldMap(found, GUESSED)


def guess_paths(rows: Sequence[Mapping[str, Any]]) -> Layout | dict[str, str]:
    """A ready-made map that fits the rows, or a dict of our fields for which a plausible column exists."""
    for layout in READY_MADE.values():
        if layout.name != "reply" and rows and _fits(layout, rows):
            # Rows that already have all three of our fields need no splitting.
            if layout.name != "gsm8k" and all({"question", "answer", "rationale"} <= set(row) for row in rows):
                continue
            # In RLVR's rows the turns end with a question, and another column has its answer.
            if _only_ask(layout, rows) and {"question", "answer"} <= fields_by_name(rows).keys():
                continue
            return layout
    found = fields_by_name(rows)
    # MATH's rows have no answer but the boxed one of the solution.
    only_reply = "answer" not in found and found.get("rationale") == "solution" and "question" in found
    explained = bool({"rationale", "rationales"} & found.keys())
    if (only_reply or (not explained and "answer" in found)) and _fits(LAYOUTS["reply"], rows):
        return LAYOUTS["reply"]
    return found


def _only_ask(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the layout reads turns, and no row ends them with a reply."""
    (column, *_) = layout.needs or ("",)
    return column in TURN_COLUMNS and not any(ends_with_reply(row.get(column)) for row in rows)


def unused_text_columns(columns: ColumnMap, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Text columns that the map does not use, judged by the first row that it can read."""
    for row in rows:
        try:
            found = columns.fields(row)
        except RowError:
            continue
        read = "\n".join((found.question, str(found.answer), *found.rationales))
        texts = {str(name): value[0] if isinstance(value, list) and value else value for name, value in row.items()}
        mapped = columns_in(tuple(columns.paths.values())) if isinstance(columns, FieldMap) else ()
        return [
            name
            for name, value in texts.items()
            if isinstance(value, str)
            and name not in mapped
            and len(value.split()) > 2
            and value.strip() not in read
            # A reply that was split does not occur in the text as a whole, but its start does.
            and value.strip()[:20] not in read
            and not (isinstance(columns, Layout) and has_mark(value) and str(found.answer) in value)
        ]
    return []


def _fits(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a layout fits a file: all rows, or a tenth of them for layouts recognised by marks in a text.

    Rows without the mark are then refused one by one instead of being read in another way.
    """
    fitting = sum(layout.fits(row) for row in rows)
    return 10 * fitting >= len(rows) > 0 and fitting > 0 if layout.by_marks else fitting == len(rows) > 0


def as_yaml(columns: ColumnMap) -> str:
    """The map as lines for the data section of a config."""
    if not isinstance(columns, FieldMap):
        return f"columns: {columns.name}"
    lines = (f"  {field}: {quoted(path)}" for field, path in columns.paths.items())
    return "\n".join(["columns:", *lines])


def _named(setting: str, rows: Sequence[Mapping[str, Any]], path: str | Path) -> ColumnMap:
    names = [name.strip() for name in setting.split(",")]
    for name in names:
        if name not in READY_MADE:
            near = difflib.get_close_matches(name, READY_MADE, n=1)
            raise ConfigError(
                f"data.columns: no ready-made map {name!r}",
                f"did you mean {near[0]!r}?" if near else "available maps: " + ", ".join(READY_MADE),
            )
    for name in names:
        layout = READY_MADE[name]
        # One fitting row is enough: the others are refused one by one, each with its line number.
        if any(layout.fits(row) for row in rows):
            return layout
    layout = READY_MADE[names[0]]
    for column in layout.needs:
        if all(column not in row for row in rows):
            raise no_column(f"map {layout.name}", column, rows, path)
    return layout


def _refuse_two_answers(found: Mapping[str, str], rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Raise DataError if another column may have the gold answer too, and has another one."""
    column = found["answer"]
    if "choices" in found or plain_name(column) not in GOLD:
        return
    for row in rows:
        for other in row:
            values = [row.get(name) for name in (column, other)]
            if other == column or plain_name(other) not in GOLD or not all(isinstance(v, _SCALARS) for v in values):
                continue
            one, another = (str(value).strip() for value in values)
            if one and another and _value(one) != _value(another):
                what = f"columns {column!r} and {other!r} have different answers, {snippet(one)} and {snippet(another)}"
                raise DataError(what, "set data.columns and say which one is right", path=path)


_SCALARS = (str, int, float)


def _value(text: str) -> object:
    try:
        return read_number(text)
    except NotANumber:
        return text.casefold().rstrip(".")
