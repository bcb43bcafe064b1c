"""Read JSON strictly: report what ordinary parsers accept silently.

A duplicate key, NaN, a number beyond the range of a float, half a surrogate pair or a row that is not an object becomes
a `Reject` with its line, and reading continues with the next row. Lines end only at b"\\n".
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pst_dist.data.sources.json_tables import is_table, table_rows, wrapped_in
from pst_dist.data.sources.rows import Entry, RawRow, Reject, excerpt
from pst_dist.data.tasks.scoring import kind_of
from pst_dist.errors import DataError, InputError
from pst_dist.text.urls import place_name

MAX_LINE_BYTES = 16 << 20
"""A longer line is rejected and not kept in memory."""
MAX_CELL_CHARACTERS = 16 << 20
"""A row with a longer text is rejected, in any format."""
LONG_CELL = f"a text of more than {MAX_CELL_CHARACTERS >> 20} Mi characters"
NOT_UTF8 = " (for Windows-1252 convert the file with iconv -f WINDOWS-1252 -t UTF-8)"
MAX_DEPTH = 64
"""Deeper nesting of lists and objects is rejected."""


def refuse_utf16(path: Path, start: bytes) -> None:
    """Raise InputError for UTF-16 and UTF-32, recognised by their byte order mark or by zero bytes between letters."""
    wide = start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or b"\0\0" in start[:4]
    if wide or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start[:2]:
        name = "UTF-32" if wide else "UTF-16"
        raise InputError(f"is {name}", f"convert it to UTF-8, for example with iconv -f {name} -t UTF-8", path=path)


@dataclass(frozen=True)
class _Fault:
    """A placeholder inside a parsed value for something that strict JSON does not allow."""

    code: str
    what: str


def _object(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return _Fault("duplicate_key", f"duplicate key {excerpt(twice)!r} in an object")
    return value


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= 4000 else _Fault("too_long", f"a number of {len(digits)} digits")


def _real(digits: str) -> Any:
    value = float(digits)
    return value if abs(value) != float("inf") else _Fault("not_finite", f"number {excerpt(digits)} is not finite")


_SURROGATE = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_real,
    parse_constant=lambda word: _Fault("not_finite", f"{word} is not JSON"),
)


def fault_in(value: Any) -> _Fault | None:
    """The first fault anywhere in a parsed value. Works without recursion, so deep nesting is no problem."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, _Fault):
            return item
        if depth > MAX_DEPTH:
            return _Fault("too_deep", f"nested deeper than {MAX_DEPTH}")
        if isinstance(item, str):
            if len(item) > MAX_CELL_CHARACTERS:
                return _Fault("too_long", LONG_CELL)
            if not item.isascii() and _SURROGATE.search(item):
                return _Fault("surrogate", "half of a surrogate pair (\\ud800 to \\udfff) in a text")
        elif isinstance(item, dict):
            stack.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            stack.extend((part, depth + 1) for part in item)
    return None


class Line(NamedTuple):
    """A line of JSON Lines that nobody has parsed yet, so that another process can do it."""

    path: str
    number: int
    """Counted from 1."""
    raw: bytes

    def entry(self) -> Entry:
        """The row in it, or why there is none."""
        return _json_line(self.path, _name(self.path), self.number, self.raw)


_name = functools.lru_cache(maxsize=8)(place_name)
"""All lines of a file have the same."""


def _row_or_reject(value: Any, path: str, name: str, line: int, text: str | bytes) -> Entry:
    fault = fault_in(value)
    if fault is not None:
        return Reject(path, line, fault.code, fault.what, excerpt(text))
    if not isinstance(value, dict):
        return Reject(path, line, "not_object", f"row is {kind_of(value)}, expected an object", excerpt(text))
    return RawRow(value, path, line, f"{name}:{line}")


def json_lines(path: Path, readline: Callable[[int], bytes]) -> Iterator[Entry]:
    """The rows of JSON Lines."""
    for line in unparsed_lines(path, readline):
        yield line.entry() if isinstance(line, Line) else line


def unparsed_lines(path: Path, readline: Callable[[int], bytes]) -> Iterator[Line | Reject]:
    """Lines that are not blank, and a reject for each that is too long."""
    number, name = 0, str(path)
    while raw := readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            refuse_utf16(path, raw)
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            start = raw[:400]
            while (more := readline(1 << 20)) and not more.endswith(b"\n"):
                pass
            yield Reject(
                str(path), number, "too_long", f"line is longer than {MAX_LINE_BYTES >> 20} MiB", excerpt(start)
            )
        elif raw.strip():
            yield Line(name, number, raw)


