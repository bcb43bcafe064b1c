"""A teacher with many replicas: each Ray actor has its own copy of the model and runs `teacher.local`.

Each actor answers one batch at a time. The journal stays with the driver, so nothing here is kept on disk. A lost actor
is replaced, and its batch is asked again. A sample depends only on its seed, so the result is the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.gpus import room_for, settled_actors
from pst_dist.config.schema import RayConfig
from pst_dist.errors import PeerLostError, PstError, first_line
from pst_dist.teacher.batches import Batcher
from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.local import LocalTeacher
from pst_dist.teacher.messages import Reply, Request
from pst_dist.teacher.settings import TeachSettings

log = logging.getLogger(__name__)

_RETRIES = 3
"""How often in a row a replica may be lost."""


class ReplicaActor:
    """One copy of the model in its own process; it is loaded with the first batch."""

    def __init__(self, settings: TeachSettings, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._settings = settings
        self._teacher: LocalTeacher | None = None

    def answer(self, requests: list[Request]) -> list[Reply]:
        """The replies to one batch; raises what loading the model raises."""
        if self._teacher is None:
            self._teacher = LocalTeacher(self._settings)
        return self._teacher.answer(requests)


class RayTeacher:
    """The driver's side; made by `ray_teacher`."""

    def __init__(self, ray: Any, settings: TeachSettings, config: RayConfig, chat: bool) -> None:
        self.name, self.chat = settings.teacher_name, chat
        config = settled_actors(config, ray.cluster_resources())
        count = number_of_replicas(config, ray.cluster_resources(), settings.concurrency)
        self._ray = ray
        self._lanes = [_Lane(ray, settings, config) for _ in range(count)]
        size = -(-settings.concurrency // count)
        self._batcher = Batcher([lane.answer for lane in self._lanes], size)
        log.info("teach: %d replicas of %s, batches of %d", count, self.name, size)

    async def ask(self, request: Request) -> Reply:
        """The reply; raises PeerLostError when replicas keep dying, and any PstError of a replica."""
        return await self._batcher.ask(request)

    async def close(self) -> None:
        """End all actors."""
        for lane in self._lanes:
            lane.dismiss()


class _Lane:
    """One replica, replaced when it is lost."""

    def __init__(self, ray: Any, settings: TeachSettings, config: RayConfig) -> None:
        self._ray, self._settings, self._config = ray, settings, config
        self._actor = self._hire()

    def _hire(self) -> Any:
        options = {"num_cpus": self._config.num_cpus_per_actor, "num_gpus": self._config.num_gpus_per_actor}
        actor_class = self._ray.remote(max_restarts=0, max_task_retries=0, **options)(ReplicaActor)
        return actor_class.remote(self._settings, max(1, int(self._config.num_cpus_per_actor)))

    async def answer(self, requests: list[Request]) -> list[Reply]:
        for lost in range(_RETRIES + 1):
            try:
                replies: list[Reply] = await self._actor.answer.remote(requests)
                return replies
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PstError):
                    raise error.cause from None
                raise
            except self._ray.exceptions.RayError as error:
                reason = first_line(error, 160)
                self.dismiss()
                if lost == _RETRIES:
                    raise PeerLostError(
                        f"replicas of the teacher were lost {lost + 1} times ({reason})",
                        "look for out-of-memory errors in Ray's logs; lower --concurrency or embed.ray.num_actors",
                    ) from error
                log.warning("teach: a replica was lost (%s); asking its batch again", reason)
                self._actor = self._hire()
        raise AssertionError("unreachable")

    def dismiss(self) -> None:
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.kill(self._actor)


def number_of_replicas(config: RayConfig, resources: dict[str, float], requests: int) -> int:
    """The replicas to start, limited by the cluster and the requests in flight; raises EnvironmentFault for none."""
    room = room_for(config, resources, "a replica of the teacher", "embed.ray")
    return min(config.num_actors or room, room, requests)


@contextlib.contextmanager
def ray_teacher(config: RayConfig) -> Iterator[Any]:
    """Yield the function that makes the teacher, while this process is connected to the cluster."""
    with ray_cluster(config) as ray:

        def make(settings: TeachSettings, ledger: Ledger) -> RayTeacher:
            from pst_dist.teacher.local import takes_chat

            return RayTeacher(ray, settings, config, takes_chat(settings))

        yield make
