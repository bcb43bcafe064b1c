"""The values of Arrow tables as they were meant: names of class labels, and decimals of narrow floats.

Parquet files and datasets store a class label as a number whose name is in the schema, and 0.1 in 32 bits as
0.10000000149. `readers` and `specs` read the tables, `in_memory` rows in NumPy arrays.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Convert = Callable[[Any], Any]


def shortest(value: float, bits: int) -> float:
    """The decimal with the fewest digits that a float of 16 or 32 bits stores as `value`: 0.1 for 0.10000000149."""
    if not math.isfinite(value):
        return value
    return float(str(np.float16(value) if bits == 16 else np.float32(value)))


@dataclass(frozen=True)
class ArrowValues:
    """Corrects the rows of one table."""

    labels: Mapping[str, Sequence[str]]
    """Column of class labels -> their names; the number of a label is arbitrary."""
    converts: Mapping[str, Convert]
    """Column with narrow floats -> what to do with its values."""

    @classmethod
    def of(cls, schema: Any, labels: Mapping[str, Sequence[str]] | None = None) -> ArrowValues:
        """For a `pyarrow.Schema`; without `labels` the names are those that the datasets library writes into it."""
        found = _labels_in(schema) if labels is None else labels
        converts = {field.name: _conversion(field.type) for field in schema}
        return cls(found, {name: convert for name, convert in converts.items() if convert is not None})

    def corrected(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, changed in place."""
        for name, names in self.labels.items():
            number = row.get(name)
            if isinstance(number, int) and 0 <= number < len(names):
                row[name] = names[number]
        for name, convert in self.converts.items():
            if row.get(name) is not None:
                row[name] = convert(row[name])
        return row


def _labels_in(schema: Any) -> dict[str, Sequence[str]]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}  # another program's metadata
    return {name: names for name, names in labels.items() if all(isinstance(word, str) for word in names)}


def _conversion(kind: Any) -> Convert | None:
    """What to do with the values of an Arrow type; None for one without narrow floats."""
    from pyarrow import types

    if types.is_float16(kind) or types.is_float32(kind):
        return functools.partial(shortest, bits=kind.bit_width)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _conversion(kind.value_type)
        return inner and (lambda values: [None if value is None else inner(value) for value in values])
    if types.is_struct(kind):
        fields = {field.name: convert for field in kind if (convert := _conversion(field.type)) is not None}
        return (lambda value: _converted(value, fields)) if fields else None
    return None


def _converted(value: dict[str, Any], fields: Mapping[str, Convert]) -> dict[str, Any]:
    return {name: fields[name](item) if name in fields and item is not None else item for name, item in value.items()}
