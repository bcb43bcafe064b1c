"""Keys of a DeepSpeed JSON that our config owns: accepted where they are "auto" or agree, else refused all together.

The JSON files in transformers' documentation name batch sizes, precision, optimizer and schedule, mostly as "auto".
Such a file works here unchanged: the values come from our config, as they come from transformers' arguments there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pst_dist.config.schema import TrainConfig
from pst_dist.errors import ConfigError

AUTO = "auto"
_ADAM = {"adam", "adamw"}
_ADAM_PARAMS = {
    "lr": "learning_rate",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
_ADAM_VARIANTS = {"torch_adam", "adam_w_mode", "fused"}
"""How DeepSpeed's optimizer computes AdamW; ours is PyTorch's, so they change nothing."""
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_*",
    "scheduler": "train.lr_scheduler_type",
    "bf16": "train.bf16",
    "fp16": "train.bf16",
    "torch_autocast": "train.bf16",
    "steps_per_print": "train.logging_steps",
}
"""Key of the JSON -> the setting of our config that decides instead."""


def without_owned(settings: dict[str, Any], train: TrainConfig, world_size: int, path: Path) -> dict[str, Any]:
    """The JSON without the keys that our config owns.

    Raises ConfigError that names every one of them whose value is neither "auto" nor that of our config.
    """
    found = [line for key in OWNED if key in settings for line in _disagreements(key, settings[key], train, world_size)]
    if found:
        setting = ", ".join(dict.fromkeys(OWNED[line.split(".")[0].split(" ")[0]] for line in found))
        raise ConfigError(
            f"disagrees with the run's config: {'; '.join(found)}",
            f'write "auto" there, or set {setting}',
            path=path,
        )
    return {key: value for key, value in settings.items() if key not in OWNED}


def _disagreements(key: str, value: Any, train: TrainConfig, world_size: int) -> Iterator[str]:
    if value == AUTO or key == "steps_per_print":  # the latter only says when DeepSpeed prints, which it does not here
        return
    if key in ("optimizer", "scheduler"):
        yield from (_of_optimizer if key == "optimizer" else _of_scheduler)(value, train)
    elif key in ("bf16", "fp16", "torch_autocast"):
        yield from _of_precision(key, value, train)
    else:
        ours = _sizes(train, world_size)[key]
        if not _same(value, ours):
            yield f"{key} is {_shown(value)}, the config has {_shown(ours)}"


def _sizes(train: TrainConfig, world_size: int) -> dict[str, Any]:
    micro, batch = train.per_device_train_batch_size, train.global_batch_size
    passes = train.gradient_accumulation_steps or math.ceil((batch or micro) / (micro * world_size))
    return {
        "train_batch_size": batch or micro * passes * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": train.max_grad_norm,
    }


def _of_optimizer(value: Any, train: TrainConfig) -> Iterator[str]:
    kind = str(value.get("type")).lower() if isinstance(value, dict) else _shown(value)
    if kind not in _ADAM:
        yield f"optimizer is {_shown(kind)}, the config has AdamW"
        return
    params = value.get("params", {})
    if not isinstance(params, dict):
        yield f"optimizer.params is {_shown(params)}"
        return
    for name, given in params.items():
        if given == AUTO or name in _ADAM_VARIANTS:
            continue
        ours: Any = [train.adam_beta1, train.adam_beta2] if name == "betas" else None
        ours = getattr(train, _ADAM_PARAMS[name]) if name in _ADAM_PARAMS else ours
        if ours is None:
            yield f"optimizer.params.{name} is unknown"
        elif not _same(given, ours):
            yield f"optimizer.params.{name} is {_shown(given)}, the config has {_shown(ours)}"


def _of_scheduler(value: Any, train: TrainConfig) -> Iterator[str]:
    """A schedule of "auto" values stands for the config's; DeepSpeed's own schedules with numbers are others."""
    params = value.get("params", {}) if isinstance(value, dict) else None
    if not isinstance(params, dict) or any(given != AUTO for given in params.values()):
        yield f"scheduler is {_shown(value)}, the config has {train.lr_scheduler_type}"


def _of_precision(key: str, value: Any, train: TrainConfig) -> Iterator[str]:
    enabled = value.get("enabled", False) if isinstance(value, dict) else value
    if enabled == AUTO or (key == "bf16" and train.bf16 == AUTO):
        return
    ours = train.bf16 if key != "fp16" else False
    if enabled is not ours and not (key == "torch_autocast" and enabled is False):
        yield f"{key}.enabled is {_shown(enabled)}, the config has {_shown(ours)}"


def _same(given: Any, ours: Any) -> bool:
    """Equal numbers, or lists of equal numbers; a boolean is no number."""
    if isinstance(given, list) and isinstance(ours, list):
        return len(given) == len(ours) and all(map(_same, given, ours))
    is_number: Callable[[Any], bool] = lambda one: isinstance(one, int | float) and not isinstance(one, bool)  # noqa: E731
    return is_number(given) and is_number(ours) and float(given) == float(ours)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
