"""A crew of Ray actors that work on a list of items, one result each.

Each actor gets an item when it is ready and a second one while it works, which hides the latency of the driver. Ray
places the actors and reports a lost one; its items go to the others at once, and a replacement starts when the cluster
has room. The driver keeps only the list of items.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pst_dist.clusters.ray.gpus import room_for
from pst_dist.config.schema import RayConfig
from pst_dist.errors import EnvironmentFault, PeerLostError, PstError, first_line
from pst_dist.logs import Progress

log = logging.getLogger(__name__)

_RETRIES = 4
"""How often an item is reassigned after an actor died while working on it."""
_QUEUED = 2
"""Items assigned to an actor: one in progress and one waiting."""
_QUIET_SECONDS = 300.0
"""How long no task may finish: an error before the first actor has started, later a warning."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Words:
    """What messages call the crew's work."""

    stage: str
    """The verb, such as `embed`."""
    actor: str
    """An actor, without its article: `encoder actor`."""
    loads: str
    """What it loads: `the encoder`."""
    items: str
    """Several items: `shards`."""
    remedy: str
    """What to change when actors keep dying, after reading Ray's logs."""


@dataclass(eq=False)
class _Member(Generic[_Item]):
    """An actor and its assigned items, oldest first; the first is in progress."""

    handle: Any
    ready: bool = False
    held: list[_Item] = field(default_factory=list)


class Crew(Generic[_Item]):
    """The driver's side: which actor has which items."""

    def __init__(
        self,
        ray: Any,
        hire: Callable[[], Any],
        count: int,
        words: Words,
        *,
        call: Callable[[Any, _Item], Any],
        name_of: Callable[[_Item], str],
    ) -> None:
        """`hire` makes an actor with a method `ready`; `call` gives it an item and returns Ray's reference."""
        self._ray, self._hire, self._words, self._call, self._name_of = ray, hire, words, call, name_of
        self._calls: dict[Any, tuple[_Member[_Item], _Item | None]] = {}  # pending; no item: loading
        self._members: dict[_Member[_Item], None] = {}
        self._waiting: collections.deque[_Item] = collections.deque()
        self._losses: collections.Counter[str] = collections.Counter()  # by item; "" while loading, in a row
        self.grow(count)

    def grow(self, count: int) -> None:
        """Start actors until there are `count`."""
        while len(self._members) < count:
            self._add_member()

    def work(self, todo: Sequence[_Item], tell: Callable[[_Item, Any], None], bar: Progress) -> None:
        """Distribute the items and call `tell` once for each with its result; returns when all are done.

        `bar` measures the speed from the first result on. Raises EnvironmentFault when no actor starts, PeerLostError
        when actors keep dying, and any PstError of an actor.
        """
        self._waiting.extend(todo)
        self._give_out()
        started, done = any(member.ready for member in self._members), 0
        while done < len(todo):
            finished, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_QUIET_SECONDS)
            if not finished:
                self._complain(started)
                continue
            member, item = self._calls.pop(finished[0])
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
                    bar.restart()  # without the time to load
                started = member.ready = True
                if item is not None:
                    member.held.remove(item)
                    tell(item, result)
                    del self._losses[""], self._losses[self._name_of(item)]
                    done += 1
            self._give_out()

    def ask(self, call: Callable[[Any], Any], tick: Callable[[], None]) -> Any:
        """What one actor answers to `call`, which returns Ray's reference; `tick` is called while it takes long.

        Raises PeerLostError when the actor dies, and any PstError of it.
        """
        member = next((member for member in self._members if member.ready), next(iter(self._members)))
        reference = call(member.handle)
        while not self._ray.wait([reference], num_returns=1, timeout=2.0)[0]:
            tick()
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PstError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise PeerLostError(
                f"an {self._words.actor} was lost ({first_line(error, 160)})", "run the same command again"
            ) from error

    def dismiss(self) -> None:
        """End all actors, including those that never started."""
        for member in self._members:
            with contextlib.suppress(Exception):
                self._ray.kill(member.handle)

    def _add_member(self) -> None:
        member: _Member[_Item] = _Member(self._hire())
        self._members[member] = None
        # It gets work only after it has started: an actor for which the cluster has no room never gets an item.
        self._calls[member.handle.ready.remote()] = member, None

    def _give_out(self) -> None:
        """Assign waiting items; near the end no actor queues a second item that an idle actor could work on."""
        for depth in range(1, _QUEUED + 1):
            for member in self._members:
                if not self._waiting or (depth > 1 and len(self._waiting) < len(self._members)):
                    return
                if member.ready and len(member.held) < depth:
                    item = self._waiting.popleft()
                    member.held.append(item)
                    self._calls[self._call(member.handle, item)] = member, item

    def _replace(self, member: _Member[_Item], error: Exception) -> None:
        """Reassign a lost actor's items and start another actor; raises PeerLostError after too many losses."""
        at, words = self._name_of(member.held[0]) if member.held else "", self._words
        self._losses[at] += 1
        reason = first_line(error, 160)
        where = f"at {at}" if at else f"while loading {words.loads}"
        if self._losses[at] > _RETRIES + (0 if at else len(self._members)):
            raise PeerLostError(
                f"{words.actor}s were lost {self._losses[at]} times {where} ({reason})",
                f"look for out-of-memory errors in Ray's logs; {words.remedy}",
            ) from error
        log.warning(
            "%s: an %s was lost %s (%s); reassigning its %d %s",
            words.stage,
            words.actor,
            where,
            reason,
            len(member.held),
            words.items,
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
                f"no {self._words.actor} started within {_QUIET_SECONDS:.0f} s",
                "`ray status` shows which resources are missing",
            )
        at_work = sorted(self._name_of(member.held[0]) for member in self._members if member.held)
        log.warning(
            "%s: nothing finished for %.0f s, still waiting for %s; `ray status` shows which resources are missing",
            self._words.stage,
            _QUIET_SECONDS,
            ", ".join(at_work[:5]) or "room for an actor",
        )


def number_of_actors(config: RayConfig, resources: dict[str, float], items: int, words: Words, section: str) -> int:
    """The number of actors to start, limited by the cluster and the items; raises EnvironmentFault when none fits.

    `section` is where the config has the actors' settings. The config must be settled (`gpus.settled_actors`).
    """
    room = room_for(config, resources, f"an {words.actor}", section)
    if config.num_actors is not None and config.num_actors > room:
        log.warning("%s: %d actors requested, but the cluster has room for %d", words.stage, config.num_actors, room)
    return min(config.num_actors or room, room, items)
