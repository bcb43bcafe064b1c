"""Detects a lost rank, names it with its host and section, and ends all other ranks within seconds.

Collectives report "connection reset by peer" when a process dies, wait for many minutes when a machine dies or a rank
hangs, and never name the rank. So each rank runs a watcher thread connected to rank zero's; once a second it reports
where its rank is. A rank is *dead* when its connection ends or its machine no longer acknowledges what was sent; it is
*hung* when it sends nothing, or when no rank makes progress, for `train.timeout_seconds`. Rank zero broadcasts the
verdict, and every rank ends with PeerLostError; the watcher ends a rank that is blocked in a collective.
`progress` records where this rank is, `peer_link` is the connection, `peer_messages` what is sent, and `peer_verdict`
the decision. The launcher restarts ranks, and the trainer resumes from a checkpoint. An invalid message can only close
the connection that it came from; it never ends this thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pst_dist.distributed import peer_link
from pst_dist.distributed.peer_link import Link, LinkClosed, Meeting
from pst_dist.distributed.peer_messages import farewell_in, place_in, standing, verdict_in
from pst_dist.distributed.peer_verdict import FAREWELL_SECONDS, REMEDY, Peer, Verdict, hung, judge
from pst_dist.distributed.progress import at, place
from pst_dist.distributed.ranks import Ranks, from_main
from pst_dist.distributed.stacks import expect_a_beat, expect_nothing, write_stacks
from pst_dist.errors import PeerLostError, PstError

log = logging.getLogger(__name__)
BEAT_SECONDS = 1.0
_GRACE_SECONDS = 1.0
"""How long the training thread has to end by itself once a rank is lost."""
_VERDICT_SECONDS = 8.0
"""How long the training thread waits for the verdict when a collective failed before the watcher noticed."""
_MOST_SAID = 400
"""Characters of a rank's error that the other ranks repeat."""


@contextlib.contextmanager
def watched(ranks: Ranks, timeout_seconds: float, stacks: Path | None = None) -> Iterator[None]:
    """Let the ranks watch each other within this block; collective at its start, does nothing for a single rank.

    When a rank is lost, raises PeerLostError with its name instead of the collective's own exception. When this block's
    thread is blocked and cannot raise, the process prints that line and ends with its exit code. When a rank hangs,
    every rank writes its Python stacks into the folder `stacks`.
    """
    if ranks.world_size == 1:
        yield
        return
    at("starting")
    server, meeting = peer_link.listen() if ranks.is_main else (None, None)
    meeting = Meeting(**from_main(asdict(meeting) if meeting else None))
    link = None if ranks.is_main else peer_link.call(meeting, ranks.rank)
    if server is None and link is None:
        log.warning(
            "rank %d cannot reach %s port %d: a lost rank will be detected late and not named",
            ranks.rank,
            " or ".join(meeting.addresses),
            meeting.port,
        )
        yield
        return
    watcher = _Watcher(ranks, meeting, timeout_seconds, server, link, stacks)
    farewell = ""
    try:
        yield
    except BaseException as error:
        farewell = _name_of(error)
        lost = watcher.explain(error)
        if lost is not None:
            raise lost from error
        raise
    finally:
        watcher.leave(farewell)


