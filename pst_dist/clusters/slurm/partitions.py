"""The partitions of a Slurm cluster, and whether one can ever run a job.

Slurm accepts a job that can never start and lets it wait forever.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pst_dist.clusters.slurm.commands import ask, unreadable, whole
from pst_dist.clusters.slurm.script import SlurmRequest
from pst_dist.errors import ConfigError


@dataclass(frozen=True)
class Partition:
    """One partition as `sinfo` reports it."""

    name: str
    default: bool
    up: bool
    nodes: int
    gpus: int
    """Most GPUs on any of its nodes."""
    most_seconds: float | None = None
    """Its time limit; None without one."""
    usual_seconds: float | None = None
    """The time limit of a job that gives none; None without one."""


def check_room(request: SlurmRequest, partitions: Sequence[Partition]) -> Partition:
    """The partition of the training; raises ConfigError when it can never run it: Slurm would let it wait forever."""
    names = ", ".join(partition.name for partition in partitions)
    wanted = request.options.get("partition")
    if wanted is None:
        found = next((partition for partition in partitions if partition.default), None)
        if found is None:
            raise ConfigError("this cluster has no default partition", f"give partition=, one of {names}")
    else:
        # Of several partitions Slurm uses the first that is free; one that fits is enough.
        choice = [partition for partition in partitions if partition.name in wanted.split(",")]
        if not choice:
            raise ConfigError(f"there is no partition {wanted!r}", f"give partition=, one of {names}")
        found = max(choice, key=lambda partition: (partition.gpus >= request.gpu_count, partition.nodes))
    if not found.up:
        raise ConfigError(f"partition {found.name} is down", f"choose from {names}")
    if request.nodes > found.nodes:
        raise ConfigError(
            f"nodes={request.nodes}, but partition {found.name} has {found.nodes}",
            f"ask for at most {found.nodes}, or another partition of {names}",
        )
    if request.gpu_count > found.gpus:
        has = f"at most {found.gpus} per node" if found.gpus else "none"
        raise ConfigError(
            f"gpus={request.gpus}, but partition {found.name} has {has}",
            "leave gpus= out for CPU ranks (ranks=2), or give another partition" if not found.gpus else "ask for fewer",
        )
    if request.cpu_partition and not any(one.name == request.cpu_partition and one.up for one in partitions):
        raise ConfigError(f"there is no partition {request.cpu_partition!r} that is up", f"choose from {names}")
    return found


def partitions() -> list[Partition]:
    """All partitions; raises EnvironmentFault when sinfo fails or its answer cannot be read."""
    return read_partitions(ask("sinfo", "--noheader", "--format=%R|%P|%a|%D|%l|%L|%G"))


def read_partitions(text: str) -> list[Partition]:
    """The partitions in sinfo's answer, the rows of one added up: there is a row for each kind of node."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        if line.count("|") < 6:
            raise unreadable("sinfo", line)
        name, starred, state, nodes, most, usual, gres = line.split("|", 6)
        before = found.get(name)
        found[name] = Partition(
            name,
            starred.endswith("*"),
            state == "up",
            whole(nodes, "sinfo") + (before.nodes if before else 0),
            max(gpus_of(gres), before.gpus if before else 0),
            seconds_of(most),
            seconds_of(usual) or seconds_of(most),
        )
    return list(found.values())


def gpus_of(gres: str) -> int:
    """Number of GPUs in a node's generic resources: `gpu:a100:8(S:0-1),gpu:h100:4,nvme:1` -> 12."""
    total = 0
    for entry in gres.split(","):  # cut inside (IDX:0,2) too, whose parts are no gpu
        kind, *parts = entry.partition("(")[0].strip().split(":")
        if kind == "gpu" and parts and parts[-1].isdecimal():
            total += whole(parts[-1], "sinfo")
    return total


def seconds_of(limit: str) -> float | None:
    """A time limit of Slurm in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds.

    None for no limit, and for anything that is not a limit, such as sinfo's `n/a`.
    """
    days, dash, rest = limit.partition("-")
    parts = (rest if dash else days).split(":")
    if not re.fullmatch(r"[0-9]{1,9}(-[0-9]{1,9})?(:[0-9]{1,9}){0,2}", limit) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:  # days-hours, days-hours:minutes, days-hours:minutes:seconds
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return int(days) * 86400.0 + hours * 3600 + minutes * 60 + seconds
    if len(numbers) == 1:
        return numbers[0] * 60.0
    hours, minutes, seconds = (0, *numbers)[-3:]
    return hours * 3600.0 + minutes * 60 + seconds
