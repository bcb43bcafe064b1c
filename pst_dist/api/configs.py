"""Configs from Python values: YAML or a name, overrides, keywords, and rows given as objects.

Rows given as objects become a file that the config names; `checked` writes nothing, so that a caller can first refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.api.faults import our_errors
from pst_dist.config import loading
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import SPLITS
from pst_dist.errors import ConfigError

if TYPE_CHECKING:
    from pst_dist.data.sources.in_memory import RowsFile

Source = Config | str | Path | None
"""A config, the path of a YAML file or run directory, the name of a ready-made config, or None for the defaults."""


def load_config(source: Source = None, *overrides: str, **keys: Any) -> Config:
    """A checked config: `source`, then `overrides`, then `keys`, each taking precedence over the previous ones.

    `overrides` are words as on the command line, "train.learning_rate=1e-3" or "+paper_t5". `keys` are Python values:
    sections as dicts (`train={"max_steps": 100}`) and plain settings (`seed=1`).

    `data={"train": rows, "test": rows}` also accepts the rows themselves: a list of dicts, a pandas frame or a
    `datasets.Dataset`. They are written once, as JSON Lines, to `rows/` in the run's data directory, and the config
    names that file, so the command line can resume the run, and an error in row 7 names line 7.

    Raises InputError when the config does not exist, ConfigError naming the key for a setting that is unknown, of the
    wrong type or contradictory, and DataError naming the row for rows that cannot be written.
    """
    with our_errors():
        config, files = checked(source, overrides, keys)
        write_rows(config, files)
    return config


def checked(source: Source, overrides: Sequence[str], keys: Mapping[str, Any]) -> tuple[Config, list[RowsFile]]:
    """The config, and the rows that must be written for it; writes nothing itself."""
    if not (source is None or isinstance(source, Config | str | Path)):
        raise ConfigError(
            f"expected the path or name of a config, or a Config, got {type(source).__name__}",
            'pass settings as keywords: load_config(train={"max_steps": 100})',
        )
    for word in overrides:
        if not isinstance(word, str):
            raise ConfigError(f"{word!r} is not key.sub=value", "pass Python values as keywords: seed=1")
    tree, files = _without_rows(tree_of(keys))
    base = source if isinstance(source, Config) else None
    name = str(source) if isinstance(source, str | Path) else None
    config = loading.load_config(name, overrides, keys=tree, base=base)
    if files:
        paths = {file.split: str(_path_of(file, config)) for file in files}
        config = config.model_copy(update={"data": config.data.model_copy(update=paths)})
    return config, files


def tree_of(keys: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested keywords as plain dicts of settings; paths become strings, and keys must be strings."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} in {place or 'the settings'} is not a string", "use a string")
        here = f"{place}.{key}" if place else key
        if isinstance(value, Mapping) and here not in _ROWS:
            value = tree_of(value, here)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        tree[key] = value
    return tree


_ROWS = tuple(f"data.{split}" for split in SPLITS)


def _without_rows(tree: dict[str, Any]) -> tuple[dict[str, Any], list[RowsFile]]:
    """The settings with a placeholder for rows given as Python objects, and those rows."""
    from pst_dist.data.sources.in_memory import is_in_memory, rows_file

    files = []
    section = tree.get("data") if isinstance(tree.get("data"), dict) else {}
    places = [(section, split, split) for split in SPLITS] + [(tree, key, key.removeprefix("data.")) for key in _ROWS]
    for holder, key, split in places:
        if key not in holder:
            continue
        if is_in_memory(holder[key]):
            files.append(rows_file(holder[key], split))
            holder[key] = f"{split}.jsonl"
        elif isinstance(holder[key], list):
            holder[key] = [str(word) for word in holder[key]]
    for name in ("data", *SPLITS):
        if name in tree and is_in_memory(tree[name]) and not isinstance(tree[name], dict | int | float):
            split = "train" if name == "data" else name
            raise ConfigError(f"{name} is {type(tree[name]).__name__}", f'pass rows as data={{"{split}": rows}}')
    return tree, files


def _path_of(file: RowsFile, config: Config) -> Path:
    """The path of a rows file as written in the config; absolute if data.root is set, else relative paths would be
    resolved against it.
    """
    path = file.path_in(run_dir(config).data)
    return path.absolute() if config.data.root or str(path).startswith("~") else path


def write_rows(config: Config, files: Iterable[RowsFile]) -> None:
    """Write rows given as objects to the files that the config names; raises DataError naming a row that cannot be."""
    for file in files:
        file.write(run_dir(config).data)
