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
from pst_dist.data.sources.replies import has_mark
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
            "answer finalanswer shortanswer bestanswer goldanswer gold expectedanswer answerkey correct "
            "correctanswer finalans label goldlabel target targets groundtruth referenceanswer finaldecision "
            "answertext answervalue result finalresult output response completion answerindex answeridx correctindex "
            "correctidx correctoption correctchoice cop gt ans qans "
            "groundtruthanswer groundtruthsolution goldstandardsolution"
        ),
        "rationale": (
            "rationale rationales reasoning reasoningcontent explanation explanations chainofthought cot cotcontent "
            "thought thoughts thinking chain thinkingtrajectories thinkingtrajectory deepseekthinkingtrajectory "
            "deepseekreasoning reasoningtrace reasoningsteps steps solution workedsolution reasoningcompletion "
            "abstractiveexplanation generatedsolution complexcot longcot reasoningchain thoughtprocess generations exp"
        ),
        "choices": "choices options answerchoices endings candidates alternatives mcoptions",
        "id": "id uid qid questionid sampleid",
        TURNS: TURNS,
    }.items()
}
"""Common names for our fields, most likely first. Compared in lower case, without separators between words."""
GOLD = ("answer", "finalanswer", "goldanswer", "gold", "expectedanswer", "correctanswer", "finalans", "groundtruth")
"""Names of columns that have nothing but the gold answer."""
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


def refuse_unusable(field: str, rows: Sequence[Mapping[str, Any]], path: str | Path, known: Mapping[str, str]) -> None:
    """Raise DataError if a column has the right name but a value of the wrong type; `known` are the other fields."""
    for column in columns_of(rows):
        if plain_name(column) == field:
            values = [row[column] for row in rows if row.get(column) is not None]
            held = kind_of(values[0]) if values else "no value"
            what = f"column {column!r} cannot be the {field}: it contains {held}"
            inner = _inside(values[0], column) if values else None
            if inner is not None:
                raise DataError(what, f"select a part of it: set {_whole_map(field, inner, known, rows)}", path=path)
            raise DataError(what, f"set data.columns.{field} to another column", path=path)


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
    if any("custom_id" in row and isinstance(row.get("response", row.get("result")), Mapping) for row in rows):
        return DataError(
            "these lines are the output of a batch API, which contains replies but no questions",
            "join them by custom_id: a row needs the question, the gold answer and, as `reply`, the message's text",
            path=path,
        )
    shown = ", ".join(columns[:12]) + (", …" if len(columns) > 12 else "")
    place = _likeliest(field, wanted, rows) or _replied(field, rows, known)
    hint = f"the closest is {place!r}: " if place else ""
    if setting:
        example = f"{setting} {place or 'COLUMN'}"
    elif known is not None:
        example = _whole_map(field, place, known, rows)
    else:
        example = f"data.columns.{field}={place or 'COLUMN'}" if field in ("question", "answer") else "data.columns"
    return DataError(f"no column {wanted!r} for {field} among: {shown or 'none'}", f"{hint}set {example}", path=path)


def _whole_map(field: str, place: str, known: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A setting to paste, with all known fields and the place of another one."""
    paths = {name: known.get(name, "COLUMN") for name in ("question", "answer")} | dict(known)
    paths = {name: path for name, path in paths.items() if path != place}  # a solution that is the answer
    paths[field] = place or "COLUMN"
    if "answer" not in known and field != "answer":
        paths["answer"] = _likeliest("answer", "answer", rows) or _replied("answer", rows, known) or "COLUMN"
    beside = paths["question"].rpartition(".")[0]
    for name in ("choices", "rationale") if beside else ():  # MMLU's auxiliary_train has all of them in an object
        other = _likeliest(name, name, rows).removesuffix("[0]")
        if other.rpartition(".")[0] == beside:
            paths.setdefault(name, other)
    pairs = ", ".join(f"{name}: {_in_quotes(value)}" for name, value in paths.items())
    return shlex.quote(f"data.columns={{{pairs}}}")


def _replied(field: str, rows: Sequence[Mapping[str, Any]], known: Mapping[str, str] | None) -> str:
    """For an answer, the place of a reply: a text with an answer mark, or the preferred one of two replies."""
    row = next(iter(rows), {})
    if field != "answer":
        return ""
    taken = [path for name, path in (known or {}).items() if name != "rationale"]
    for column, value in row.items():
        if column not in taken and isinstance(value, str) and has_mark(value):
            return str(column)
    for name in ("chosen", "solution"):
        for column in (column for column in row if plain_name(column) == name and column not in taken):
            return str(column) if isinstance(row[column], str) else _inside(row[column], str(column)) or ""
    return ""


def _inside(value: Any, place: str) -> str | None:
    """The likeliest place of a text inside an object or a list: the last reply of turns, a `value`, else the first."""
    if is_turns(value):
        return next((f"{place}[-1].{key}" for key in ("content", "value") if key in value[-1]), None)
    if isinstance(value, Mapping) and isinstance(value.get("spans"), list):  # DROP's; a first one of several is wrong
        return f"{place}.spans"
    found = [name for name, one in _places(value, place) if not isinstance(one, Mapping | list)]
    named = [name for name in found if name.rpartition(".")[2] in ("value", "text", "content")]
    return next(iter((*named, *found)), None)


def _likeliest(field: str, wanted: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The place whose name is like the wanted one, at the top level or below another column; "" if there is none."""
    row = next(iter(rows), {})
    columns = [
        column for column in columns_of(rows) if field == "id" or not re.search(r"[_ ]?(?:id|idx)$", column, re.I)
    ]
    near = difflib.get_close_matches(wanted.lower(), {column.lower(): column for column in columns}, n=1, cutoff=0.6)
    found = [column for column in columns if near and column.lower() == near[0]]
    if found and not isinstance(row.get(found[0]), Mapping | list):
        return found[0]
    # One of several answers may be wrong, so none of those is proposed.
    below = dict(_places({name: value for name, value in row.items() if not _are_judged(value)}, ""))
    named: dict[str, str] = {}
    for place in below:
        named.setdefault(plain_name(re.sub(r"\[0\]", "", place).rpartition(".")[2]), place)
    nested = [named[name] for name in SYNONYMS.get(field, ()) if name in named]
    like = [column for column in columns if plain_name(wanted) and plain_name(wanted) in plain_name(column)]
    for place in (*nested, *found, *like):
        value = below.get(place, row.get(place))
        if (place in nested and isinstance(value, Mapping)) or _are_judged(value):
            continue
        if is_turns(value) or not isinstance(value, Mapping | list):
            return place
        inner = _inside(value, place)
        if inner is not None:
            return inner
    return ""


def _are_judged(value: Any) -> bool:
    """Whether a value is a list of answers or options that each say whether they are right."""
    items = value if isinstance(value, list) else []
    return any(isinstance(item, Mapping) and any(isinstance(told, bool) for told in item.values()) for item in items)


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
