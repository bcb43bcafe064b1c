"""Ray's runtime environment of a job: read from the command line, and checked with Ray's own rules before it is sent.

`runtime_env=` takes what `ray job submit --runtime-env` takes; `pip=`, `conda=` and `image_uri=` are its commonest
keys. Ray applies them on each node: pip and conda create an environment there, image_uri starts a container.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pst_dist.config.overrides import parse_override
from pst_dist.errors import ConfigError, InputError, first_line
from pst_dist.text.redaction import has_secret

WORDS = ("runtime_env", "pip", "conda", "image_uri")
"""The options of the command line that this module reads."""
_BUILDS = ("pip", "uv", "conda", "image_uri", "container")
"""Keys that make the Python environment; Ray takes one of them."""


def read_runtime_env(asked: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment that these options ask for, in Ray's format; empty without them.

    `runtime_env` is a YAML or JSON file, or JSON itself; `pip` a requirements file, a list or one package; `conda` the
    name of an environment or its YAML file. Raises ConfigError and InputError.
    """
    found = _read(asked["runtime_env"]) if "runtime_env" in asked else {}
    for key in WORDS[1:]:
        if key not in asked:
            continue
        if key in found:
            raise ConfigError(f"{key}= is given twice, alone and in runtime_env", "leave one of them out")
        found[key] = _packages(asked[key]) if key == "pip" else asked[key]
    built = [key for key in _BUILDS if found.get(key)]
    if len(built) > 1:
        raise ConfigError(
            f"{' and '.join(built)} would each make the job's Python environment, and Ray takes one", "choose one"
        )
    for text in _strings(found):
        if has_secret(text):
            raise ConfigError(
                "runtime_env contains a password, which everyone who can open the dashboard could read",
                "put it into the nodes' environment, such as PIP_EXTRA_INDEX_URL",
            )
    return found


def _read(value: str) -> dict[str, Any]:
    if value.lstrip().startswith("{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"runtime_env is not valid JSON ({error})", "give a file, or quote the JSON") from None
    else:
        path = Path(value)
        if not path.is_file():
            raise InputError("no such file, but runtime_env= names it", path=path)
        import yaml

        try:
            found = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"is not valid YAML ({first_line(error, 200)})", "correct it", path=path) from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError("runtime_env is not a mapping of Ray's keys", "such as pip: [scipy]")
    return found


def _packages(value: str) -> object:
    """`requirements.txt` stays a path, which Ray reads; `[a, b]` is a list and anything else one package."""
    if value.endswith(".txt"):
        return value
    found = parse_override(f"pip={value}")[1] if value.startswith("[") else [value]
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise ConfigError(f"pip={value} is not a list of packages", "write pip=[one,two==1.0] or pip=requirements.txt")
    return found


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "env_vars":
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def check_runtime_env(found: Mapping[str, Any]) -> None:
    """Raises ConfigError for what Ray would refuse, or would ignore because it does not know the key."""
    from ray.runtime_env import RuntimeEnv

    # These two are set under a public and kept under a private name.
    known = {key for key in RuntimeEnv.known_fields if not key.startswith("_")} | {"nsight", "rocprof_sys"}
    unknown = sorted(set(found) - known)
    if unknown:
        raise ConfigError(f"runtime_env: Ray knows no {', '.join(unknown)}", f"choose from {', '.join(sorted(known))}")
    try:
        RuntimeEnv(**dict(found))
    except Exception as error:  # ValueError, TypeError, a missing file, a YAML error…
        raise ConfigError(
            f"runtime_env: Ray refuses it ({first_line(error, 300)})", "see Ray's documentation of runtime environments"
        ) from None
