"""Turn YAML text and `key.sub=value` overrides into a validated `Config`, and a `Config` into YAML.

Every error names the file and line, or the override, that caused it.
"""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pst_dist.arms import ARMS
from pst_dist.config.moved import at_its_place
from pst_dist.config.overrides import parse_override, set_key
from pst_dist.config.schema import Config
from pst_dist.config.schema_data import RowSource
from pst_dist.config.yaml_text import read_yaml
from pst_dist.errors import ConfigError, InputError
from pst_dist.storage.regular_files import open_regular
from pst_dist.text.redaction import is_redacted, redact_values
from pst_dist.text.urls import is_whole_url

RESOLVED = "config.resolved.yaml"
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_OTHER_TABLES = (".xlsx", ".xls", ".ods", ".txt", ".arrow", ".feather", ".pkl", ".pickle", ".orc", ".avro", ".xml")
"""Rows in forms that are not read: the reader says which are."""


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the config, sections before their fields."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


_SECTIONS = {name.rpartition(".")[0] for name in known_keys() if "." in name}
"""Keys that contain other keys. A mapping elsewhere, such as data.columns, is a single value."""


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested sections."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        place = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and place in _SECTIONS
        flat |= flat_keys(value, f"{place}.") if nested else {place: value}
    return flat


def ready_made_configs(folder_name: str = "") -> list[str]:
    """Names of the ready-made configs in the package (one per task, and the demo), or of those in a subfolder."""
    folder = resources.files("pst_dist") / "config" / "presets" / folder_name
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def overlays() -> dict[str, str]:
    """Name -> one-line help of the overlays in the package. `+NAME` applies one to any config."""
    found = {}
    for name in ready_made_configs("overlays"):
        file = resources.files("pst_dist") / "config" / "presets" / "overlays" / f"{name}.yaml"
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        found[name] = first.removeprefix("# ").rstrip(".")
    return found


def locate_overlay(word: str) -> Path:
    """The file of a ready-made overlay `+NAME` or of `+path/to/keys.yaml`; raises InputError."""
    name = word.removeprefix("+")
    check_name(name)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    names = list(overlays())
    if name in names:
        return Path(str(resources.files("pst_dist") / "config" / "presets" / "overlays" / f"{name}.yaml"))
    near = difflib.get_close_matches(name, names, n=1)
    raise InputError(
        "no such overlay", f"did you mean +{near[0]}?" if near else f"available: +{', +'.join(names)}", path=word
    )


_SOURCES = tuple(f"data.{key}" for key in ("root", "train", "validation", "test", "split_file", "teacher_completions"))


def is_rows(name: str) -> bool:
    """Whether a name refers to rows: a data file, compressed or not, a glob, a save_to_disk folder, the URL of one of
    these, `hf:…`, `gen:…`."""
    path = Path(name)
    if _is_setting(name):
        return False
    if is_whole_url(name):
        return path.suffix.lower() not in (".yaml", ".yml")
    if path.is_dir():
        return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if path.suffix.lower() in (".gz", ".zst", ".zstd"):
        path = Path(path.stem)
    pattern = glob.has_magic(name) and path.suffix.lower() not in (".yaml", ".yml") and not os.path.lexists(name)
    return name.startswith(("hf:", "gen:")) or path.suffix.lower() in (*DATA_SUFFIXES, *_OTHER_TABLES) or pattern


def _is_setting(name: str) -> bool:
    """Whether a name is a setting such as `data.train=rows.jsonl`, and no file."""
    return re.match(r"[a-z_]+(\.[a-z_]+)*=", name) is not None and not os.path.lexists(name)


def check_name(name: str) -> None:
    """Raises InputError for a name that the file system cannot even look up, such as one that is too long."""
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return  # refused when it is opened
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot be looked up: {reason}", "name a file that you can read", path=name[:200]) from error


