"""The names that columns have in other people's files, and the error for a file in which none is recognised."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pst_dist.data.sources.columns import TURNS
from pst_dist.data.sources.conversations import is_turns
from pst_dist.data.sources.rows import plain_name
from pst_dist.data.tasks.scoring import kind_of
from pst_dist.errors import DataError

SYNONYMS: dict[str, tuple[str, ...]] = {
    field: tuple(names.split())
    for field, names in {
        "question": (
            "question q problem query questiontext qtext questionstem stem problemstatement "
            "prompt instruction input inputs text"
        ),
        "answer": (
            "answer finalanswer goldanswer gold expectedanswer answerkey correct correctanswer finalans label "
            "goldlabel target targets groundtruth referenceanswer finaldecision answertext answervalue result "
            "finalresult output response completion answerindex answeridx correctindex correctidx correctoption "
            "correctchoice cop gt ans qans"
        ),
        "rationale": (
            "rationale rationales reasoning reasoningcontent explanation chainofthought cot cotcontent thought "
            "thoughts thinking chain thinkingtrajectories thinkingtrajectory deepseekthinkingtrajectory "
            "deepseekreasoning reasoningtrace reasoningsteps steps solution workedsolution reasoningcompletion "
            "abstractiveexplanation generations exp"
        ),
        "choices": "choices options answerchoices endings candidates alternatives mcoptions",
        "id": "id uid qid questionid sampleid",
        TURNS: TURNS,
    }.items()
}
"""Common names for our fields, most likely first. Compared in lower case, without separators between words."""
_DEEP = 6
"""So many levels of a row are searched for a field."""


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of some rows, in the order in which they appear."""
    return list(dict.fromkeys(str(column) for row in rows for column in row))


def quoted(path: str) -> str:
    """A place as a YAML value."""
    if "\n" in path:
        return json.dumps(path)  # a line break needs YAML's double quotes, whose escapes are the same as JSON's
    return path if re.fullmatch(r"[A-Za-z_][\w.\-]*", path) else "'" + path.replace("'", "''") + "'"


def _in_quotes(path: str) -> str:
    """A place as a YAML value in which no apostrophe is needed, so that a shell can have them around it."""
    return json.dumps(path, ensure_ascii=False) if quoted(path) != path else path


def refuse_unusable(field: str, rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Raise DataError if a column has the right name but a value of the wrong type."""
    for column in columns_of(rows):
        if plain_name(column) == field:
            values = [row[column] for row in rows if row.get(column) is not None]
            held = kind_of(values[0]) if values else "no value"
            what = f"column {column!r} cannot be the {field}: it contains {held}"
            within = bool(values) and isinstance(values[0], Mapping | list)
            remedy = f"select a part of it, for example data.columns.{field}={column}[0] or {column}.text"
            raise DataError(what, remedy if within else f"set data.columns.{field} to another column", path=path)


def no_column(
    field: str,
    wanted: str,
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    setting: str = "",
    known: Mapping[str, str] | None = None,
) -> DataError:
    """The error for a missing column, with the columns that exist and the likeliest place.

    `setting` names what selects one. `known` are the fields of a guess that found this one nowhere: a map in a config
    needs all of them.
    """
    columns = columns_of(rows)
    shown = ", ".join(columns[:12]) + (", …" if len(columns) > 12 else "")
    place = _likeliest(field, wanted, rows)
    hint = f"the closest is {place!r}: " if place else ""
    if setting:
        example = f"{setting} {place or 'COLUMN'}"
    elif known is not None:
        paths = {name: known.get(name, "COLUMN") for name in ("question", "answer")} | dict(known)
        paths[field] = place or "COLUMN"
        if "answer" not in known and field != "answer":
            paths["answer"] = _likeliest("answer", "answer", rows) or "COLUMN"
        pairs = ", ".join(f"{name}: {_in_quotes(value)}" for name, value in paths.items())
        example = shlex.quote(f"data.columns={{{pairs}}}")
    else:
        example = f"data.columns.{field}={place or 'COLUMN'}" if field in ("question", "answer") else "data.columns"
    return DataError(f"no column {wanted!r} for {field} among: {shown or 'none'}", f"{hint}set {example}", path=path)


def _likeliest(field: str, wanted: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The place whose name is like the wanted one, at the top level or below another column; "" if there is none."""
    row = next(iter(rows), {})
    columns = columns_of(rows)
    near = difflib.get_close_matches(wanted.lower(), {column.lower(): column for column in columns}, n=1, cutoff=0.6)
    found = [column for column in columns if near and column.lower() == near[0]]
    if found and not isinstance(row.get(found[0]), Mapping | list):
        return found[0]
    below = dict(_places(row, ""))
    named: dict[str, str] = {}
    for place in below:
        named.setdefault(plain_name(re.sub(r"\[0\]", "", place).rpartition(".")[2]), place)
    nested = [named[name] for name in SYNONYMS.get(field, ()) if name in named]
    like = [column for column in columns if plain_name(wanted) and plain_name(wanted) in plain_name(column)]
    for place in (*nested, *found, *like):
        value = below.get(place, row.get(place))
        if place in nested and isinstance(value, Mapping):
            continue
        if is_turns(value) or not isinstance(value, Mapping | list):
            return place
        inner = next((name for name, one in _places(value, place) if not isinstance(one, Mapping | list)), None)
        if inner is not None:
            return inner
    return ""


def _places(value: Any, place: str, depth: int = _DEEP) -> Iterator[tuple[str, Any]]:
    """The places below a value, with what is there; of a list, only its first item."""
    if depth == 0:
        return
    inside: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inside = [(f"{place}.{name}" if place else str(name), one) for name, one in value.items()]
    elif isinstance(value, list):
        inside = [(f"{place}[0]", one) for one in value[:1]]
    for name, one in inside:
        yield name, one
        yield from _places(one, name, depth - 1)
