"""Embedding on a Ray cluster: encoder actors process a list of shards.

Each shard is one task and one file; `embedding.embed.embed_shard` writes the file, here as in a single process. Ray
places the actors and reports a lost one; its shards go to the other actors at once, and a replacement starts when the
cluster has room. `clusters.ray.connect` provides the cluster and `embedding.files` the files: a folder must be shared
by all machines, a URL reachable from them.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import platform
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.gpus import room_for, settled_actors
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.data.shards import ShardInfo
from pst_dist.embedding.embed import EmbeddedShard, difference, embed_shard
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.files import Files
from pst_dist.errors import EnvironmentFault, IntegrityError, PeerLostError, PstError, first_line
from pst_dist.logs import Progress

log = logging.getLogger(__name__)

_RETRIES = 4
"""How often a shard is reassigned after an actor died while encoding it."""
_QUEUED = 2
"""Shards assigned to an actor: one in progress and one waiting, which hides the latency of the driver."""
_QUIET_SECONDS = 300.0
"""How long no task may finish: an error before the first actor has started, later a warning."""


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
                f"embed.device={config.device}, but the actors take none of {resources.get('GPU', 0):g} GPUs",
                "leave embed.device out, or set embed.ray.num_gpus_per_actor=1 on a cluster with GPUs",
            )
        count = _number_of_actors(config.ray, resources, len(todo))
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
            crew = Crew(ray, lambda: actor_class.remote(config, identity, files.for_actor(), driver), count)
            try:
                crew.work(todo, tell, bar)
            finally:
                crew.dismiss()


@dataclass(eq=False)
class _Member:
    """An actor and its assigned shards, oldest first; the first is in progress."""

    handle: Any
    ready: bool = False
    held: list[ShardInfo] = field(default_factory=list)


class Crew:
    """The driver's side: which actor has which shards. It keeps only the list of shards; a shard takes few messages."""

    def __init__(self, ray: Any, hire: Callable[[], Any], count: int) -> None:
        self._ray, self._hire = ray, hire
        self._calls: dict[Any, tuple[_Member, ShardInfo | None]] = {}  # pending; no shard: loading its encoder
        self._members: dict[_Member, None] = {}
        self._waiting: collections.deque[ShardInfo] = collections.deque()
        self._losses: collections.Counter[str] = collections.Counter()  # by shard; "" while loading, in a row
        for _ in range(count):
            self._add_member()

    def work(self, todo: list[ShardInfo], tell: Callable[[ShardInfo, EmbeddedShard], None], bar: Progress) -> None:
        """Distribute the shards and call `tell` once for each; returns when all are done."""
        self._waiting.extend(todo)
        started, done = False, 0
        while done < len(todo):
            finished, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_QUIET_SECONDS)
            if not finished:
                self._complain(started)
                continue
            member, shard = self._calls.pop(finished[0])
            try:
                result = self._ray.get(finished[0])
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PstError):
                    raise error.cause from None
                raise
            except self._ray.exceptions.RayError as error:  # died, out of memory, its node is gone…
                self._replace(member, error)
            else:
                if not started:
                    bar.restart()  # measure the speed of encoding, without the time to load encoders
                started = member.ready = True
                if shard is not None:
                    member.held.remove(shard)
                    (bar.advance if result.encoded else bar.skip)(result.rows)
                    tell(shard, result)
                    del self._losses[""], self._losses[shard.name]
                    done += 1
            self._give_out()

    def dismiss(self) -> None:
        """End all actors, including those that never started."""
        for member in self._members:
            with contextlib.suppress(Exception):
                self._ray.kill(member.handle)

    def _add_member(self) -> None:
        member = _Member(self._hire())
        self._members[member] = None
        # It gets work only after it has started: an actor for which the cluster has no room never gets a shard.
        self._calls[member.handle.ready.remote()] = member, None

    def _give_out(self) -> None:
        """Assign waiting shards; near the end no actor queues a second shard that an idle actor could process."""
        for depth in range(1, _QUEUED + 1):
            for member in self._members:
                if not self._waiting or (depth > 1 and len(self._waiting) < len(self._members)):
                    return
                if member.ready and len(member.held) < depth:
                    shard = self._waiting.popleft()
                    member.held.append(shard)
                    self._calls[member.handle.embed.remote(shard)] = member, shard

    def _replace(self, member: _Member, error: Exception) -> None:
        """Reassign a lost actor's shards and start another actor; raises PeerLostError after too many losses."""
        at = member.held[0].name if member.held else ""
        self._losses[at] += 1
        reason = first_line(error, 160)
        where = f"at {at}" if at else "while loading the encoder"
        if self._losses[at] > _RETRIES + (0 if at else len(self._members)):
            raise PeerLostError(
                f"encoder actors were lost {self._losses[at]} times {where} ({reason})",
                "look for out-of-memory errors in Ray's logs; lower embed.batch_tokens or embed.ray.num_actors",
            ) from error
        log.warning(
            "embed: an encoder actor was lost %s (%s); reassigning its %d shards", where, reason, len(member.held)
        )
        self._waiting.extendleft(reversed(member.held))
        del self._members[member]
        self._calls = {call: holder for call, holder in self._calls.items() if holder[0] is not member}
        with contextlib.suppress(Exception):  # it may be unreachable but alive, and keep its resources
            self._ray.kill(member.handle)
        self._add_member()

    def _complain(self, started: bool) -> None:
        """Report that no task has finished for long: an error before the first actor started, later a warning."""
        if not started:
            raise EnvironmentFault(
                f"no encoder actor started within {_QUIET_SECONDS:.0f} s",
                "`ray status` shows which resources are missing",
            )
        at_work = sorted(member.held[0].name for member in self._members if member.held)
        log.warning(
            "embed: nothing finished for %.0f s, still waiting for %s; `ray status` shows which resources are missing",
            _QUIET_SECONDS,
            ", ".join(at_work[:5]) or "room for an actor",
        )


def _number_of_actors(config: RayConfig, resources: dict[str, float], shards: int) -> int:
    """The number of actors to start, limited by the cluster and the shards; raises EnvironmentFault when none fits."""
    room = room_for(config, resources, "an encoder actor", "embed.ray")
    if config.num_actors is not None and config.num_actors > room:
        log.warning("embed: %d actors requested, but the cluster has room for %d", config.num_actors, room)
    return min(config.num_actors or room, room, shards)