def locate_config(name: str) -> Path:
    """The config file for a YAML path, a run directory or the name of a ready-made config; raises InputError."""
    check_name(name)
    path = Path(name)
    if path.is_dir() and not is_rows(name):
        resolved = path / RESOLVED
        if not resolved.is_file():
            remedy = "use a config file, or a directory made by `pst run`"
            endings = sorted({file.suffix for file in path.iterdir() if file.suffix.lower() in DATA_SUFFIXES})
            if endings:
                remedy = f"to read the files in it as rows use '{path}/*{endings[0]}'"
            raise InputError(f"no {RESOLVED} here", remedy, path=path)
        return resolved
    if _is_setting(name):
        raise InputError(f"{name!r} is a setting, not a config", "name the config first: pst VERB my.yaml KEY=VALUE")
    if is_rows(name):
        raise InputError(
            "these are rows, not a config",
            f"`pst check {name} --write my.yaml` makes a config from them",
            path=name,
        )
    if os.path.lexists(path):
        open_regular(path, remedy="name a YAML file or a run directory").close()
        return path
    if name in ready_made_configs():
        return Path(str(resources.files("pst_dist") / "config" / "presets" / f"{name}.yaml"))
    if path.name in ARMS and path.parent.is_dir():
        raise InputError("no trained student here", "run `pst train` first", path=path)
    near = [f"{name}{suffix}" for suffix in (".yaml", ".yml") if Path(f"{name}{suffix}").is_file()]
    near += difflib.get_close_matches(name, ready_made_configs(), n=1)
    hint = f"did you mean {near[0]}?" if near else "ready-made configs: " + ", ".join(ready_made_configs())
    raise InputError("no such config file, run directory or ready-made config", hint, path=name)


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
        if ".".join(place) in _SECTIONS and value is None:
            raise ConfigError(f"{word!r} would reset a whole section", f"write {'.'.join(place)}.KEY=value")
        for leaf, single in _leaves({".".join(place): value}):
            set_key(tree, leaf, single)
            origins[leaf] = {}
    for place, value in _leaves(keys or {}):
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


def _leaves(tree: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of nested sections. A mapping that is a single value, such as data.columns, is not split."""
    for key, value in tree.items():
        here = (*place, *key.split("."))
        if isinstance(value, Mapping) and ".".join(here) in _SECTIONS:
            yield from _leaves(value, here)
        else:
            yield here, value


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
            if ".".join(here) not in _SECTIONS or not isinstance(value, dict | None):
                set_key(tree, here, value)
                origins[here] = {"path": path, "line": lines[here]}
            elif value is not None:  # an empty section changes nothing
                visit(value, here)

    visit(keys, ())


def _drop_empty_sections(tree: dict[str, Any], model: type[BaseModel] = Config) -> None:
    """Remove null sections. YAML reads a section whose keys are all commented out as null; it means its defaults."""
    for name, info in model.model_fields.items():
        section = info.annotation
        if not isinstance(section, type) or not issubclass(section, BaseModel) or name not in tree:
            continue
        if tree[name] is None:
            del tree[name]
        elif isinstance(tree[name], dict):
            _drop_empty_sections(tree[name], section)


def explain(
    error: ValidationError,
    path: Path | None,
    lines: dict[tuple[str, ...], int],
    origins: dict[tuple[str, ...], dict[str, Any]],
    *,
    keys: set[str] | None = None,
) -> ConfigError:
    """Turn pydantic's first error into one line in our words, with its location; `keys` are the model's known keys.

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
    inside = known and ".".join(known) not in _SECTIONS
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
"""What other programs call our keys."""


def _remedy_for_unknown(location: tuple[str, ...], keys: set[str]) -> str:
    """A hint with the known key that is closest to a mistyped one, by its whole path or by its last part."""
    dotted = ".".join(location)
    if dotted in keys:  # command-line syntax used in a file
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


def dump_config(config: Config) -> str:
    """The resolved config as YAML, with the value of every key. Passwords in URLs are left out."""
    return yaml.safe_dump(redact_values(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=100)
