"""Embedding on a Ray cluster: encoder actors process a list of shards.

Each shard is one task and one file; `embedding.embed_shard` writes the file, here as in a single process.
`clusters.ray.crew` distributes the shards, `clusters.ray.connect` provides the cluster and `embedding.files` the files:
a folder must be shared by all machines, a URL reachable from them.
"""

from __future__ import annotations

import logging
import platform
import uuid
from collections.abc import Callable
from typing import Any

from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.crew import Crew, Words, number_of_actors
from pst_dist.clusters.ray.gpus import settled_actors
from pst_dist.config.schema import EmbedConfig
from pst_dist.data.shards import ShardInfo
from pst_dist.embedding.embed import difference
from pst_dist.embedding.embed_shard import EmbeddedShard, embed_shard
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.files import Files
from pst_dist.errors import EnvironmentFault, IntegrityError
from pst_dist.logs import Progress

log = logging.getLogger(__name__)

_WORDS = Words("embed", "encoder actor", "the encoder", "shards", "lower embed.batch_tokens or embed.ray.num_actors")


class EncoderActor:
    """One encoder in its own process. Its only state is the loaded model, so any actor can process any shard."""

    def __init__(self, config: EmbedConfig, identity: dict[str, Any], files: Files, driver: str) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.ray.num_cpus_per_actor)))
        self._config, self._identity, self._files, self._driver = config, identity, files, driver
        self._loaded: TextEncoder | None = None

    def ready(self) -> None:
        """Load the encoder (not in `__init__`, whose errors Ray turns into text).

        Raises IntegrityError when this machine's encoder differs from the driver's, EnvironmentFault when it does not
        see the driver's files, and whatever loading raises.
        """
        if self._loaded is None:
            # Whether a process without a reserved GPU sees the machine's GPUs depends on Ray's version and settings.
            on_cpu = self._config.device is None and not self._config.ray.num_gpus_per_actor
            self._loaded = TextEncoder(self._config, device="cpu" if on_cpu else None)
        if self._loaded.identity != self._identity:
            raise IntegrityError(
                f"the encoder on {platform.node()} differs: {difference(self._loaded.identity, self._identity)}",
                "every machine needs the same encoder",
                path=self._config.encoder,
            )
        self._files.check(self._driver)

    def embed(self, shard: ShardInfo) -> EmbeddedShard:
        """Embed one shard, or skip it when its file is complete; returns only a summary."""
        assert self._loaded is not None
        with self._files.at_hand(shard) as (folder, target):
            return embed_shard(self._loaded, folder, shard, target)


def embed_with_ray(
    config: EmbedConfig,
    identity: dict[str, Any],
    files: Files,
    todo: list[ShardInfo],
    tell: Callable[[ShardInfo, EmbeddedShard], None],
    bar: Progress,
) -> None:
    """Have actors embed every shard of `todo`, roughly in order; `tell` is called once for each.

    The files have the same bytes as with the local backend. Raises EnvironmentFault when the cluster cannot be reached,
    has no room, or does not see the folders; PeerLostError when actors keep dying; and any PstError of an actor.
    """
    with ray_cluster(config.ray) as ray:
        resources = ray.cluster_resources()
        config = config.model_copy(update={"ray": settled_actors(config.ray, resources, device=config.device)})
        if (config.device or "").startswith("cuda") and not config.ray.num_gpus_per_actor:
            raise EnvironmentFault(
                f"embed.device={config.device}, but the actors use none of the {resources.get('GPU', 0):g} GPUs",
                "leave embed.device out, or set embed.ray.num_gpus_per_actor=1 on a cluster with GPUs",
            )
        count = number_of_actors(config.ray, resources, len(todo), _WORDS, "embed.ray")
        gpus = config.ray.num_gpus_per_actor
        each = f" with {gpus:g} GPU each" if gpus else ""
        log.info("embed: %d shards on %d Ray actors%s", len(todo), count, each)
        actor_class = ray.remote(
            num_cpus=config.ray.num_cpus_per_actor,
            num_gpus=config.ray.num_gpus_per_actor,
            # Ray would keep a lost actor's shards for its replacement, which may never start on a full cluster.
            max_restarts=0,
            max_task_retries=0,
        )(EncoderActor)
        driver = uuid.uuid4().hex
        with files.announced(driver):
            crew = Crew[ShardInfo](
                ray,
                lambda: actor_class.remote(config, identity, files.for_actor(), driver),
                count,
                _WORDS,
                call=lambda handle, shard: handle.embed.remote(shard),
                name_of=lambda shard: shard.name,
            )

            def done(shard: ShardInfo, result: EmbeddedShard) -> None:
                (bar.advance if result.encoded else bar.skip)(result.rows)
                tell(shard, result)

            try:
                crew.work(todo, done, bar)
            finally:
                crew.dismiss()
