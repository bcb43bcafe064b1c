"""Write rows given as Python objects (a list of dicts, a pandas frame, a `datasets.Dataset`) to one JSON Lines file.

After that they are handled like any other file: column maps, checks, error messages with line numbers and the command
line all work. The same rows give the same bytes in whatever form they are given, so the file is named by its digest.
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

from pst_dist.data.sources.arrow_values import shortest
from pst_dist.data.sources.saved_datasets import dataset_rows
from pst_dist.data.sources.strict_json import MAX_DEPTH
from pst_dist.errors import DataError
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.manifest import canonical_json, sha256_file

_ACCEPTED = "pass a list of dicts, a pandas frame or a datasets.Dataset"


@dataclass(frozen=True)
class RowsFile:
    """Rows as the bytes of a JSON Lines file: one line per row with sorted keys, in the given order."""

    split: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Digest of the content; the same for the same rows."""
        return hashlib.sha256(self.content).hexdigest()

    def path_in(self, data: Path) -> Path:
        """Its path in a run's data directory. Row ids start with the file name, so the file has the split's name."""
        return data / "rows" / self.sha256[:16] / f"{self.split}.jsonl"

    def write(self, data: Path) -> Path:
        """Write it below a run's data directory, unless it exists there with the same bytes."""
        path = self.path_in(data)
        if not path.is_file() or sha256_file(path) != self.sha256:
            with atomic_path(path) as partial:
                partial.write_bytes(self.content)
        return path


def is_in_memory(value: Any) -> bool:
    """Whether a value of data.train (or another split) contains the rows themselves instead of paths."""
    if value is None or isinstance(value, str | Path):
        return False
    return not (isinstance(value, list | tuple) and value and all(isinstance(word, str | Path) for word in value))


def rows_file(rows: Any, split: str) -> RowsFile:
    """The JSON Lines of a list of dicts (or any iterable of them), a pandas frame or a `datasets.Dataset`.

    Missing values (NaN, NaT, pandas.NA) become null, so that a row without an answer is refused by its number. NumPy
    values become plain numbers and lists, dates ISO 8601 text, decimals text, and class labels of a dataset their
    names. A named index of a frame becomes a column. Raises DataError, naming the row (counted from 1) and its key, for
    a value that JSON cannot represent.
    """
    place = f"data.{split}"
    lines = []
    for number, row in enumerate(_rows(rows, place), 1):
        where = f"{place} row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"is {type(row).__name__}, not a dict", _ACCEPTED, path=where)
        try:
            lines.append(canonical_json(plain_value(row, where, "")).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise DataError("contains half of a surrogate pair in a text", "fix the text", path=where) from error
        except ValueError as error:  # an integer with more digits than Python writes
            raise DataError(f"cannot be written as JSON: {error}", "pass the value as text", path=where) from error
    if not lines:
        raise DataError("contains no rows", "pass one or more", path=place)
    return RowsFile(split, b"".join(lines))


def _rows(rows: Any, place: str) -> Iterable[Any]:
    """Iterate over the rows in any supported form. A library that is not imported cannot have made them."""
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        return _frame_rows(rows, place)
    if datasets is not None and isinstance(rows, datasets.Dataset | datasets.IterableDataset):
        return dataset_rows(rows)
    if isinstance(rows, Mapping):
        keys = ", ".join(str(key) for key in list(rows)[:4])
        raise DataError(
            f"is a mapping with {keys}, not rows",
            "pass one split of a DatasetDict; convert a dict of columns to a pandas frame",
            path=place,
        )
    if isinstance(rows, bytes | bytearray) or not isinstance(rows, Iterable):
        raise DataError(f"is {type(rows).__name__}, not rows", _ACCEPTED, path=place)
    return rows


def _frame_rows(frame: Any, place: str) -> Iterator[dict[str, Any]]:
    """Rows of a pandas frame. Integers that became floats because of missing values are turned back into integers."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = list(frame.columns)
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"the column name {name!r} of the frame is not text", "rename it", path=place)
        if names.count(name) > 1:
            raise DataError(f"the frame has a duplicate column {name!r}", "rename one of them", path=place)
    columns = []
    for name in names:
        column = frame[name]
        if getattr(column.dtype, "kind", "") == "f" and column.isna().any():
            present = column.dropna()
            if len(present) and (present % 1 == 0).all():
                column = column.astype("Int64")
        cells, bits = column.tolist(), 8 * getattr(column.dtype, "itemsize", 8)
        if getattr(column.dtype, "kind", "") == "f" and bits < 64:
            cells = [shortest(value, bits) if isinstance(value, float) else value for value in cells]
        columns.append(cells)
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def plain_value(value: Any, where: str, key: str, depth: int = 1) -> Any:
    """A value of a row as plain JSON data; `where` names the row and `key` the path inside it."""
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
        return [plain_value(item, where, f"{key}[{place}]", depth + 1) for place, item in enumerate(value)]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return _from_numpy(value, numpy, where, key, depth)
    raise DataError(f"{key} is {type(value).__name__}, which JSON cannot represent", _REMEDY, path=where)


_REMEDY = "convert it to text, a number, a list or a dict, or leave it out"


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
            raise DataError(f"key {here} is {type(name).__name__}, not text", "use a text key", path=where)
        plain[str(name)] = plain_value(item, where, here, depth + 1)
    return plain


def _from_numpy(value: Any, numpy: Any, where: str, key: str, depth: int) -> Any:
    """A NumPy scalar or array of numbers, Booleans, texts or dates."""
    if isinstance(value, numpy.ndarray):
        return [plain_value(item, where, f"{key}[{place}]", depth + 1) for place, item in enumerate(value)]
    kind = value.dtype.kind
    if kind == "M":  # `item` would turn nanoseconds into an integer
        return None if numpy.isnat(value) else str(value)
    if kind == "f":
        narrow = value.dtype.itemsize < 8
        return _number(shortest(float(value), 8 * value.dtype.itemsize) if narrow else float(value), where, key)
    if kind in "biu":
        return value.item()
    raise DataError(f"{key} is NumPy {value.dtype}, which JSON cannot represent", _REMEDY, path=where)
