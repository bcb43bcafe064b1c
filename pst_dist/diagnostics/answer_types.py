"""The type of a file's answers: the one that fits all of them, and a word on one that fits most."""

from __future__ import annotations

from collections.abc import Iterator

from pst_dist.config.schema import Config
from pst_dist.data.sources.column_guess import choose_columns
from pst_dist.data.sources.columns import ColumnMap, FieldMap, Fields
from pst_dist.data.sources.rows import RawRow, RowError, plain_name
from pst_dist.data.sources.source import Source
from pst_dist.data.tasks import get_task
from pst_dist.data.tasks.scoring import snippet

_JUDGED = 1000
"""After so many rows, no other row is looked at for a type that does not fit all."""


def likely_type(config: Config, source: Source) -> tuple[str, list[str]]:
    """(`choice` if the rows have options, else the first type that fits every answer; lines on a type that fits most).

    The type is "" if none fits or one is set.
    """
    if config.task or config.data.answer_type:
        return "", []
    kinds = ("number", "bool", "date", "choice")
    sample = source.head(50)
    if source.generated or not sample:
        return "", []
    columns = choose_columns(config.data.columns, sample, source.path)
    classes: set[object] | None = set() if _names_class(columns) else None
    possible, rows, with_options = dict.fromkeys(kinds, True), 0, 0
    numbers, formulas, other = 0, 0, ""
    for fields in _fields(columns, source):
        rows, with_options = rows + 1, with_options + (fields.options is not None)
        for kind in kinds:
            possible[kind] = possible[kind] and _fits(kind, fields.answer)
        if possible["number"] or _fits("number", fields.answer):
            numbers += 1
        else:
            other = other or str(fields.answer)
        formulas += "\\" in str(fields.answer)
        if classes is not None:
            classes = classes | {fields.answer} if _is_class(fields.answer) else None
        if rows >= _JUDGED and with_options < rows and not any(possible.values()):
            break
    if rows and with_options == rows:
        return "choice", []
    found = next((kind for kind in kinds if rows and possible[kind]), "")
    hints = []
    if found == "number" and classes is not None:
        found = ""
        numbered = ", ".join(map(str, sorted(classes, key=str)))
        hints.append(
            f"the answers are only {numbered}, which may be numbers of classes: write their names into the rows"
            + (", or set data.answer_type=bool (0 is no, 1 is yes)" if classes <= {0, 1} else "")
            + ", or data.answer_type=number if they are numbers"
        )
    elif not found and rows and not with_options:
        if 5 * formulas >= rows:
            hints.append("some answers are formulas: data.answer_type=math compares them by value, not as text")
        elif 10 * numbers >= 8 * rows:
            hints.append(
                f"{numbers:,} of the first {rows:,} answers are numbers, and {snippet(other)} is not: as text, 1,000 "
                "differs from 1000; data.answer_type=number compares by value and makes the others bad rows"
            )
    return found, hints


def _fields(columns: ColumnMap, source: Source) -> Iterator[Fields]:
    """The fields of a file's rows, without bad rows."""
    for entry in source.rows():
        if isinstance(entry, RawRow):
            try:
                yield columns.fields(entry.value)
            except RowError:
                continue


_MOST_CLASSES = 20


def _names_class(columns: ColumnMap) -> bool:
    """Whether the answers are in a column `label`, in which many public files have numbers of classes."""
    return isinstance(columns, FieldMap) and plain_name(columns.paths.get("answer", "")) in ("label", "goldlabel")


def _is_class(answer: object) -> bool:
    return isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < _MOST_CLASSES


def _fits(kind: str, answer: object) -> bool:
    """Whether an answer is a valid gold answer of that type."""
    try:
        gold = get_task(None, kind).gold(answer)
    except ValueError:
        return False
    # A number is parsed completely or not at all. "no" is an answer, "Is it? no" is a text that contains one, and a
    # lower-case k is not a choice.
    return (
        kind == "number"
        or str(answer).lower() in ("true", "false")
        or (len(bare := str(answer).strip("(). ")) <= len(gold) + 1 and (kind != "choice" or bare.isupper()))
    )