def _name_of(error: BaseException) -> str:
    """How the other ranks report an error of this rank, for users who see only the output of one rank."""
    return str(error)[:_MOST_SAID] if isinstance(error, PstError) else type(error).__name__


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an exception may come from a collective whose peer is gone.

    gloo, NCCL and their stores raise RuntimeErrors; an unreachable model hub raises OSErrors.
    """
    words = str(error).lower()
    signs = ("gloo", "nccl", "connection", "socket", "broken pipe", "timed out", "remote process")
    return isinstance(error, RuntimeError) and any(sign in words for sign in signs)


class _Watcher:
    """The watcher thread of one rank, and what its training thread calls."""

    def __init__(
        self,
        ranks: Ranks,
        meeting: Meeting,
        timeout_seconds: float,
        server: socket.socket | None,
        link: Link | None,
        stacks: Path | None = None,
    ) -> None:
        self.ranks, self.meeting, self.timeout_seconds = ranks, meeting, timeout_seconds
        self.stacks = stacks
        self.server = server
        self.links: dict[Link, Peer | None] = {}
        """Peer of each connection; None until it has authenticated."""
        now = time.monotonic()
        self.peers = {0: Peer(0, meeting.host, now, now)}
        """On rank zero, all connected ranks including itself; on other ranks, rank zero alone."""
        self.verdict: Verdict | None = None
        self.known = threading.Event()
        self._training_thread = threading.get_ident()
        self._overslept = -FAREWELL_SECONDS
        """When this thread last found that it had been suspended for longer than the timeout."""
        self._farewell: str | None = None
        self._gone = threading.Event()
        self._speaker = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ)
        if link is not None:
            self._add(link, self.peers[0])
        _watchers.add(self)
        self._thread = threading.Thread(target=self._run, name="pst-watch", daemon=True)
        self._thread.start()

    # --- the training thread's side ---------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> PeerLostError | None:
        """The lost rank behind an exception, if any; waits for the verdict when it looks like a broken connection."""
        if _is_broken_connection(error):
            self.known.wait(_VERDICT_SECONDS)
            if self.verdict is None:
                words = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                return PeerLostError(f"a connection to another rank broke in {place()} ({words})", REMEDY)
        if self.verdict is None or isinstance(error, PstError):
            return None
        if not self._speaker.acquire(blocking=False):
            time.sleep(60)  # the watcher is already ending this process
        if self.ranks.is_main:
            time.sleep(0.5)  # let the verdict reach the other ranks before this process ends
        return self._error(self.verdict)

    def leave(self, farewell: str) -> None:
        """Inform the other ranks and end the thread; `farewell` is empty when the work is done."""
        self._farewell = farewell
        self._gone.set()
        with contextlib.suppress(OSError):
            self._wake.send(b".")
        self._thread.join(timeout=2 * BEAT_SECONDS)
        _watchers.discard(self)

    # --- the watcher's own thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        beat = time.monotonic()
        while self._farewell is None and self.verdict is None:
            for key, _ in self._selector.select(max(0.0, beat - time.monotonic())):
                self._hear(key.fileobj)
            now = time.monotonic()
            if now >= beat:
                expect_a_beat(self.timeout_seconds)
                self._forgive(now - beat)
                here = standing(self._training_thread)
                if self.ranks.is_main:
                    self._take(self.peers[0], here)
                self._tell(here)
                beat = now + BEAT_SECONDS
            self.verdict = self.verdict or self._judge(now)
        expect_nothing()
        if self.verdict is not None:
            self._tell({"verdict": asdict(self.verdict)})
            if self.verdict.hangs and self.stacks is not None:
                write_stacks(self.stacks, self.ranks.rank, str(self.verdict.error()))
            self.known.set()
            self._end_this_rank(self.verdict)
        self._tell({"farewell": self._farewell})
        with contextlib.ExitStack() as closing:
            for close in self.closers():
                closing.callback(close)
            closing.callback(self._selector.close)

    def closers(self) -> list[Callable[[], None]]:
        """Functions that close its sockets in this process."""
        closers = [self._wake.close, self._woken.close, *(link.close for link in self.links)]
        return [*closers, self.server.close] if self.server is not None else closers

    def _add(self, link: Link, peer: Peer | None) -> None:
        self.links[link] = peer
        self._selector.register(link.socket, selectors.EVENT_READ, link)

    def _drop(self, link: Link, reason: str) -> None:
        self._selector.unregister(link.socket)
        link.close()
        peer = self.links.pop(link)
        if peer is None:
            return
        # How the kernel reports an unreachable machine varies, so decide by how long the peer has been silent.
        silence = time.monotonic() - peer.heard
        gone = silence >= peer_link.UNANSWERED_SECONDS - BEAT_SECONDS
        peer.closed = f"no answer for {silence:.0f} s: its machine or the network is gone" if gone else reason

    def _hear(self, source: Any) -> None:
        if source is self._woken:
            return
        if source is self.server:
            self._accept()
            return
        key = self._selector.get_map().get(source) if source.fileno() >= 0 else None
        if key is None:
            return  # closed since select() returned, because there were too many strangers
        link: Link = key.data
        try:
            peer = self.links[link]
            if peer is None:
                peer = self._greet(link)
                messages = [] if peer is None else link.waiting_lines()
            else:
                messages = link.receive()
            for message in messages:
                assert peer is not None
                self._take(peer, message)
        except LinkClosed as error:
            self._drop(link, str(error))

    def _accept(self) -> None:
        assert self.server is not None
        connection = None
        try:
            connection, _ = self.server.accept()
            self._add(Link(connection), None)
        except OSError:
            if connection is not None:
                connection.close()
                return
            time.sleep(0.05)  # there are no file descriptors left: avoid a busy loop
        strangers = [link for link, peer in self.links.items() if peer is None]
        for link in strangers[: -peer_link.STRANGERS]:  # oldest first
            self._drop(link, "a stranger")

    def _greet(self, link: Link) -> Peer | None:
        """Register a rank once its first line is complete; raises LinkClosed for a stranger."""
        hello = link.greet(self.meeting, self.ranks.world_size)
        if hello is None:
            return None
        now = time.monotonic()
        link.send_bytes(self.meeting.answered.encode())
        peer = self.peers[hello.rank] = self.links[link] = Peer(hello.rank, hello.host, now, now)
        return peer

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        """Apply a peer's message about itself, or rank zero's verdict; raises LinkClosed for an invalid message."""
        peer.heard = time.monotonic()
        if "place" in message:
            there, waiting, line = place_in(message)
            peer.moved = peer.heard if there.signs != peer.place.signs else peer.moved
            peer.place, peer.waiting, peer.line = there, waiting, line
        if "farewell" in message:
            peer.farewell, peer.left = farewell_in(message), peer.heard
        if "verdict" in message and not self.ranks.is_main:
            self.verdict = verdict_in(message["verdict"])

    def _tell(self, message: dict[str, Any]) -> None:
        for link, peer in list(self.links.items()):
            if peer is None:
                if time.monotonic() - link.since > peer_link.HELLO_SECONDS:
                    self._drop(link, "a stranger")
                continue
            # Do not pile up lines for a stopped process: its kernel acknowledges them, but nobody reads them.
            if time.monotonic() - peer.heard > 30 * BEAT_SECONDS:
                continue
            try:
                link.send(message)
            except LinkClosed as error:
                self._drop(link, str(error))

    def _forgive(self, late: float) -> None:
        """Do not count time during which this thread itself was stopped (or its machine suspended) as silence."""
        if late <= 2 * BEAT_SECONDS:
            return
        now = time.monotonic()
        for peer in self.peers.values():
            peer.heard, peer.moved = min(now, peer.heard + late), min(now, peer.moved + late)
        if late >= self.timeout_seconds:
            self._overslept = now

    def _judge(self, now: float) -> Verdict | None:
        verdict = judge(self.peers.values(), now, self.timeout_seconds, all_are_known=self.ranks.is_main)
        if verdict is not None and now - self._overslept < FAREWELL_SECONDS:
            # This rank was suspended, and the others have given it up; so it is the lost one.
            this = Peer(self.ranks.rank, os.uname().nodename, now, now, place())
            return hung(this, f"stopped for {self.timeout_seconds:g} s or more, and the other ranks did not wait")
        return verdict

    def _error(self, verdict: Verdict) -> PeerLostError:
        """The verdict as an error that also names the folder of the stacks."""
        return verdict.error(self.stacks if verdict.hangs else None)

    def _end_this_rank(self, verdict: Verdict) -> None:
        """Give the training thread a moment to end by itself; otherwise print the line and end the process."""
        if self._gone.wait(_GRACE_SECONDS) or not self._speaker.acquire(blocking=False):
            return
        # Without logging and sys.stderr: the blocked thread may hold their locks.
        os.write(2, f"pst: {self._error(verdict)}\n".encode())
        os._exit(PeerLostError.exit_code)


_watchers: weakref.WeakSet[_Watcher] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child (a data loader's worker) must not keep its parent's connections open after the parent has died."""
    for close in [close for watcher in _watchers for close in watcher.closers()]:
        with contextlib.suppress(OSError):
            close()


os.register_at_fork(after_in_child=_let_go_in_child)
