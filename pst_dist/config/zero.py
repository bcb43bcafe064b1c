"""The ZeRO stage that `train.deepspeed` asks for: a profile of the package, or a DeepSpeed JSON of the user's."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from pst_dist.errors import ConfigError, InputError
from pst_dist.storage.foreign_json import foreign_object


def find_deepspeed_json(name: str) -> Path:
    """`zero2` or a path -> the file; raises InputError."""
    given = Path(name)
    if given.suffix == ".json":
        if os.path.lexists(given):  # opening it refuses anything but a regular file
            return given
        raise InputError("no such DeepSpeed config", path=given)
    package = Path(str(resources.files("pst_dist")))
    for folder in (package / "ds_configs", package.parent / "ds_configs"):
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    raise InputError(f"train.deepspeed: no profile {name!r}", "use zero0, zero1, zero2, zero3, zero3_offload or a path")


def zero_stage(deepspeed: str | None) -> int | None:
    """The stage of a profile or DeepSpeed JSON; None for the single-process engine."""
    if deepspeed is None:
        return None
    stage = zero_section(deepspeed).get("stage", 0)
    if not is_stage(stage):
        raise ConfigError(
            f"train.deepspeed: cannot read the ZeRO stage: it is {shown(stage)}", "use 0, 1, 2 or 3", path=deepspeed
        )
    return int(stage)


def zero_section(deepspeed: str | None) -> dict[str, Any]:
    """`zero_optimization` of a profile or DeepSpeed JSON; raises ConfigError when it cannot be read."""
    if deepspeed is None:
        return {}
    try:
        section = foreign_object(find_deepspeed_json(deepspeed)).get("zero_optimization", {})
    except InputError as error:
        raise ConfigError(f"train.deepspeed: cannot read the ZeRO stage: {error.what}", path=deepspeed) from error
    return section if isinstance(section, dict) else {}


def is_stage(value: Any) -> bool:
    """Whether a value is a ZeRO stage; neither True nor 2.0 is."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3


def shown(value: Any) -> str:
    """A value of the file for a message, not too long for one line."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**60 else "a number of many digits"
    return text if len(text) <= 80 else f"{text[:80]}..."
