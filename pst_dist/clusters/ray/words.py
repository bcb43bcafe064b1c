"""The command line of `pst submit ray`: separates the job's options from the keys of the config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.clusters.plain import plain
from pst_dist.clusters.ray.dashboard import dashboard_address
from pst_dist.clusters.ray.runtime_env import WORDS, read_runtime_env
from pst_dist.config.explain import refuse_misspelt
from pst_dist.errors import ConfigError

_OWN = ("address", "verb", "dir", "exclude", "name", "cpus", "gpus", *WORDS)


@dataclass(frozen=True, kw_only=True)
class RayRequest:
    """What a job asks for; every option comes from the command line."""

    address: str
    """`http://host:8265` of the dashboard, `auto` for the cluster on this machine, or `ray://host:10001`."""
    verb: str = "run"
    """`run` for the whole pipeline; `embed`, `train` or `evaluate` for that stage alone."""
    folder: Path = field(default_factory=Path.cwd)
    """The directory that the job gets a copy of."""
    exclude: tuple[str, ...] = ()
    """More patterns of files that are not sent."""
    name: str | None = None
    """The job's id; generated when not given."""
    cpus: float = 0.0
    gpus: float = 0.0
    """Reserved for the job's driver, which shards, scores and exports; embedding and training reserve their own."""
    environment: dict[str, str] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    """The rest of Ray's runtime environment, such as pip; without working_dir, excludes and env_vars."""


def read_words(words: Sequence[str]) -> tuple[RayRequest, list[str]]:
    """Split `address=… verb=train env.NAME=… train.bf16=true` into the request and the config's overrides."""
    asked: dict[str, str] = {}
    environment, rest = {}, []
    for word in words:
        key, _, value = word.partition("=")
        if key in _OWN or key.startswith("env."):
            plain(value, key if key in _OWN else "a variable of the job's environment")
        if key in _OWN:
            asked[key] = value
        elif key.startswith("env."):
            variable = key.removeprefix("env.")
            if not re.fullmatch(r"[A-Za-z_]\w*", variable):
                raise ConfigError(f"{key!r} is not a valid environment variable", "write env.NAME=value")
            environment[variable] = value
        elif key == "on":
            raise ConfigError(f"{word}: a job of `pst submit ray` already runs on Ray", "leave it out")
        else:
            rest.append(word)
    refuse_misspelt(rest, _OWN)
    verb = asked.get("verb", "run")
    if verb not in ("run", "embed", "train", "evaluate"):
        raise ConfigError(f"verb={verb} is not a stage that runs on Ray", "use run, embed, train or evaluate")
    own = read_runtime_env(asked)
    folder = _folder(asked, own.pop("working_dir", None))
    excludes, variables = own.pop("excludes", []), own.pop("env_vars", {})
    if not isinstance(excludes, list) or not isinstance(variables, dict):
        raise ConfigError("runtime_env: excludes is not a list, or env_vars no mapping", "see Ray's documentation")
    name = asked.get("name")
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"name={name} is not a valid job name", "use letters, digits, dots, dashes and underscores")
    return (
        RayRequest(
            address=dashboard_address(asked.get("address")),
            verb=verb,
            folder=folder,
            exclude=(*_patterns(asked.get("exclude")), *map(str, excludes)),
            name=name,
            cpus=_amount(asked, "cpus"),
            gpus=_amount(asked, "gpus"),
            environment={**variables, **environment},
            runtime_env=own,
        ),
        rest,
    )


def _folder(asked: dict[str, str], working_dir: object) -> Path:
    """The directory that the job gets a copy of: dir=, working_dir of the runtime environment, or the current one."""
    if working_dir is not None and "dir" in asked:
        raise ConfigError("dir= and the runtime environment's working_dir name a directory each", "leave one out")
    where = asked.get("dir", "." if working_dir is None else working_dir)
    key = "dir" if working_dir is None else "working_dir"
    if not isinstance(where, str) or not (folder := Path(where).resolve()).is_dir():
        raise ConfigError(
            f"{key}={where} is not a directory",
            "give the directory that contains the config; archives and URLs are not supported, because the config is "
            "read here first"
            if key == "working_dir"
            else "give the directory that contains the config",
        )
    return folder


def _patterns(text: str | None) -> tuple[str, ...]:
    # Not parsed as YAML, where *.bin is an alias.
    return tuple(part.strip() for part in (text or "").strip("[]").split(",") if part.strip())


def _amount(asked: dict[str, str], key: str) -> float:
    text = asked.get(key, "0")
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ConfigError(f"{key}={text} is not a number", f"write for example {key}=1")
    return float(text)
