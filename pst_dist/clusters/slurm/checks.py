"""Finds, before submission, what would end a Slurm job minutes or hours later: ranks, time limit, torch's build.

`pst doctor` finds the rest (packages, the DeepSpeed JSON, student, encoder); `clusters.slurm.submit` says which of its
checks are valid for the nodes too.
"""

from __future__ import annotations

import importlib.metadata

from pst_dist.clusters.slurm.partitions import Partition, seconds_of
from pst_dist.clusters.slurm.script import SlurmRequest
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, EnvironmentFault

_START_SECONDS = 60
"""What a job needs at least before it can save: to start Python, torch and the ranks, and to load the rows."""


def check_ranks(config: Config, request: SlurmRequest) -> None:
    """Raises ConfigError when the ranks could not train together: no DeepSpeed, or a profile that does not fit them."""
    ranks = config.train.ray.num_workers if config.train.backend == "ray" else request.world_size
    if config.train.deepspeed is None:
        if ranks > 1:
            raise ConfigError(
                f"{ranks} ranks (nodes={request.nodes}) need train.deepspeed, and it is not set",
                "write train.deepspeed=zero2, or ask for one rank",
            )
        return
    from pst_dist.training.engines.deepspeed_config import deepspeed_settings

    deepspeed_settings(config.train, ranks)


def check_time(request: SlurmRequest, partition: Partition | None) -> None:
    """Raises ConfigError for a time limit that the partition does not allow, or that only starting and saving fill.

    Without a partition only the limit that was asked for is looked at.
    """
    asked = request.options.get("time")
    limit, whose = seconds_of(asked) if asked else None, f"time={asked}"
    if partition is not None:
        most = partition.most_seconds
        if limit is not None and most is not None and limit > most:
            raise ConfigError(
                f"{whose}, but partition {partition.name} allows at most {_minutes(most)}: the job would wait forever",
                "ask for less, or another partition",
            )
        if asked is None:
            limit, whose = partition.usual_seconds, f"the time limit of partition {partition.name}"
    if limit is not None and limit < request.warn_seconds + _START_SECONDS:
        raise ConfigError(
            f"{whose} is {_minutes(limit)}, but the signal to save comes {request.warn_seconds} s before the end "
            f"(warn=) and starting takes about {_START_SECONDS} s: nothing would be trained",
            "give a longer time=, or a smaller warn=",
        )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} min"


def check_torch(request: SlurmRequest) -> None:
    """Raises EnvironmentFault when the jobs get GPUs that this Python, which they will run, cannot use."""
    if not request.gpus:
        return
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return  # said by doctor
    if version.endswith("+cpu"):
        raise EnvironmentFault(
            f"gpus={request.gpus}, but torch {version} of this Python, which the jobs run, is a CPU build",
            "install torch's CUDA build, or leave gpus= out",
        )
