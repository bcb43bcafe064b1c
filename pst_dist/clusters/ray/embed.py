"""Embedding on a Ray cluster: encoder actors over a list of shards. The cluster itself is `ray_cluster`.

One shard, one task, one file, and what the file holds is decided by `embeddings.embed_shard`, here as in one process.
Ray places the actors and says when one is lost; what it held goes back to the others at once, and another actor is
asked for, which comes when there is room for it. Where the files lie is `embedding_files`: a folder must be shared
between the machines, a URL reachable from them.
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
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.data.shards import ShardInfo
from pst_dist.embedding.embed import EmbeddedShard, difference, embed_shard
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.files import Files
from pst_dist.errors import EnvironmentFault, IntegrityError, PeerLostError, PstError, first_line
from pst_dist.logs import Progress

log = logging.getLogger(__name__)

_RETRIES = 4
"""How often a shard is given out again after it took an actor with it."""
_QUEUED = 2
"""Shards an actor holds: one at work and one waiting, which hides the way to the driver and back."""
_QUIET_SECONDS = 300.0
"""How long nothing may be heard: before the first actor has started it is an error, later a warning."""


class EncoderActor:
    """One encoder in a process of its own. Its state is the loaded model, so any actor can do any shard."""

    def __init__(self, config: EmbedConfig, identity: dict[str, Any], files: Files, driver: str) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.ray.num_cpus_per_actor)))
        self._config, self._identity, self._files, self._driver = config, identity, files, driver
        self._loaded: TextEncoder | None = None

    def ready(self) -> None:
        """Return once the encoder is loaded (not in `__init__`, whose errors Ray turns into text).

        Raises IntegrityError when this machine has another encoder than the driver's, EnvironmentFault when it
        does not see the driver's files, and what loading raises.
        """
        if self._loaded is None:
            # Whether a process without a GPU of its own sees the machine's hangs on Ray's version and environment.
            on_cpu = self._config.device is None and self._config.ray.num_gpus_per_actor == 0
            self._loaded = TextEncoder(self._config, device="cpu" if on_cpu else None)
        if self._loaded.identity != self._identity:
            raise IntegrityError(
                f"the encoder on {platform.node()} differs: {difference(self._loaded.identity, self._identity)}",
                "every machine needs the same encoder",
                path=self._config.encoder,
            )
        self._files.check(self._driver)

    def embed(self, shard: ShardInfo) -> EmbeddedShard:
        """See to one shard's file; only this summary of it travels back."""
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
    """Have actors see to the file of every shard of `todo`, in about that order; `tell` is called once for each.

    The bytes are those of the local backend. Raises EnvironmentFault when the cluster cannot be reached, has no
    room, or does not see the folders; PeerLostError when actors keep dying; and whatever PstError an actor met.
    """
    with ray_cluster(config.ray) as ray:
        count = _number_of_actors(config.ray, ray.cluster_resources(), len(todo))
        log.info("embed: %d shards on %d Ray actors", len(todo), count)
        actor_class = ray.remote(
            num_cpus=config.ray.num_cpus_per_actor,
            num_gpus=config.ray.num_gpus_per_actor,
            # Ray would bind the shards of a lost actor to its successor, which on a full cluster may never start.
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
    """An actor and what it holds, the oldest first: that is the one at work."""

    handle: Any
    ready: bool = False
    held: list[ShardInfo] = field(default_factory=list)


class Crew:
    """The driver's side: who holds what. Its memory is the list of shards, its work for each a few messages."""

    def __init__(self, ray: Any, hire: Callable[[], Any], count: int) -> None:
        self._ray, self._hire = ray, hire
        self._calls: dict[Any, tuple[_Member, ShardInfo | None]] = {}  # under way; no shard: it loads its encoder
        self._members: dict[_Member, None] = {}
        self._waiting: collections.deque[ShardInfo] = collections.deque()
        self._losses: collections.Counter[str] = collections.Counter()  # by shard; "" while loading, in a row
        for _ in range(count):
            self._add_member()

    def work(self, todo: list[ShardInfo], tell: Callable[[ShardInfo, EmbeddedShard], None], bar: Progress) -> None:
        """Share out the shards and tell of each once; returns when all are done."""
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
                    bar.restart()  # the speed is that of encoding, not of loading encoders
                started = member.ready = True
                if shard is not None:
                    member.held.remove(shard)
                    (bar.advance if result.encoded else bar.skip)(result.rows)
                    tell(shard, result)
                    del self._losses[""], self._losses[shard.name]
                    done += 1
            self._give_out()

    def dismiss(self) -> None:
        """End all actors, those too that never started."""
        for member in self._members:
            with contextlib.suppress(Exception):
                self._ray.kill(member.handle)

    def _add_member(self) -> None:
        member = _Member(self._hire())
        self._members[member] = None
        # It gets work only when it has started: an actor that the cluster has no room for never holds a shard.
        self._calls[member.handle.ready.remote()] = member, None

    def _give_out(self) -> None:
        """Fill up those who have room; near the end nobody holds a second shard that another could be doing."""
        for depth in range(1, _QUEUED + 1):
            for member in self._members:
                if not self._waiting or (depth > 1 and len(self._waiting) < len(self._members)):
                    return
                if member.ready and len(member.held) < depth:
                    shard = self._waiting.popleft()
                    member.held.append(shard)
                    self._calls[member.handle.embed.remote(shard)] = member, shard

    def _replace(self, member: _Member, error: Exception) -> None:
        """Take back what a lost actor held and ask for another; raises PeerLostError when that has not helped."""
        at = member.held[0].name if member.held else ""
        self._losses[at] += 1
        reason = first_line(error, 160)
        where = f"at {at}" if at else "while loading the encoder"
        if self._losses[at] > _RETRIES + (0 if at else len(self._members)):
            raise PeerLostError(
                f"an encoder actor was lost {where}, {self._losses[at]} times by now ({reason})",
                "look for out-of-memory in Ray's logs; lower embed.batch_tokens or embed.ray.num_actors",
            ) from error
        log.warning("embed: an encoder actor was lost %s (%s); %d shards go to others", where, reason, len(member.held))
        self._waiting.extendleft(reversed(member.held))
        del self._members[member]
        self._calls = {call: holder for call, holder in self._calls.items() if holder[0] is not member}
        with contextlib.suppress(Exception):  # unreachable is not dead: it would hold its room and go on
            self._ray.kill(member.handle)
        self._add_member()

    def _complain(self, started: bool) -> None:
        """Nothing was heard for long: before the first start an error, later slow, or nobody has room to start."""
        if not started:
            raise EnvironmentFault(
                f"no encoder actor started within {_QUIET_SECONDS:.0f} s", "see `ray status` for what the cluster lacks"
            )
        at_work = sorted(member.held[0].name for member in self._members if member.held)
        log.warning(
            "embed: nothing finished for %.0f s, still waiting for %s; `ray status` says what the cluster lacks",
            _QUIET_SECONDS,
            ", ".join(at_work[:5]) or "room for an actor",
        )


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
