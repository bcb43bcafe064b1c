"""Who is lost, and why we think so: a judgement over what was heard of each rank, and nothing else.

No clock is read and nothing is sent here; `watch` listens, asks, and ends the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pst_dist.errors import PeerLostError

FAREWELL_SECONDS = 5.0
"""A rank that ends by an error of its own says so; the others have this long to end by the same one."""
REMEDY = "run the same command again: it goes on from the last checkpoint"


class Place(NamedTuple):
    """Where a rank stands."""

    section: str = "starting"
    step: int | None = None
    """The optimizer step it works on, from 1; None outside of steps."""
    entered: int = 0
    """Sections entered so far; ranks run one program, so these numbers can be compared."""
    signs: int = 0
    """Signs of progress so far, which only this rank's own earlier ones compare with."""

    def __str__(self) -> str:
        return self.section if self.step is None else f"{self.section} of step {self.step}"


@dataclass
class Peer:
    """What one rank's watcher knows of another rank. Times are seconds of this process's monotonic clock."""

    rank: int
    host: str
    heard: float
    """When it last sent anything."""
    moved: float
    """When it last was somewhere else than before."""
    place: Place = field(default_factory=Place)
    waiting: bool = False
    """Whether its training thread was inside a collective."""
    line: str = ""
    """The line of code at which its training thread was: `trainer.py:301`."""
    closed: str = ""
    """How its connection ended; empty while it stands."""
    farewell: str | None = None
    """What it said when it left; empty when its work was done."""
    left: float = 0.0
    """When it said so."""


@dataclass(frozen=True)
class Verdict:
    """Who was lost, and why we think so."""

    rank: int
    host: str
    place: str
    reason: str
    hangs: bool = False

    def error(self) -> PeerLostError:
        """As the error that every other rank ends with."""
        verb = "hangs" if self.hangs else "was lost"
        return PeerLostError(f"rank {self.rank} on {self.host} {verb} in {self.place} ({self.reason})", REMEDY)


def judge(peers: Iterable[Peer], now: float, timeout_seconds: float, *, all_are_known: bool = True) -> Verdict | None:
    """Who of `peers` is lost, or None; decides by what was heard alone.

    While one rank hangs the others soon stand still too, waiting for it: so the time that counts is that since any
    rank moved, and the one to blame is the one that came least far, or that is not inside a collective. Only who knows
    all ranks can tell.
    """
    here = []
    for peer in peers:
        if peer.farewell is None and peer.closed:
            return Verdict(peer.rank, peer.host, str(peer.place), peer.closed)
        if peer.farewell and now - peer.left >= FAREWELL_SECONDS:
            return Verdict(peer.rank, peer.host, str(peer.place), f"it ended with {peer.farewell}, see its message")
        if peer.farewell is None:
            here.append(peer)
    silent = min(here, key=lambda peer: peer.heard, default=None)
    if silent is not None and now - silent.heard >= timeout_seconds:
        return hung(silent, f"not heard of for {timeout_seconds:g} s: stopped, or its machine is overwhelmed")
    if all_are_known and here and now - max(peer.moved for peer in here) >= timeout_seconds:
        least = min(here, key=lambda peer: (peer.place.entered, peer.waiting))
        return hung(least, f"no rank moved for {timeout_seconds:g} s, it is at {least.line or 'an unknown line'}")
    return None


def hung(peer: Peer, reason: str) -> Verdict:
    """The verdict on a rank that is there and does not come any further."""
    return Verdict(peer.rank, peer.host, str(peer.place), reason, hangs=True)
