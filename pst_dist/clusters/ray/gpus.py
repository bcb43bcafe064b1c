"""The CPUs and GPUs that a worker uses, and how many workers fit on a cluster.

On a cluster with GPUs, a worker uses one unless the config says otherwise: Ray hides the GPUs from a worker that asks
for none, so it would silently work on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pst_dist.config.schema import RayConfig, RayTrainConfig
from pst_dist.errors import EnvironmentFault


def gpus_each(asked: float | None, resources: Mapping[str, float]) -> float:
    """GPUs for one worker: those asked for, else 1 where the cluster has any.

    DS_ACCELERATOR=cpu, with which training leaves the GPUs alone under every launcher, counts as asking for none.
    """
    if asked is not None:
        return asked
    return 1 if resources.get("GPU", 0) >= 1 and os.environ.get("DS_ACCELERATOR") != "cpu" else 0


def settled_actors(config: RayConfig, resources: Mapping[str, float], *, device: str | None = None) -> RayConfig:
    """The config with its GPUs per actor decided; none for actors that are told to use another `device`."""
    elsewhere = device is not None and not device.startswith("cuda")
    gpus = 0.0 if elsewhere and config.num_gpus_per_actor is None else gpus_each(config.num_gpus_per_actor, resources)
    return config.model_copy(update={"num_gpus_per_actor": gpus})


def settled_workers(config: RayTrainConfig, resources: Mapping[str, float]) -> RayTrainConfig:
    """The config with its GPUs per worker decided."""
    return config.model_copy(update={"num_gpus_per_worker": int(gpus_each(config.num_gpus_per_worker, resources))})


def room_for(config: RayConfig, resources: Mapping[str, float], what: str, key: str) -> int:
    """How many actors a cluster has room for, at least one; the config must be settled.

    `what` is such an actor in a message, `key` the section of its settings. Raises EnvironmentFault when none fits.
    """
    wanted = {"CPU": config.num_cpus_per_actor, "GPU": config.num_gpus_per_actor or 0}
    room = min(int(resources.get(name, 0) / amount) for name, amount in wanted.items() if amount > 0)
    if room == 0:
        has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)
        needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        raise EnvironmentFault(
            f"{what} needs {needs}, the cluster has {has}", f"lower {key}.num_cpus_per_actor or num_gpus_per_actor"
        )
    return room
