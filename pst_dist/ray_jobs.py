"""Embedding on a Ray cluster: encoder actors over a list of shards. The cluster itself is `ray_cluster`.

One shard, one task, one file: Ray places the actors, restarts one that dies and gives it its shard again; what a
shard's file holds is decided by `embeddings.embed_shard`, here as in one process. Actors read and write the folders
named by the config, so on several machines those must be shared.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from pst_dist.config import EmbedConfig, RayConfig
from pst_dist.embeddings import embed_shard
from pst_dist.encoder import TextEncoder
from pst_dist.errors import EnvironmentFault, PeerLostError, PstError
from pst_dist.progress import Progress, progress
from pst_dist.ray_cluster import ray_cluster
from pst_dist.shards import ShardInfo, ShardSet

log = logging.getLogger(__name__)

_RESTARTS = 4
_QUIET_SECONDS = 300.0
"""How long nothing may be heard: before the first actor has started it is an error, later a warning."""


class EncoderActor:
    """One encoder in a process of its own; its state is the loaded model, so Ray may restart it anywhere."""

    def __init__(self, config: EmbedConfig, shards_directory: str, directory: str) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.ray.num_cpus_per_actor)))
        self._config = config
        self._shards_directory, self._directory = Path(shards_directory), Path(directory)
        self._loaded: TextEncoder | None = None

    def ready(self) -> int:
        """0 texts done: returns once the encoder is loaded (not in `__init__`, whose errors Ray turns into text)."""
        if self._loaded is None:
            # Whether a process without a GPU of its own sees the machine's hangs on Ray's version and environment.
            on_cpu = self._config.device is None and self._config.ray.num_gpus_per_actor == 0
            self._loaded = TextEncoder(self._config, device="cpu" if on_cpu else None)
        return 0

    def embed(self, shard: ShardInfo) -> int:
        """Write one shard's file; returns the number of its texts. A restarted actor loads its encoder here."""
        self.ready()
        assert self._loaded is not None
        return embed_shard(self._loaded, self._shards_directory, shard, self._directory / f"{shard.stem}.safetensors")


def embed_with_ray(config: EmbedConfig, shards: ShardSet, directory: Path, todo: list[ShardInfo]) -> None:
    """Write the embedding file of every shard in `todo` with actors on a cluster.

    The bytes are those of the local backend. An actor that dies is restarted and does its shard again. Raises
    EnvironmentFault when the cluster cannot be reached, has no room, or does not see the folders; PeerLostError
    when an actor keeps dying; and whatever PstError an actor met.
    """
    total = sum(len(shards.rationale_keys(shard)) for shard in todo)
    with ray_cluster(config.ray) as ray:
        count = _number_of_actors(config.ray, ray.cluster_resources(), len(todo))
        log.info("embed: %d shards on %d Ray actors", len(todo), count)
        actor_class = ray.remote(
            num_cpus=config.ray.num_cpus_per_actor,
            num_gpus=config.ray.num_gpus_per_actor,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )(EncoderActor)
        folders = str(shards.directory.resolve()), str(directory.resolve())
        actors = [actor_class.remote(config, *folders) for _ in range(count)]
        try:
            with progress("embed", total=total, unit="texts") as bar:
                _share_out(ray, actors, todo, bar)
        finally:
            for actor in actors:
                with contextlib.suppress(Exception):
                    ray.kill(actor)
    missing = [shard for shard in todo if not (directory / f"{shard.stem}.safetensors").is_file()]
    if missing:
        raise EnvironmentFault(
            f"{len(missing)} of {len(todo)} files were written where this machine cannot see them",
            "put data_dir on storage that all machines of the cluster share",
            path=directory,
        )


def _share_out(ray: Any, actors: list[Any], todo: list[ShardInfo], bar: Progress) -> None:
    """Give each actor a shard as soon as it is free, the largest first, until all are done."""
    waiting = sorted(todo, key=lambda shard: (-shard.bytes, shard.name))
    # An actor gets work only when it has started: one that the cluster has no room for never holds a shard.
    running: dict[Any, tuple[Any, ShardInfo | None]] = {actor.ready.remote(): (actor, None) for actor in actors}
    started, done = False, 0
    while done < len(todo):
        finished, _ = ray.wait(list(running), num_returns=1, timeout=_QUIET_SECONDS)
        if not finished and not started:
            raise EnvironmentFault(
                f"no encoder actor started within {_QUIET_SECONDS:.0f} s", "see `ray status` for what the cluster lacks"
            )
        if not finished:  # slow, or an actor of a lost node waits for room: only the cluster's owner can tell
            at_work = sorted(shard.name for _, shard in running.values() if shard is not None)
            log.warning(
                "embed: nothing finished for %.0f s, still waiting for %s; `ray status` says what the cluster lacks",
                _QUIET_SECONDS,
                ", ".join(at_work[:5]),
            )
            continue
        actor, shard = running.pop(finished[0])
        texts = _result(ray, finished[0], shard)
        if not started:
            bar.restart()  # the speed is that of encoding, not of loading encoders
        started = True
        bar.advance(texts)
        done += shard is not None
        if waiting:
            following = waiting.pop(0)
            running[actor.embed.remote(following)] = (actor, following)


def _result(ray: Any, future: Any, shard: ShardInfo | None) -> int:
    """What an actor returned: a number of texts. Its PstError is raised as it was, its loss as PeerLostError."""
    try:
        return int(ray.get(future))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PstError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:  # died, out of memory, unschedulable, a lost connection…
        where = f"at {shard.name}" if shard is not None else "while loading the encoder"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PeerLostError(
            f"an encoder actor was lost {where}, after {_RESTARTS} restarts at most ({reason[:160]})",
            "look for out-of-memory in Ray's logs; lower embed.batch_tokens or embed.ray.num_actors",
        ) from error


def _number_of_actors(config: RayConfig, resources: dict[str, float], shards: int) -> int:
    """As many as asked for or as fit, never more than there are shards; raises EnvironmentFault when none fits."""
    wanted = {"CPU": config.num_cpus_per_actor, "GPU": config.num_gpus_per_actor}
    room = min(int(resources.get(name, 0) / amount) for name, amount in wanted.items() if amount > 0)
    if room == 0:
        has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)
        needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        raise EnvironmentFault(
            f"an encoder actor needs {needs}, the cluster has {has}",
            "lower embed.ray.num_cpus_per_actor or num_gpus_per_actor",
        )
    if config.num_actors is not None and config.num_actors > room:
        log.warning("embed: %d actors asked for, the cluster has room for %d", config.num_actors, room)
    return min(config.num_actors or room, room, shards)
