"""Choose the column map of a file: the one in the config, or a guess from the first rows of the file.

Guessing tries the certain cases first: layouts with distinctive marks, then our own field names, then synonyms. `pst
check` prints the guessed map as YAML to paste into a config.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from pst_dist.data.sources.column_names import SYNONYMS, columns_of, no_column, quoted, refuse_unusable
from pst_dist.data.sources.columns import GUESSED, TURNS, ColumnMap, FieldMap, Layout, field_map, look_up, options_at
from pst_dist.data.sources.common_maps import LAYOUTS, has_options
from pst_dist.data.sources.conversations import PASSAGE_COLUMNS, SYSTEM_COLUMNS, is_blank, is_turns
from pst_dist.data.sources.options import option_columns
from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.sources.task_maps import TASK_LAYOUTS
from pst_dist.data.sources.verdicts import are_verdicts, is_setting
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
    chosen = field_map(setting)
    absent = [
        name
        for name, place in chosen.paths.items()
        if all((options_at if name == "choices" else look_up)(row, place) is None for row in rows)
    ]
    for name in absent:
        # Rows that are only scored need no rationale.
        if split == "train" or name not in ("rationale", "rationales", "teacher_answer", "id"):
            raise no_column(name, chosen.paths[name], rows, path)
    return chosen


def guess_columns(rows: Sequence[Mapping[str, Any]], path: str | Path) -> ColumnMap:
    """A map guessed from the rows; raises DataError when no column can be the question or the answer."""
    found = guess_paths(rows)
    if isinstance(found, Layout):
        return found
    for name in ("question", "answer"):
        if name not in found:
            refuse_unusable(name, rows, path)
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
            return layout
    columns = columns_of(rows)
    plain = {plain_name(column): column for column in reversed(columns)}
    found: dict[str, str] = {}
    if {"Body", "Question"} <= set(columns):
        found["question"] = "{Body} {Question}"  # SVAMP's original format
    if rows and all(_holds_stem(row.get("question")) for row in rows):
        found |= {"question": "question.stem", "choices": "question.choices"}  # CommonsenseQA's original format
    for field, synonyms in SYNONYMS.items():
        named = [plain[synonym] for synonym in synonyms if synonym in plain]
        usable = [column for column in named if column not in found.values() and _usable(field, column, rows)]
        if usable and field not in found:
            # Whether a model was right is no answer, if another column can be one.
            found[field] = min(usable, key=lambda column: field == "answer" and _are_verdicts(column, rows))
    if "choices" not in found and (options := option_columns(tuple(columns)) or _answers_to_choose(found, plain, rows)):
        found["choices"] = options
    if "choices" not in found:
        found |= _label_as_text(found, plain, rows)
    if "question" not in found and (other := _other_question(found, plain, rows)):
        found["question"] = other
    # MATH's rows have no answer but the boxed one of the solution.
    only_reply = "answer" not in found and found.get("rationale") == "solution" and "question" in found
    if (only_reply or ("rationale" not in found and "answer" in found)) and _fits(LAYOUTS["reply"], rows):
        return LAYOUTS["reply"]
    if "question" in found:
        found["question"] = _with_context_columns(found["question"], columns, rows)
    if "rationale" in found and any(isinstance(row.get(found["rationale"]), list) for row in rows):
        found["rationales"] = found.pop("rationale")
    return found


def _other_question(
    found: Mapping[str, str], plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> str | None:
    """A column that is the question only in the company of certain others: HellaSwag's `ctx`, PIQA's `goal` and
    WinoGrande's `sentence` with options, CoT Collection's `source` with a `target` (elsewhere, where a row is from)."""
    names = ("ctx", "goal", "sentence") if "choices" in found and "answer" in found else ()
    if plain_name(found.get("answer", "")) in ("target", "targets"):
        names = (*names, "source")
    fitting = (plain[name] for name in names if name in plain)
    return next((column for column in fitting if all(isinstance(row.get(column), str) for row in rows)), None)


def _label_as_text(
    found: Mapping[str, str], plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The column with the name of a class, `label_text` or `target_text`, instead of the one with its number."""
    column = found.get("answer", "")
    if plain_name(column) not in ("label", "target") or not all(isinstance(row.get(column), int) for row in rows):
        return {}
    named = [plain[name] for end in ("text", "name") if (name := plain_name(column) + end) in plain]
    return next(({"answer": name} for name in named if all(isinstance(row.get(name), str) for row in rows)), {})


