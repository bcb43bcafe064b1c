"""One word of the command line, `key.sub=value`, as a place in the config and a value."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pst_dist.config.schema import Config
from pst_dist.config.section import types_in
from pst_dist.config.yaml_text import parse_value
from pst_dist.errors import ConfigError


def parse_override(word: str) -> tuple[tuple[str, ...], Any]:
    """`train.bf16=true` -> (("train", "bf16"), True); the value is read as YAML.

    A key that takes text alone gets the text as it is, with spaces, braces, colons and hashes: `embed.prefix=query: `.
    Quotes around all of it are removed, and `null` is none where none is allowed.
    """
    key, sign, text = word.removeprefix("--").partition("=")
    if not sign or not key:
        raise ConfigError(f"{word!r} is not key.sub=value", "for example train.learning_rate=1e-3")
    place = tuple(key.replace("-", "_").split("."))
    takes_text, takes_none = _text_field(place)
    if not takes_text:
        return place, parse_value(text, key)
    if text[:1] in ("'", '"'):
        value = parse_value(text, key)
        return place, value if isinstance(value, str) else text
    return place, None if takes_none and text.strip() in ("", "~", "null") else text


def _text_field(place: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether a key of the config takes text alone, and whether it takes null besides."""
    model: type[BaseModel] = Config
    for name in place[:-1]:
        info = model.model_fields.get(name)
        if info is None or not (isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)):
            return False, False
        model = info.annotation
    info = model.model_fields.get(place[-1])
    kinds = types_in(info.annotation) if info is not None else set()
    return kinds - {type(None)} == {str}, type(None) in kinds


def set_key(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set a nested key. A value on the way that is not a section is replaced."""
    for key in keys[:-1]:
        child = tree.get(key)
        if not isinstance(child, dict):
            child = tree[key] = {}
        tree = child
    tree[keys[-1]] = value
