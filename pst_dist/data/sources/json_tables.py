"""Rows in a JSON object instead of a list, as written by pandas and similar tools.

`{"0": {...}, "1": {...}}` has one row per key, `{"question": [...], "answer": [...]}` and
`{"question": {"0": ...}, ...}` have one list or object per column, `{"columns": [...], "data": [[...]]}` is a table,
and `{"data": [{...}]}` or `{"examples": [{...}]}` have a list of rows beside other things.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pst_dist.data.sample import SPLITS
from pst_dist.data.sources.rows import excerpt
from pst_dist.errors import DataError

_SPLITS = {*SPLITS, "dev", "val", "valid"}


def is_table(value: Mapping[str, Any]) -> bool:
    """Whether an object contains rows in one of the forms above, rather than being a single row."""
    cells = list(value.values())
    if set(value) <= _SPLITS:
        return True
    if len(cells) > 1 and all(isinstance(cell, list) for cell in cells):
        return not any(isinstance(item, Mapping) for cell in cells for item in cell)  # those are conversation turns
    return bool(cells) and all(isinstance(cell, Mapping) for cell in cells)


def wrapped_in(value: Mapping[str, Any]) -> str | None:
    """The key of an object under which all rows are, as `data` or BIG-bench's `examples`; None if there is none."""
    lists = [key for key, cell in value.items() if isinstance(cell, list) and any(isinstance(c, Mapping) for c in cell)]
    if "data" in value and isinstance(value["data"], list) and "columns" not in value:
        return "data"
    alone = len(lists) == 1 and not _OF_A_ROW & set(value)
    return lists[0] if alone and lists[0] in ("examples", "rows", "questions", "instances", "problems") else None


_OF_A_ROW = {"question", "answer", "prompt", "problem", "input", "instruction", "messages", "conversations"}
"""Keys of a single row, which may have a list of examples too."""


def table_rows(path: Path, value: Any) -> list[dict[str, Any]]:
    """The rows of an object in one of the forms above, in order; raises DataError for any other value."""
    if not isinstance(value, Mapping) or not value:
        raise DataError("contains one value, not rows", _REMEDY, path=path)
    if set(value) <= _SPLITS:
        names = ", ".join(value)
        raise DataError(f"contains the splits {names}, not rows", "write each split to its own file", path=path)
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return _table(path, value["columns"], value["data"])
    cells = list(value.values())
    if all(isinstance(cell, Mapping) and cell for cell in cells):
        return _keyed(path, value)
    if len(cells) > 1 and all(isinstance(cell, list) for cell in cells):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{excerpt(name)} {length}" for name, length in list(lengths.items())[:6])
            raise DataError(f"contains columns of different lengths: {said}", "make them equal", path=path)
        return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
    keys = ", ".join(map(excerpt, list(value)[:6]))
    raise DataError(f"contains an object with {keys}, not rows", _REMEDY, path=path)


_REMEDY = 'write a list, {"data": [...]} or one object per line'


def _keyed(path: Path, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per key, or one column per key with a value for each row."""
    inner = [set(cell) for cell in value.values()]
    if not all(key.isdecimal() for key in value) and all(key.isdecimal() for keys in inner for key in keys):
        if any(keys != inner[0] for keys in inner):
            raise DataError("contains columns with different rows", "write one object per line", path=path)
        places = next(iter(value.values()))
        return [{name: column[place] for name, column in value.items()} for place in places]
    if all(key.isdecimal() for key in value) or (len(value) > 1 and all(keys == inner[0] for keys in inner)):
        return [dict(row) for row in value.values()]
    keys = ", ".join(map(excerpt, list(value)[:6]))
    raise DataError(f"contains an object with {keys}, not rows", _REMEDY, path=path)


def _table(path: Path, columns: list[Any], data: list[Any]) -> list[dict[str, Any]]:
    if not all(isinstance(name, str) for name in columns) or len(set(columns)) < len(columns):
        raise DataError("`columns` is not a list of distinct names", "write one object per line", path=path)
    for number, row in enumerate(data, 1):
        if not isinstance(row, list) or len(row) != len(columns):
            raise DataError(f"row {number} does not have {len(columns)} values", "fix the file", path=path)
    return [dict(zip(columns, row, strict=True)) for row in data]