def _answers_to_choose(
    found: Mapping[str, str], plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> str | None:
    """A column `answers` whose texts are the options, because another column chooses one by number or letter
    (ReClor)."""
    column, chosen = plain.get("answers"), found.get("answer")
    if column is None or chosen in (None, column):
        return None
    for row in rows:
        texts, choice = row.get(column), row.get(chosen)
        listed = isinstance(texts, list) and len(texts) > 1 and all(isinstance(text, str) for text in texts)
        if not listed or not re.fullmatch(r"\d|[A-Za-z]", str(choice).strip()):
            return None
    return column


def unused_text_columns(columns: ColumnMap, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Text columns that the map does not use, judged by the first row that it can read."""
    for row in rows:
        try:
            found = columns.fields(row)
        except RowError:
            continue
        read = "\n".join((found.question, str(found.answer), *found.rationales))
        texts = {str(name): value[0] if isinstance(value, list) and value else value for name, value in row.items()}
        return [
            name
            for name, value in texts.items()
            if isinstance(value, str)
            and len(value.split()) > 2
            and value.strip() not in read
            # A reply that was split does not occur in the text as a whole, but its start does.
            and value.strip()[:20] not in read
        ]
    return []


def _fits(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a layout fits a file: all rows, or a tenth of them for layouts recognised by marks in a text.

    Rows without the mark are then refused one by one instead of being read in another way.
    """
    fitting = sum(layout.fits(row) for row in rows)
    return 10 * fitting >= len(rows) > 0 and fitting > 0 if layout.by_marks else fitting == len(rows) > 0


def _with_context_columns(question: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A template that puts system texts and passages before the question, in the rows that have them, and an input
    after an instruction."""
    if "{" in question or any(not isinstance(row.get(question), str | None) for row in rows):
        return question
    extra = next((column for column in columns if plain_name(column) == "input"), None)
    if plain_name(question) == "instruction" and extra and all(isinstance(row.get(extra), str) for row in rows):
        return f"{{{question}}}\n{{{extra}}}"
    wanted = {plain_name(name) for name in (*SYSTEM_COLUMNS, *PASSAGE_COLUMNS)}
    return with_columns(question, [name for name in columns if plain_name(name) in wanted and name != question], rows)


def with_columns(question: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A template that puts columns before the question. One that is blank in some rows is marked `{context?}`; one that
    has no text, or something else in some row, is left out."""
    before = []
    for column in columns:
        values = [row.get(column) for row in rows]
        blank = [is_blank(value) for value in values]
        if all(blank) or any(not isinstance(value, str | None) for value in values):
            continue
        before.append(f"{{{column}?}}" if any(blank) else f"{{{column}}}")
    last = question if "{" in question else f"{{{question}}}"
    return "\n\n".join((*before, last)) if before else question


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


def _usable(field: str, column: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some row of a column has a value of the right type for the field."""
    values = [row.get(column) for row in rows]
    if field in ("question", TURNS) and any(is_turns(value) for value in values):
        return True
    kinds: dict[str, tuple[type, ...]] = {
        "question": (str,),
        "answer": (str, int, float, bool, list, Decimal, datetime.date),
        "rationale": (str, list),
        "choices": (list, dict),
        "id": (str, int),
        TURNS: (),
    }
    # Also a text in which no options are recognised: passed over, an index into them would be read as a number.
    if field == "choices" and any(isinstance(value, str) and value.strip() for value in values):
        return True
    if field == "rationale":  # `reasoning: on` is a setting
        values = [value for value in values if not (isinstance(value, str) and is_setting(value))]
    return any(isinstance(value, kinds[field]) for value in values)


def _are_verdicts(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return are_verdicts(column, (row.get(column) for row in rows))


_GOLD = ("answer", "finalanswer", "goldanswer", "gold", "expectedanswer", "correctanswer", "finalans", "groundtruth")


def _refuse_two_answers(found: Mapping[str, str], rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Raise DataError if another column may have the gold answer too, and has another one."""
    column = found["answer"]
    if "choices" in found or plain_name(column) not in _GOLD:
        return
    for row in rows:
        for other in row:
            values = [row.get(name) for name in (column, other)]
            if other == column or plain_name(other) not in _GOLD or not all(isinstance(v, _SCALARS) for v in values):
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


def _holds_stem(question: Any) -> bool:
    return isinstance(question, Mapping) and {"stem", "choices"} <= set(question)
