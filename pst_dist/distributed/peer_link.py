"""The wire between a rank's watcher and rank zero's: short JSON lines over TCP, and how the two find each other.

A connection counts only after both sides have shown their half of a secret that went through the process group, so a
stranger who finds the port is hung up on, and nothing that arrives is ever unpickled. What the lines mean, and who is
to blame for silence, is `watch`'s.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

UNANSWERED_SECONDS = 5.0
"""How long a peer's kernel may leave our bytes unacknowledged. A stopped process's kernel still acknowledges; that of a
machine without power or cable does not."""
_LONGEST_LINE = 4096
_CONNECT_SECONDS = 5.0


class LinkClosed(Exception):
    """The other side is gone; `str()` of it says how that showed."""


@dataclass(frozen=True)
class Meeting:
    """Where rank zero listens and how both sides prove themselves; travels through the process group."""

    addresses: tuple[str, ...]
    """Rank zero's host as others may know it, best first."""
    port: int
    host: str
    """Rank zero's host name, for people."""
    asked: str
    """Secret that a connecting rank shows."""
    answered: str
    """Secret that rank zero shows in return."""


class Link:
    """One connection: whole lines out, whole lines in."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.since = time.monotonic()
        self._rest = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(UNANSWERED_SECONDS * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        # A line is small and the buffer large, so a send that blocks means a peer that is long gone.
        connection.settimeout(1.0)

    def send(self, message: dict[str, Any]) -> None:
        """Send one line; raises LinkClosed."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise LinkClosed("connection closed") from error

    def receive(self) -> list[dict[str, Any]]:
        """The lines that have arrived, waiting a second at most for the first; raises LinkClosed when it ended."""
        try:
            piece = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError as error:
            raise LinkClosed("connection closed") from error
        if not piece:
            raise LinkClosed("connection closed")
        *lines, self._rest = (self._rest + piece).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if len(self._rest) > _LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
            raise LinkClosed("it does not speak our language")
        return messages

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def listen() -> tuple[socket.socket, Meeting]:
    """Rank zero's listening socket, and what the others need to find it; on loopback when the whole run is there."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if master in ("localhost", "127.0.0.1", "::1"):
        server, addresses = socket.create_server(("127.0.0.1", 0)), ["127.0.0.1"]
    else:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        addresses = [own for own in (_own_address(master), master, socket.gethostname()) if own]
    server.setblocking(False)
    meeting = Meeting(
        tuple(dict.fromkeys(addresses)),
        server.getsockname()[1],
        os.uname().nodename,
        secrets.token_hex(16),
        secrets.token_hex(16),
    )
    return server, meeting


def _own_address(towards: str) -> str | None:
    """The address under which this machine reaches another one, or its own; None when the name means nothing here."""
    with contextlib.suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of a datagram socket: looks at the routes, sends nothing
            own = probe.getsockname()[0]
            # Some systems give a host's own name a loopback address that means another machine elsewhere.
            return None if own.startswith("127.") or own == "::1" else own
    return None


def call(meeting: Meeting, rank: int) -> Link | None:
    """Connect to rank zero from another rank; None when none of its addresses can be reached."""
    for address in meeting.addresses:
        with contextlib.suppress(OSError, LinkClosed, IndexError):
            connection = socket.create_connection((address, meeting.port), timeout=_CONNECT_SECONDS)
            link = Link(connection)
            try:
                connection.settimeout(_CONNECT_SECONDS)
                link.send({"rank": rank, "host": os.uname().nodename, "secret": meeting.asked})
                if _same(link.receive()[0].get("secret"), meeting.answered):
                    connection.settimeout(1.0)
                    return link
            except BaseException:
                link.close()
                raise
            link.close()
    return None


def is_peer(hello: dict[str, Any], meeting: Meeting, world_size: int) -> bool:
    """Whether a connection's first line comes from one of our ranks."""
    rank, host = hello.get("rank"), hello.get("host")
    known = isinstance(rank, int) and 0 < rank < world_size and isinstance(host, str)
    return known and _same(hello.get("secret"), meeting.asked)


def _same(given: Any, secret: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), secret.encode())