def _json_line(path: str, name: str, number: int, raw: bytes) -> Entry:
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject(path, number, "encoding", f"byte {error.start + 1} is not UTF-8{NOT_UTF8}", excerpt(raw))
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
    except json.JSONDecodeError as error:
        return Reject(path, number, "json", f"column {error.pos + 1}: not JSON: {error.msg}", excerpt(text))
    except RecursionError:
        return Reject(path, number, "too_deep", f"nested deeper than {MAX_DEPTH}", excerpt(text))
    rest = text[end:].strip(" \t\r\n")
    if rest:
        return Reject(
            path,
            number,
            "json",
            f"column {end + 1}: not JSON: {excerpt(rest)[:20]!r} after the object",
            excerpt(text),
        )
    return _row_or_reject(value, path, name, number, text)


def json_document(path: Path, raw: bytes) -> Iterator[Entry]:
    """Read a list of objects, JSON Lines with another suffix, or an object with rows in a form of `json_tables`."""
    refuse_utf16(path, raw)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    start = raw.lstrip()[:1]
    if start == b"[":
        yield from _json_list(path, _text(path, raw))
        return
    if start == b"{" and _is_lines(raw):
        for number, line in enumerate(raw.split(b"\n"), 1):
            if line.strip():
                yield _json_line(str(path), path.name, number, line)
        return
    if not start:
        return
    text = _text(path, raw)
    value = _whole(path, text)
    if isinstance(value, _Fault):
        raise DataError(value.what, "fix the file", path=path)
    rows = value.get("data") if isinstance(value, dict) else None
    if isinstance(rows, dict):
        raise DataError(
            "`data` is an object, not a list of rows",
            "if this is a Fine-tune-CoT completion file, set it as data.teacher_completions",
            path=path,
        )
    key = wrapped_in(value) if isinstance(value, dict) else None
    if key is None:
        for number, row in enumerate(table_rows(path, value), 1):
            fault = fault_in(row)
            if fault is not None:
                yield Reject(str(path), number, fault.code, fault.what, excerpt(str(row)))
            else:
                yield RawRow(row, str(path), number, f"{path.name}#{number}")
        return
    # Compare the content, because the key may also occur elsewhere in the object.
    for match in re.finditer(rf'"{key}"\s*:\s*(?=\[)', text):
        if _DECODER.raw_decode(text, match.end())[0] == value[key]:
            yield from _json_list(path, text, match.end())
            return


def _is_lines(raw: bytes) -> bool:
    """Whether one of the first lines is a complete object, so that the file is JSON Lines despite its suffix."""
    lines = [line for line in raw.split(b"\n", 20)[:20] if line.strip()]
    for line in lines[:5]:
        try:
            value = json.loads(line) if line.startswith(b"{") else None
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            if len(lines) > 1:
                return not _is_one_value(raw)
            return not (wrapped_in(value) or isinstance(value.get("data"), list | dict) or is_table(value))
    return False


def _is_one_value(raw: bytes) -> bool:
    """Whether the whole text is one JSON value; in JSON Lines the second object ends the parser early."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start + 1} is not UTF-8"
        raise DataError(what + NOT_UTF8, "convert the file to UTF-8", path=path, line=line) from error


def _whole(path: Path, text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        what = f"column {error.colno}: not JSON: {error.msg}"
        raise DataError(what, "fix the file", path=path, line=error.lineno) from error
    except RecursionError as error:
        raise DataError(f"nested deeper than {MAX_DEPTH}", path=path) from error


def _json_list(path: Path, text: str, start: int | None = None) -> Iterator[Entry]:
    """Read the elements of a JSON list one by one, so that each has its line and a faulty one becomes a reject.

    `start` is the position of the opening bracket, or None if the text must contain nothing but the list.
    """
    alone = start is None
    start = text.index("[") if start is None else start
    counted, line = start, text.count("\n", 0, start) + 1
    position = _skip(text, start + 1)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken(path, text, error.pos, error.msg) from error
        except RecursionError as error:
            raise DataError(f"nested deeper than {MAX_DEPTH}", "fix the file", path=path, line=line) from error
        yield _row_or_reject(value, str(path), path.name, line, text[position : position + 200])
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
            if text[position : position + 1] == "]":
                raise _broken(path, text, position, "a comma before the closing bracket")
        elif text[position : position + 1] != "]":
            raise _broken(path, text, position, "expected ',' or ']' after a row")
    if alone and text[position + 1 :].strip():
        raise _broken(path, text, _skip(text, position + 1), "more after the closing bracket")


def _skip(text: str, index: int) -> int:
    while text[index : index + 1] in (" ", "\t", "\r", "\n"):
        index += 1
    return index


def _broken(path: Path, text: str, index: int, message: str) -> DataError:
    line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
    return DataError(f"column {column}: not JSON: {message}", "fix the file", path=path, line=line)
