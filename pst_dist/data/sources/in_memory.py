"""Rows that are Python objects (a list of dicts, a pandas frame, a `datasets.Dataset`) become one JSON Lines file.

From then on they are rows of a file as any others: column maps, checks, error messages with a line, and the command
line all work on them. The same rows give the same bytes whatever they came in, so the file is named by its digest.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.data.sources.specs import dataset_rows
from pst_dist.data.sources.strict_json import MAX_DEPTH
from pst_dist.errors import DataError
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.manifest import canonical_json, sha256_file

_ACCEPTED = "give a list of dicts, a pandas frame or a datasets.Dataset"


@dataclass(frozen=True)
class RowsFile:
    """Rows as the bytes of a JSON Lines file: one line a row, keys sorted, in the order given."""

    split: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Of the content; the same for the same rows."""
        return hashlib.sha256(self.content).hexdigest()

    def path_in(self, data: Path) -> Path:
        """Where it belongs in a run's data directory. Ids of rows begin with the file's name, so that is the split."""
        return data / "rows" / self.sha256[:16] / f"{self.split}.jsonl"

    def write(self, data: Path) -> Path:
        """Write it below a run's data directory, once: a file that is there with these bytes is kept."""
        path = self.path_in(data)
        if not path.is_file() or sha256_file(path) != self.sha256:
            with atomic_path(path) as partial:
                partial.write_bytes(self.content)
        return path


def is_in_memory(value: Any) -> bool:
    """Whether a value of data.train and the like holds the rows themselves: no path, no list of paths and not None."""
    if value is None or isinstance(value, str | Path):
        return False
    return not (isinstance(value, list | tuple) and value and all(isinstance(word, str | Path) for word in value))


def rows_file(rows: Any, split: str) -> RowsFile:
    """The JSON Lines of a list of dicts (or any iterable of them), a pandas frame or a `datasets.Dataset`.

    Missing values (NaN, NaT, pandas.NA) become null, so that a row whose answer is one is refused by its number.
    NumPy values become plain numbers and lists, dates ISO 8601 text, decimals their digits as text, class labels of
    a dataset their names; a named index of a frame is a column. Raises DataError, naming the row (counted from 1) and
    its key, for a value that JSON has no form for.
    """
    place = f"data.{split}"
    lines = []
    for number, row in enumerate(_rows(rows, place), 1):
        where = f"{place} row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"is {type(row).__name__}, not a dict", _ACCEPTED, path=where)
        try:
            lines.append(canonical_json(_plain(row, where, "")).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise DataError("holds half of a surrogate pair in a text", "repair the text", path=where) from error
        except ValueError as error:  # an integer with more digits than Python writes
            raise DataError(f"cannot be written as JSON: {error}", "give the value as text", path=where) from error
    if not lines:
        raise DataError("holds no rows", "give one or more", path=place)
    return RowsFile(split, b"".join(lines))


def _rows(rows: Any, place: str) -> Iterable[Any]:
    """The rows one by one, whatever they came in; libraries that are not imported cannot have made them."""
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        return _frame_rows(rows, place)
    if datasets is not None and isinstance(rows, datasets.Dataset | datasets.IterableDataset):
        return dataset_rows(rows)
    if isinstance(rows, Mapping):
        keys = ", ".join(str(key) for key in list(rows)[:4])
        raise DataError(
            f"is a mapping with {keys}, not rows",
            "give one split of a DatasetDict; make a pandas frame of a dict of columns",
            path=place,
        )
    if isinstance(rows, bytes | bytearray) or not isinstance(rows, Iterable):
        raise DataError(f"is {type(rows).__name__}, not rows", _ACCEPTED, path=place)
    return rows


def _frame_rows(frame: Any, place: str) -> Iterator[dict[str, Any]]:
    """Rows of a pandas frame; integers that pandas made floats, because a value is missing, are integers again."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = list(frame.columns)
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"column {name!r} of the frame is not named by text", "rename it", path=place)
        if names.count(name) > 1:
            raise DataError(f"column {name!r} is duplicate in the frame", "rename one of them", path=place)
    columns = []
    for name in names:
        column = frame[name]
        if getattr(column.dtype, "kind", "") == "f" and column.isna().any():
            present = column.dropna()
            if len(present) and (present % 1 == 0).all():
                column = column.astype("Int64")
        columns.append(column.tolist())
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _plain(value: Any, where: str, key: str, depth: int = 1) -> Any:
    """A value of a row as JSON knows it; `where` is the row and `key` the path inside it."""
    if depth > MAX_DEPTH:
        raise DataError(f"{key} is nested deeper than {MAX_DEPTH}", "flatten it", path=where)
    if value is None or isinstance(value, bool) or type(value).__name__ in ("NAType", "NaTType"):
        return value if isinstance(value, bool) else None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float | decimal.Decimal):
        return _number(value, where, key)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return _object(value, where, key, depth)
    if isinstance(value, list | tuple):
        return [_plain(item, where, f"{key}[{place}]", depth + 1) for place, item in enumerate(value)]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return _from_numpy(value, numpy, where, key, depth)
    raise DataError(f"{key} is {type(value).__name__}, which JSON has no form for", _REMEDY, path=where)


_REMEDY = "make it text, a number, a list or a dict, or leave it out"


def _number(value: float | decimal.Decimal, where: str, key: str) -> float | str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        raise DataError(f"{key} is infinite", "leave the row out", path=where)
    return str(value) if isinstance(value, decimal.Decimal) else float(value)


def _object(value: Mapping[Any, Any], where: str, key: str, depth: int) -> dict[str, Any]:
    plain = {}
    for name, item in value.items():
        here = f"{key}.{name}" if key else str(name)
        if not isinstance(name, str):
            raise DataError(f"key {here} is {type(name).__name__}, not text", "name it by text", path=where)
        plain[str(name)] = _plain(item, where, here, depth + 1)
    return plain


def _from_numpy(value: Any, numpy: Any, where: str, key: str, depth: int) -> Any:
    """A NumPy scalar or array of numbers, truth values, texts or dates."""
    if isinstance(value, numpy.ndarray):
        return [_plain(item, where, f"{key}[{place}]", depth + 1) for place, item in enumerate(value)]
    kind = value.dtype.kind
    if kind == "M":  # `item` would make nanoseconds an integer
        return None if numpy.isnat(value) else str(value)
    if kind == "f":
        return _number(float(value), where, key)
    if kind in "biu":
        return value.item()
    raise DataError(f"{key} is NumPy {value.dtype}, which JSON has no form for", _REMEDY, path=where)
