"""The JSON files of a run: written in one format, and read strictly.

Anything unexpected (invalid JSON, a number that is not finite, an unknown field, a wrong type, too deep nesting)
raises IntegrityError with the file's path. `manifest` lists the files of an artefact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pst_dist.errors import EnvironmentFault, IntegrityError
from pst_dist.storage.atomic import disk_errors, write_text

_T = TypeVar("_T")
_MOST_DIGITS = 300
"""Of a whole number: more would not fit a float, with which averages and percentages are taken."""
_RUN_AGAIN = "rerun the command that wrote it"
_DELETE = "delete it and rerun the command that wrote it"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; digests are computed from this form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_text(value: Any) -> str:
    """The format of our JSON files: sorted keys, an indent of two spaces, a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys, atomically."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote.

    Raises IntegrityError when it is missing or invalid JSON (including NaN and numbers too large for a float), and
    EnvironmentFault when it cannot be read.
    """
    return parse_json(read_content(path), path)


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` of a file that contains an object; raises IntegrityError for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise IntegrityError("is not a JSON object", _DELETE, path=path)
    return value


def read_typed(path: Path, kind: type[_T]) -> _T:
    """`read_json` as a dataclass or TypedDict; raises IntegrityError, naming the field, for anything unexpected."""
    return typed(read_json(path), kind, path)


def typed(value: Any, kind: type[_T], path: Path, remedy: str | None = None) -> _T:
    """Plain JSON as a dataclass or TypedDict of exact types; raises IntegrityError, naming the field, otherwise.

    A dataclass accepts no unknown fields. An integer is accepted as a float, because JSON does not distinguish 1.0
    from 1.
    """
    remedy = _DELETE if remedy is None else remedy
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        unknown = sorted(value.keys() - {one.name for one in dataclasses.fields(kind)})
        if unknown:
            raise IntegrityError(f"unknown field {unknown[0][:80]!r}", remedy, path=path)
    adapter: TypeAdapter[_T] = _adapter(kind)  # type: ignore[arg-type]  # a class is hashable
    try:
        # As JSON text: in strict mode pydantic accepts a mapping as a dataclass only there.
        return adapter.validate_json(canonical_json(value), strict=True)
    except (ValueError, RecursionError) as error:  # pydantic's is a ValueError
        raise IntegrityError(_first_fault(error), remedy, path=path) from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_fault(error: ValueError | RecursionError) -> str:
    if not isinstance(error, ValidationError):
        return "is nested too deeply" if isinstance(error, RecursionError) else str(error)[:160]
    fault = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    return f"{place[:80] or 'content'}: {fault['msg'][:160]}"


def read_content(path: Path) -> bytes:
    """The bytes of a file; raises as `reading` does."""
    with reading(path):
        return path.read_bytes()


@contextlib.contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn the operating system's read errors into our own.

    Raises IntegrityError with `remedy` when the file is missing, and EnvironmentFault for permission and disk errors.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IntegrityError("file is missing", remedy or _RUN_AGAIN, path=path) from error
    except IsADirectoryError as error:
        raise IntegrityError("is a directory, not a file", remedy or _RUN_AGAIN, path=path) from error
    except PermissionError as error:
        raise EnvironmentFault(
            f"cannot be read: {error.strerror}", "ask its owner for permission: chmod -R a+rX DIRECTORY", path=path
        ) from error
    except OSError as error:
        raise EnvironmentFault(
            f"cannot be read: {error.strerror}", "check the disk or the network share", path=path
        ) from error


def parse_json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise IntegrityError("not JSON: nested too deeply", _DELETE, path=path) from error
    except ValueError as error:  # includes text that is not UTF-8 and integers of too many digits
        raise IntegrityError(f"not JSON: {str(error)[:160]}", _DELETE, path=path) from error


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:20]}... has too many digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a float")
    return value


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line and flush it; readers skip an incomplete last line."""
    with disk_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(canonical_json(value) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a file that `append_line` wrote; skips incomplete lines and lines that are not objects."""
    if not path.exists():
        return []
    rows = []
    for line in read_content(path).split(b"\n"):
        with contextlib.suppress(IntegrityError):
            row = parse_json(line, path)
            if isinstance(row, dict):
                rows.append(row)
    return rows
