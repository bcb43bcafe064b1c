"""Turn YAML text and `key.sub=value` overrides into a validated `Config`, and a `Config` into YAML.

Every error names the file and line, or the override, that caused it. `locate` finds the file, `explain` words the
errors of the validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pst_dist.config.explain import explain
from pst_dist.config.keys import SECTIONS, flat_keys, leaves
from pst_dist.config.locate import locate_config, locate_overlay
from pst_dist.config.moved import at_its_place
from pst_dist.config.overrides import parse_override, set_key
from pst_dist.config.schema import Config
from pst_dist.config.yaml_text import read_yaml
from pst_dist.errors import ConfigError
from pst_dist.text.redaction import is_redacted, redact_values

_SOURCES = tuple(f"data.{key}" for key in ("root", "train", "validation", "test", "split_file", "teacher_completions"))


def load_config(
    name: str | None,
    overrides: Sequence[str] = (),
    *,
    keys: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """Read a config by path, run directory or ready-made name and apply overrides.

    A run directory that was moved or copied is used at its current path (see `moved`).

    An override is `key.sub=value`, or `+NAME` for an overlay: a file of keys, applied before all single keys regardless
    of its position. `keys` are nested sections of Python values, applied last. `base` is an already validated config,
    used instead of `name`.

    Raises InputError when there is no such file, and ConfigError, with file and line if possible, for anything unknown,
    of the wrong type or contradictory, and for an override that has no effect.
    """
    tree: dict[str, Any] = base.model_dump() if base is not None else {}
    lines: dict[tuple[str, ...], int] = {}
    path: Path | None = None
    if name is not None:
        path = locate_config(name)
        tree, lines = read_yaml(path)
        if Path(name).is_dir():
            tree = at_its_place(tree, Path(name))
    origins: dict[tuple[str, ...], dict[str, Any]] = {}
    for word in overrides:
        if word.startswith("+"):
            _lay_over(tree, locate_overlay(word), origins)
    for word in overrides:
        if word.startswith("+"):
            continue
        place, value = parse_override(word)
        if ".".join(place) in SECTIONS and value is None:
            raise ConfigError(f"{word!r} would reset a whole section", f"write {'.'.join(place)}.KEY=value")
        for leaf, single in leaves({".".join(place): value}):
            set_key(tree, leaf, single)
            origins[leaf] = {}
    for place, value in leaves(keys or {}):
        set_key(tree, place, value)
        origins[place] = {}
    _drop_empty_sections(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise explain(error, path, lines, origins) from error
    if config.arms and ("arm",) in origins:
        raise ConfigError(
            f"arm={config.arm} has no effect together with arms=[{', '.join(config.arms)}]",
            f"set arms=[{config.arm}], or add arms=[]",
            **origins[("arm",)],
        )
    for key, value in flat_keys(tree).items():
        # A source is refused when it is read: most verbs use the shards.
        if isinstance(value, str) and is_redacted(value) and key not in _SOURCES:
            raise ConfigError(
                f"{key}={value}: its password was not saved with the run", f"set {key}=… again", path=path
            )
    return config


def load_tree(name: str | None, overlays: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a config by path, run directory or ready-made name, with overlays (`+NAME`) applied.

    Raises like `load_config`, but only checks that the files exist and can be parsed.
    """
    tree = read_yaml(locate_config(name))[0] if name is not None else {}
    lay_over(tree, overlays)
    return tree


def lay_over(tree: dict[str, Any], overlays: Sequence[str]) -> None:
    """Apply overlays (`+NAME`) to the keys of a config; raises InputError for a missing one."""
    for word in overlays:
        _lay_over(tree, locate_overlay(word), {})
    _drop_empty_sections(tree)


def _lay_over(tree: dict[str, Any], path: Path, origins: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """Set every key of a file in the tree. Errors about one of these keys then name that file."""
    keys, lines = read_yaml(path)

    def visit(part: dict[str, Any], place: tuple[str, ...]) -> None:
        for key, value in part.items():
            here = (*place, key)
            if ".".join(here) not in SECTIONS or not isinstance(value, dict | None):
                set_key(tree, here, value)
                origins[here] = {"path": path, "line": lines[here]}
            elif value is not None:  # an empty section changes nothing
                visit(value, here)

    visit(keys, ())


def _drop_empty_sections(tree: dict[str, Any], model: type[BaseModel] = Config) -> None:
    """Remove null sections, so that they get their defaults.

    YAML reads a section whose keys are all commented out as null.
    """
    for name, info in model.model_fields.items():
        section = info.annotation
        if not isinstance(section, type) or not issubclass(section, BaseModel) or name not in tree:
            continue
        if tree[name] is None:
            del tree[name]
        elif isinstance(tree[name], dict):
            _drop_empty_sections(tree[name], section)


def dump_config(config: Config) -> str:
    """The resolved config as YAML, with the value of every key. Passwords in URLs are left out."""
    return yaml.safe_dump(redact_values(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=100)
