"""Finds the file of a config by path, run directory or ready-made name, and the file of an overlay.

It also recognises rows and settings that are given in place of a config, so that the message says what to do.
"""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
from importlib import resources
from pathlib import Path

from pst_dist.arms import ARMS
from pst_dist.errors import InputError
from pst_dist.storage.regular_files import open_regular
from pst_dist.text.urls import is_whole_url

RESOLVED = "config.resolved.yaml"
"""The file of a run directory with its whole config."""
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_OTHER_TABLES = (".xlsx", ".xls", ".ods", ".txt", ".arrow", ".feather", ".pkl", ".pickle", ".orc", ".avro", ".xml")
"""Rows in formats that cannot be read; the reader names those that can."""


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


def is_rows(name: str) -> bool:
    """Whether a name refers to rows: a data file (also compressed), a glob, a save_to_disk folder, a URL, `hf:…` or
    `gen:…`."""
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
    """Whether a name is a setting such as `data.train=rows.jsonl` and not a file."""
    return re.match(r"[a-z_]+(\.[a-z_]+)*=", name) is not None and not os.path.lexists(name)


def check_name(name: str) -> None:
    """Raise InputError for a name that the file system refuses to look up, such as one that is too long."""
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
