"""Places in a row: nested paths `a.b[0].c`, texts of lists `a[*].b`, templates `{a} {b}`, lists of columns `a, b`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pst_dist.data.sources.context import texts_in
from pst_dist.data.sources.conversations import is_turns
from pst_dist.data.sources.options import printed_texts
from pst_dist.data.sources.rows import plain_name


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
    if path in row:
        return row[path]
    if "{" in path:
        return _fill(row, path)
    try:
        return _follow(row, re.findall(r"[^.\[\]]+|\[-?\d+\]|\[\*\]", path))
    except _NoText:
        return None


def _follow(value: Any, steps: list[str]) -> Any:
    """What is reached from a value by some steps; None if one of them leads nowhere."""
    for place, step in enumerate(steps):
        if step.startswith("["):
            value = printed_texts(value) or None if isinstance(value, str) else value
            if not isinstance(value, list):
                return None
            if step == "[*]":
                return _joined([item if item is None else _text(item, steps[place + 1 :]) for item in value])
            index = int(step[1:-1])
            value = value[index] if -len(value) <= index < len(value) else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return None
    return value


def _text(item: Any, steps: list[str]) -> str:
    """The text that is reached from an item; raises _NoText if there is none."""
    found = _follow(item, steps)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise _NoText
    return str(found).strip()


def _joined(texts: list[str | None]) -> str:
    """Texts as lines, without those that are blank or missing."""
    return "\n".join(text for text in texts if text)


class _NoText(Exception):
    pass


def texts_at(value: Any, column: str) -> str | None:
    """The path to the texts of a column: `passage`, `contexts[*]`, `context.sentences[*][*]`, `paragraphs[*].text`.

    None if an object in it has no part, or several, that could be meant.
    """
    path = column
    for _ in range(_DEEP):
        if isinstance(value, str):
            return path
        if isinstance(value, list) and value:
            path, value = f"{path}[*]", value[0]
        elif isinstance(value, Mapping):
            named = [name for name in value if plain_name(name) in _TEXTS and texts_in(value[name])]
            prose = [name for name in value if any(len(text.split()) > 2 for text in texts_in(value[name]))]
            found = named or prose
            if len(found) != 1:
                return None
            path, value = f"{path}.{found[0]}", value[found[0]]
        else:
            return None
    return None


_DEEP = 6
_TEXTS = ("text", "texts", "content", "sentences", "contexts", "paragraphs", "passages", "paragraphtext", "passagetext")
"""Names of the texts in an object that also has titles, labels or numbers."""


def _fill(row: Mapping[str, Any], template: str) -> str | None:
    """A template with the row's values; None if one is missing. `{context?}` may be missing or blank, and then the
    white space after it is left out too."""
    missing = False

    def piece(match: re.Match[str]) -> str:
        nonlocal missing
        name, space = match.group(1).strip(), match.group(2)
        optional = name.endswith("?") and name not in row
        value = look_up(row, name.removesuffix("?") if optional else name)
        if optional and (value is None or (isinstance(value, str) and not value.strip())):
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            missing = True
            return ""
        return f"{value}{space}"

    text = re.sub(r"\{([^{}]+)\}(\s*)", piece, template)
    return None if missing else text
