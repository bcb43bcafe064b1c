"""DeepSpeed's settings: a JSON for memory and communication, completed from our config.

Our config owns batch size, clipping, precision and optimizer (`deepspeed_owned`). A key that DeepSpeed would silently
ignore or fail on later is refused by name before anything starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pst_dist.config.schema import TrainConfig
from pst_dist.config.zero import find_deepspeed_json, is_stage, shown
from pst_dist.errors import ConfigError, EnvironmentFault, first_line
from pst_dist.storage.foreign_json import foreign_object
from pst_dist.training.engines.deepspeed_owned import without_owned

MOST_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default size of the buffers in which gradients are collected before communication."""
_THEIRS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
}
_NOT_HERE = {
    "activation_checkpointing": "set student.gradient_checkpointing=true: transformers does not use DeepSpeed's",
    "checkpoint": "remove it: checkpoints are written by pst_dist",
    "compile": "remove it",
    "csv_monitor": "remove it and set train.report_to; metrics.jsonl has every value",
    "comet": "remove it and set train.report_to",
    "flops_profiler": "remove it; `pst plan` and metrics.jsonl have tokens per second",
    "tensorboard": "remove it and set train.report_to=tensorboard",
    "wandb": "remove it and set train.report_to=wandb",
}
"""Keys of DeepSpeed that have no effect under our trainer -> what to do instead."""


def import_deepspeed() -> Any:
    """DeepSpeed without the C++ extension that training never uses; raises EnvironmentFault when absent."""
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise EnvironmentFault("deepspeed is not installed", "pip install 'pst-dist[train]'") from error
    # On CPU the first start would build it with g++ for a minute, although only inference uses it. A kill during that
    # build leaves a lock file on which every later run hangs (pytorch#189245).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_settings(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """The JSON of a profile, completed from our config, with every "auto" resolved.

    Raises ConfigError, naming the keys, for those that disagree with our config and for those without effect here.
    """
    assert train.deepspeed is not None
    path = find_deepspeed_json(train.deepspeed)
    settings = foreign_object(path, kind=ConfigError, remedy='write {"zero_optimization": {"stage": 2}}')
    settings = without_owned(settings, train, world_size, path)
    for key in settings:
        if key in _NOT_HERE:
            if _is_off(settings[key]):
                continue
            raise ConfigError(f"{key!r} has no effect here", _NOT_HERE[key], path=path)
        if key not in _THEIRS:
            raise ConfigError(f"unknown key {shown(key)}, which DeepSpeed would silently ignore", path=path)
    _refuse_quoted_numbers(settings, "", path)
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"zero_optimization is {shown(zero)}", 'write {"stage": 2}', path=path)
    settings["zero_optimization"] = zero = _without_auto(zero)
    stage = zero.setdefault("stage", 0)
    if not is_stage(stage):
        raise ConfigError(f"zero_optimization.stage is {shown(stage)}", "use 0, 1, 2 or 3", path=path)
    _check_zero(zero, stage, path)
    settings = {key: value for key, value in settings.items() if key not in _NOT_HERE}
    micro = train.per_device_train_batch_size
    return settings | {
        "train_micro_batch_size_per_gpu": micro,
        # The trainer controls accumulation, so a step may have any number of micro-batches.
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro * world_size,
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **_precision(train, stage),
    }


def _is_off(section: Any) -> bool:
    """Whether a section is switched off, as the sections of DeepSpeed's own examples often are."""
    return section is False or section == {} or (isinstance(section, dict) and section.get("enabled") is False)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """The section without its "auto" values, for which DeepSpeed uses its defaults."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def _refuse_quoted_numbers(section: dict[str, Any], prefix: str, path: Path) -> None:
    """Refuse a quoted number or boolean: DeepSpeed accepts some of them and fails on others much later."""
    for key, value in section.items():
        if isinstance(value, dict):
            _refuse_quoted_numbers(value, f"{prefix}{key}.", path)
        elif isinstance(value, str) and key != "nvme_path":
            try:
                read = json.loads(value.lower())
            except (ValueError, RecursionError):
                continue
            raise ConfigError(
                f"{prefix}{key[:80]} is the string {shown(value)}", f"write {json.dumps(read)[:80]}", path=path
            )


def _check_zero(zero: dict[str, Any], stage: int, path: Path) -> None:
    """Refuse what DeepSpeed's own schema refuses, and offloading that it accepts but cannot do."""
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(key)
        if offload is None:
            continue
        if not isinstance(offload, dict):
            raise ConfigError(f"zero_optimization.{key} is {shown(offload)}", 'write {"device": "cpu"}', path=path)
        device = offload.get("device", "none")
        if device == "none":
            continue
        if stage < least:
            raise ConfigError(
                f"zero_optimization.{key} has nothing to offload at stage {stage}",
                f"use stage {least} or higher, or remove it",
                path=path,
            )
        if device == "nvme" and not offload.get("nvme_path"):
            raise ConfigError(
                f"zero_optimization.{key}.device is nvme without an nvme_path", "name a folder on that disk", path=path
            )
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ConfigError(
            f"{name[:160]}: {first['msg'].lower()[:160]}", "see DeepSpeed's list of ZeRO keys", path=path
        ) from error
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:  # its own validators
        raise ConfigError(
            f"zero_optimization: {first_line(error, 160)}", "see DeepSpeed's list of ZeRO keys", path=path
        ) from error


def _precision(train: TrainConfig, stage: int) -> dict[str, Any]:
    if train.bf16 is not True:
        return {}
    if stage == 0:
        # DeepSpeed's bf16 without ZeRO runs a dummy AdamW step at the start, so its optimizer would differ from ours.
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    return {"bf16": {"enabled": True}}
