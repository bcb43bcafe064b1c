"""Reads JSON that other programs or people wrote: any content gives a value or a one-line error.

Files of our own are read by `json_files`, rows by `data.sources.strict_json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pst_dist.errors import InputError, PstError
from pst_dist.storage.regular_files import read_regular_text

MOST_DEPTH = 64
"""Levels of nesting: several times what a model's config or DeepSpeed's JSON has."""
MOST_WHOLE = 2**48
"""The largest whole number in a config: above it products of sizes would no longer be exact floats."""


def foreign_object(path: Path, *, kind: type[PstError] = InputError, remedy: str = "fix the file") -> dict[str, Any]:
    """The JSON object in a regular file of at most 4 MiB.

    Raises `kind` for anything else: text that is not UTF-8 or not JSON, a key that is given twice (of which Python
    would take the last), a number that is not finite or has thousands of digits, more than 64 levels, another value.
    """
    return parse_object(read_regular_text(path, remedy=remedy), path, kind=kind, remedy=remedy)


def parse_object(
    text: str, path: Path, *, kind: type[PstError] = InputError, remedy: str = "fix the file"
) -> dict[str, Any]:
    """The same for text that was read from `path`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise kind(f"not JSON: {error.msg}", remedy, path=path, line=error.lineno) from error
    except RecursionError as error:
        raise kind(f"nested deeper than {MOST_DEPTH}", remedy, path=path) from error
    except ValueError as error:
        raise kind(str(error)[:160], remedy, path=path) from error
    if not isinstance(value, dict):
        raise kind("is not a JSON object", remedy, path=path)
    if _depth(value) > MOST_DEPTH:
        raise kind(f"nested deeper than {MOST_DEPTH}", remedy, path=path)
    return value


def whole_number(settings: Mapping[str, Any], key: str, where: str | Path, *, least: int = 1) -> int:
    """The whole number at `key`; raises InputError, naming the key, for another type and one out of bounds.

    Raises KeyError when the key is missing.
    """
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_WHOLE:
        shown = repr(value)[:60] if not isinstance(value, int) or abs(value) < 10**60 else "a number of many digits"
        raise InputError(f"{key} is {shown}", f"give a whole number from {least} to {MOST_WHOLE}", path=where)
    return value


def section(settings: Mapping[str, Any], key: str, where: str | Path) -> Mapping[str, Any]:
    """The object at `key`; raises InputError for another type and KeyError when it is missing."""
    value = settings[key]
    if not isinstance(value, dict):
        raise InputError(f"{key} is {repr(value)[:60]}, not an object", "fix the file", path=where)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack.extend((one, depth + 1) for one in inner)
    return deepest
