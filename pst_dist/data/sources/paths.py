"""Places in a row: nested paths `a.b[0].c`, texts of lists `a[*].b`, templates `{a} {b}`, lists of columns `a, b`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pst_dist.data.sources.context import ADD_COLUMN, is_blank
from pst_dist.data.sources.conversations import is_turns
from pst_dist.data.sources.options import printed_texts
from pst_dist.data.sources.rows import RowError, plain_name


@functools.lru_cache(maxsize=64)
def columns_in(paths: tuple[str, ...]) -> frozenset[str]:
    """The columns that paths, templates and lists of columns name."""
    names = [name.strip() for path in paths for name in re.findall(r"\{([^{}]+)\}", path) or [path, *path.split(",")]]
    names += [name.removesuffix("?") for name in names]
    return frozenset((*names, *(re.split(r"[.\[]", name)[0] for name in names)))


def options_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at the path of the choices. For a list of columns `A, B, C` it is an object of those columns."""
    names = columns_of_list(row, path)
    if names == [path]:
        return look_up(row, path)
    values = {name: look_up(row, name) for name in names}
    return None if all(value is None for value in values.values()) else values


def columns_of_list(row: Mapping[str, Any], path: str) -> list[str]:
    """The paths in a list of columns `A, B, C`; only the path itself if it is no such list."""
    if path in row or "," not in path or "{" in path:
        return [path]
    return [name.strip() for name in path.split(",")]


def is_anywhere(rows: Iterable[Mapping[str, Any]], path: str) -> bool:
    """Whether there is something at a path in any of the rows; at each path of a list of columns."""
    rows = list(rows)
    paths = columns_of_list(rows[0], path) if rows else []
    return all(any(look_up(row, one) is not None or turns_at(row, one) for row in rows) for one in paths)


def turns_at(row: Mapping[str, Any], path: str) -> tuple[list[Any], str | None] | None:
    """(turns, the text before them) of a template `{system}\n\n{messages}` that ends with a list of turns; else None.

    The text is None where the template cannot be filled.
    """
    found = None if path in row else re.fullmatch(r"(.*)\{([^{}]+)\}\s*", path, re.DOTALL)
    turns = None if found is None else look_up(row, found.group(2).strip())
    if found is None or not isinstance(turns, list) or not is_turns(turns):
        return None
    return turns, _fill(row, found.group(1))


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path, or the text of a filled template; None if any part is missing.

    `[*]` joins the texts of a list, one to a line: `paragraphs[*].text`. A column whose name contains a dot or a
    bracket takes precedence over a path.
    """
    if "{" in path and path not in row:
        return _fill(row, path)
    try:
        return _reach(row, path)
    except _NoText:
        return None


class _NoText(Exception):
    """A list has something at `[*]` that is no text, so that its texts cannot be joined."""


def _reach(row: Mapping[str, Any], path: str) -> Any:
    return row[path] if path in row else _follow(row, re.findall(r"[^.\[\]]+|\[-?\d+\]|\[\*\]", path))


def _follow(value: Any, steps: list[str], *, joined: bool = False) -> Any:
    """What is reached from a value by some steps; None if one of them leads nowhere, and _NoText where that is an item
    of a list to be `joined`."""
    for place, step in enumerate(steps):
        if step == "[*]":
            value = printed_texts(value) or value if isinstance(value, str) else value
            if not isinstance(value, list):
                raise _NoText
            return _joined([_follow(item, steps[place + 1 :], joined=True) for item in value])
        if step.startswith("["):
            index = int(step[1:-1])
            value = printed_texts(value) if isinstance(value, str) else value
            value = value[index] if isinstance(value, list) and -len(value) <= index < len(value) else None
        else:
            if joined and not (isinstance(value, Mapping) and step in value):
                raise _NoText
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return None
    return value


def _joined(items: list[Any]) -> str:
    """Texts as lines, without those that are blank or missing; _NoText if something else is among them."""
    if any(isinstance(item, bool) or not isinstance(item, str | int | float | None) for item in items):
        raise _NoText
    return "\n".join(text for item in items if item is not None and (text := str(item).strip()))


def texts_at(value: Any, column: str) -> str | None:
    """The path to all texts of a column: `passage`, `contexts[*]`, `context.sentences[*][*]`, `paragraphs[*].text`.

    None if no path has them all: objects with two texts, or items that differ. Titles, labels and numbers beside the
    texts of an object do not count.
    """
    paths = _text_paths(value, column)
    return paths.pop() if len(paths) == 1 else None


def _text_paths(value: Any, path: str, depth: int = 6) -> set[str | None]:
    """The paths to the texts in a value; None stands for something that no path has."""
    if is_blank(value):
        return set()
    if isinstance(value, str):
        return {path}
    if depth and isinstance(value, list):
        return {found for item in value for found in _text_paths(item, f"{path}[*]", depth - 1)}
    if depth and isinstance(value, Mapping):
        parts = [name for name in value if not is_blank(value[name]) and plain_name(str(name)) not in _BESIDE]
        return {found for name in parts for found in _text_paths(value[name], f"{path}.{name}", depth - 1)}
    return {None}


_BESIDE = (
    *("title", "titles", "id", "idx", "index", "label", "labels", "meshes", "source", "url", "lang", "language"),
    *("issupporting", "sentid", "reasoningrequiredpred", "reasoningfreepred", "wikipediatitle", "pageid"),
)
"""What an object has beside its texts in PubMedQA, HotpotQA and MuSiQue."""


def refuse_partial(row: Mapping[str, Any], template: str) -> None:
    """Raise RowError for a column of which a guessed template would read only a part in this row."""
    for name in re.findall(r"\{([^{}]+)\}", template):
        path = name.strip() if name in row else name.strip().removesuffix("?")
        column = re.split(r"[.\[]", path)[0]
        if path in row or path == column or is_blank(row.get(column)):
            continue
        if _text_paths(row[column], column) - {path}:
            what = f"column {column!r} would not be read whole by {path}, but the question may depend on it"
            raise RowError("unread", f"{what}; {ADD_COLUMN}")


def _fill(row: Mapping[str, Any], template: str) -> str | None:
    """A template with the row's values; None if one is missing. `{context?}` may be missing or blank, and then the
    white space after it is left out too."""
    missing = False

    def piece(match: re.Match[str]) -> str:
        nonlocal missing
        name, space = match.group(1).strip(), match.group(2)
        optional = name.endswith("?") and name not in row
        try:
            value = _reach(row, name.removesuffix("?") if optional else name)
        except _NoText:
            missing = True
            return ""
        if optional and (value is None or (isinstance(value, str) and not value.strip())):
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            missing = True
            return ""
        return f"{value}{space}"

    text = re.sub(r"\{([^{}]+)\}(\s*)", piece, template)
    return None if missing else text
