"""Turns pydantic's errors about a config into one line that names the key, its file and line, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pst_dist.config.keys import SECTIONS, known_keys
from pst_dist.config.schema_data import RowSource
from pst_dist.errors import ConfigError


def explain(
    error: ValidationError,
    path: Path | None,
    lines: dict[tuple[str, ...], int],
    origins: dict[tuple[str, ...], dict[str, Any]],
    *,
    keys: set[str] | None = None,
) -> ConfigError:
    """Turn pydantic's first error into a ConfigError with the place of the key; `keys` are the model's known keys.

    `lines` has the line numbers of a file's keys. `origins` has the source of other keys: {} for the command line.
    """
    keys = set(known_keys()) if keys is None else keys
    first = error.errors()[0]
    location = _key_of(first, keys)
    if first["type"] != "extra_forbidden":
        # Of the branches of a union, the one that fits best fails at the deepest place.
        branches = [one for one in error.errors() if _key_of(one, keys)[: len(location)] == location]
        first = max(branches, key=lambda one: (len(one["loc"]), one["loc"][-1:] == ("float",)))
    inner = _part_of_value(first, len(location))
    dotted = ".".join(location)
    place: dict[str, Any] = {}
    where = [origin for keys_of, origin in origins.items() if keys_of[: len(location)] == location]
    if where:
        place = where[-1]
    elif location in lines:
        place = {"path": path, "line": lines[location]}
    elif path is not None:
        place = {"path": path}
    if first["type"] == "extra_forbidden" and inner:
        near = difflib.get_close_matches(str(first["loc"][-1]), _SOURCE_KEYS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "use " + ", ".join(_SOURCE_KEYS)
        return ConfigError(f"unknown key {dotted + inner!r}", hint, **place)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key {dotted!r}", _remedy_for_unknown(location, keys), **place)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        return ConfigError(f"{dotted} is a section, got {first['input']!r}", f"write {dotted}.KEY=value", **place)
    if first["type"] == "list_type":
        return ConfigError(f"{dotted} is a list, got {first['input']!r}", f"write {dotted}=[{first['input']}]", **place)
    if not dotted:
        return ConfigError(message, **place)
    value = first.get("input")
    got = f", got {value!r}" if isinstance(value, str | int | float | bool) else ""
    return ConfigError(f"{dotted}{inner}: {message[:1].lower()}{message[1:]}{got}", **place)


_SOURCE_KEYS = tuple(RowSource.model_fields)
"""The keys of a source in a mixture, the only sections that are in a list."""


def _key_of(error: Mapping[str, Any], keys: set[str]) -> tuple[str, ...]:
    """The key that an error of pydantic is about, without the part of its value and the branch of a union."""
    location = tuple(map(str, error["loc"]))
    known = location
    while known and ".".join(known) not in keys:
        known = known[:-1]
    inside = known and ".".join(known) not in SECTIONS
    return location if error["type"] == "extra_forbidden" and not inside else known


def _part_of_value(error: Mapping[str, Any], depth: int) -> str:
    """Where in the value of a key an error is: `[0].columns`. Names of types are branches of a union."""
    parts = error["loc"][depth:]
    names = [part for part in parts if isinstance(part, int) or not re.search(r"\[|^(str|int|float|bool)$|-", part)]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)


_OTHER_NAMES = {
    **dict.fromkeys(("lr", "rate", "learningrate"), "train.learning_rate"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "max_epochs", "n_epochs"), "train.num_train_epochs"),
    **dict.fromkeys(("batch_size", "bs", "batchsize", "train_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(("micro_batch_size", "per_device_batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("model", "model_name", "base_model", "model_path", "student"), "student.model_name_or_path"),
    **dict.fromkeys(("steps", "num_steps", "total_steps"), "train.max_steps"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "seq_len", "cutoff_len", "sequence_len"), "layout.max_length"),
    **dict.fromkeys(("question", "answer", "rationale", "prompt_column", "label"), "data.columns"),
    **dict.fromkeys(("output", "out", "save_dir", "run_dir"), "output_dir"),
    **dict.fromkeys(("zero", "zero_stage", "deepspeed_config"), "train.deepspeed"),
    **dict.fromkeys(("optimizer", "optimiser"), "train.optim"),
}
"""Name in other programs -> our key."""


def refuse_misspelt(words: Iterable[str], own: Iterable[str]) -> None:
    """Raise ConfigError for a word such as `node=2` that is close to one of a command's own keys and no config key.

    `own` are the keys that the command takes besides those of a config.
    """
    own, known = list(own), {*SECTIONS, *known_keys(), *_OTHER_NAMES}
    for word in words:
        key, sign, _ = word.partition("=")
        if sign and "." not in key and key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key, own, n=1, cutoff=0.7)
        else:
            near = []
        if near:
            raise ConfigError(f"unknown key {key!r}", f"did you mean {near[0]!r}?")


def _remedy_for_unknown(location: tuple[str, ...], keys: set[str]) -> str:
    """A hint with the known key that is closest to a mistyped one, by its whole path or by its last part."""
    dotted = ".".join(location)
    if dotted in keys:  # a file has `section.key: value`, which is the syntax of the command line
        section, _, key = dotted.rpartition(".")
        return f"in a file write {key} on a line of its own below {section}:"
    known = _OTHER_NAMES.get(dotted.rsplit(".", 1)[-1].replace("-", "_").lower())
    if known is not None and known in keys:
        return f"did you mean {known!r}?"
    near = difflib.get_close_matches(dotted, keys, n=1, cutoff=0.75)
    if not near or near[0] == dotted.rpartition(".")[0]:  # suggesting its own section would not help
        last = dotted.rsplit(".", 1)[-1]
        by_last = {key.rsplit(".", 1)[-1]: key for key in sorted(keys, reverse=True)}
        near = [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f"did you mean {near[0]!r}?" if near else "`pst config --schema` lists all keys"
