"""Decides which rank is lost, and why, from what each rank has reported: a pure function.

It reads no clock and sends nothing; `peer_watch` listens, calls it, and ends the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pst_dist.errors import PeerLostError

FAREWELL_SECONDS = 5.0
"""A rank that ends with an error reports it; the other ranks have this long to end with the same one."""
REMEDY = "run the same command again: it resumes from the last checkpoint"


class Place(NamedTuple):
    """Where a rank is in the program."""

    section: str = "starting"
    step: int | None = None
    """The optimizer step it works on, from 1; None outside of steps."""
    entered: int = 0
    """Sections entered so far; comparable between ranks, because they run the same program."""
    signs: int = 0
    """Signs of progress so far; comparable only with earlier values of the same rank."""

    def __str__(self) -> str:
        return self.section if self.step is None else f"{self.section} of step {self.step}"


@dataclass
class Peer:
    """What one rank's watcher knows about another rank. Times are seconds of this process's monotonic clock."""

    rank: int
    host: str
    heard: float
    """When it last sent anything."""
    moved: float
    """When it last made progress."""
    place: Place = field(default_factory=Place)
    waiting: bool = False
    """Whether its training thread was inside a collective."""
    line: str = ""
    """The line of code that its training thread was executing: `step.py:134`."""
    closed: str = ""
    """How its connection ended; empty while it is open."""
    farewell: str | None = None
    """The error it reported when it left; empty when its work was done."""
    left: float = 0.0
    """When it reported that it was leaving."""


@dataclass(frozen=True)
class Verdict:
    """Which rank was lost, and why."""

    rank: int
    host: str
    place: str
    reason: str
    hangs: bool = False

    def error(self, stacks: Path | None = None) -> PeerLostError:
        """The error that every other rank ends with; it names the folder with the ranks' stacks, if there is one."""
        verb = "hangs" if self.hangs else "was lost"
        remedy = REMEDY if stacks is None else f"{REMEDY}; each rank's stacks are in {stacks}"
        return PeerLostError(f"rank {self.rank} on {self.host} {verb} in {self.place} ({self.reason})", remedy)


def judge(peers: Iterable[Peer], now: float, timeout_seconds: float, *, all_are_known: bool = True) -> Verdict | None:
    """Which of `peers` is lost, or None.

    While one rank hangs, the others soon stop too, waiting for it. So the time that counts is the time since any rank
    made progress, and the rank that hangs is the one that got least far, or that is not inside a collective. Deciding
    this needs all ranks, hence `all_are_known`.
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
        return hung(silent, f"no message from it for {timeout_seconds:g} s: stopped, or its machine is overloaded")
    if all_are_known and here and now - max(peer.moved for peer in here) >= timeout_seconds:
        least = min(here, key=lambda peer: (peer.place.entered, peer.waiting))
        return hung(
            least, f"no rank made progress for {timeout_seconds:g} s; it is at {least.line or 'an unknown line'}"
        )
    return None


def hung(peer: Peer, reason: str) -> Verdict:
    """The verdict on a rank that is still running but makes no progress."""
    return Verdict(peer.rank, peer.host, str(peer.place), reason, hangs=True)
