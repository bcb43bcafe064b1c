"""The keys of a config in dotted form, such as `train.optim`, and nested sections in that form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from pst_dist.config.schema import Config


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the config, sections before their fields."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


SECTIONS = {name.rpartition(".")[0] for name in known_keys() if "." in name}
"""Keys that contain other keys. A mapping elsewhere, such as data.columns, is a single value."""


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested sections."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        place = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and place in SECTIONS
        flat |= flat_keys(value, f"{place}.") if nested else {place: value}
    return flat


def leaves(tree: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of nested sections. A mapping that is a single value, such as data.columns, is not split."""
    for key, value in tree.items():
        here = (*place, *key.split("."))
        if isinstance(value, Mapping) and ".".join(here) in SECTIONS:
            yield from leaves(value, here)
        else:
            yield here, value
