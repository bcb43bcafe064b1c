"""The wire between a rank's watcher and rank zero's: short JSON lines over TCP, and how the two find each other.

Anyone on the network can connect, so nothing is read from a connection before it has authenticated: its first bytes
must be a secret that the ranks shared through the process group, compared in constant time and as bytes. Only what
follows is parsed, as JSON and never unpickled. Until then a connection may hold `_HELLO_BYTES` and a few seconds, and
there is a limit to their number. What the lines mean, and who is to blame for silence, is `peer_watch`'s.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
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
STRANGERS = 64
"""Most connections that have not authenticated; a further one replaces the oldest."""
HELLO_SECONDS = 10.0
"""How long a connection may take to authenticate."""
_HELLO_BYTES = 512
"""Longest first line: the secret, a rank and a host name."""
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


@dataclass(frozen=True)
class Hello:
    """Who a connection says it is, once it has shown the secret."""

    rank: int
    host: str


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
        self.send_bytes(json.dumps(message).encode())

    def send_bytes(self, line: bytes) -> None:
        """Send one line as it is; raises LinkClosed."""
        try:
            self.socket.sendall(line + b"\n")
        except OSError as error:
            raise LinkClosed("connection closed") from error

    def greet(self, meeting: Meeting, world_size: int) -> Hello | None:
        """Who is calling; None while its first line is incomplete. Raises LinkClosed for anyone but a rank of ours.

        The line is `SECRET {"rank": 1, "host": "n1"}`. Bytes that do not begin with the secret are never parsed.
        """
        self._read(_HELLO_BYTES)
        line, ended, rest = self._rest.partition(b"\n")
        size = len(meeting.asked)
        if not ended and len(line) < size:
            return None  # judged only as a whole: an answer to each byte would let a stranger guess them one by one
        if len(line) > _HELLO_BYTES or not _same(line[:size], meeting.asked):
            raise LinkClosed("a stranger")
        if not ended:
            return None
        self._rest = rest
        hello = _parsed(line[size:])
        rank, host = hello.get("rank"), hello.get("host")
        if type(rank) is not int or not 0 < rank < world_size or not isinstance(host, str):
            raise LinkClosed("not one of the ranks")
        return Hello(rank, host)

    def receive(self) -> list[dict[str, Any]]:
        """The lines that have arrived, waiting a second at most for the first; raises LinkClosed when it ended."""
        self._read(65536)
        return self.waiting_lines()

    def waiting_lines(self) -> list[dict[str, Any]]:
        """The whole lines among the bytes read so far; raises LinkClosed for what is not a line of ours."""
        *lines, self._rest = self._rest.split(b"\n")
        if max(map(len, (*lines, self._rest))) > _LONGEST_LINE:
            raise LinkClosed("a line is too long")
        return [_parsed(line) for line in lines]

    def first_bytes(self, count: int) -> bytes:
        """Exactly so many bytes, by which rank zero proves itself; raises LinkClosed when they do not come."""
        while len(self._rest) < count:
            before = len(self._rest)
            self._read(count - before)
            if len(self._rest) == before:  # nothing came in time
                raise LinkClosed("no answer")
        first, self._rest = self._rest[:count], self._rest[count:]
        return first

    def _read(self, most: int) -> None:
        try:
            piece = self.socket.recv(most)
        except TimeoutError:
            return
        except OSError as error:
            raise LinkClosed("connection closed") from error
        if not piece:
            raise LinkClosed("connection closed")
        self._rest += piece

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def listen() -> tuple[socket.socket, Meeting]:
    """Rank zero's listening socket, and what the others need to find it.

    It listens on one interface: that of MASTER_ADDR, which is loopback when the whole run is on this machine.
    """
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    server: socket.socket | None = None
    if not _is_loopback(master):
        for own in filter(None, (_own_address(master), _own_address(socket.gethostname()), _default_address())):
            with contextlib.suppress(OSError):
                family = socket.AF_INET6 if ":" in own else socket.AF_INET
                server = socket.create_server((own, 0), family=family, backlog=1024)
                break
    if server is None:
        server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    own = str(server.getsockname()[0])
    # A network that translates addresses may know this host only by its names.
    addresses = [own] if _is_loopback(own) else [own, master, socket.gethostname()]
    server.setblocking(False)
    meeting = Meeting(
        tuple(dict.fromkeys(addresses)),
        server.getsockname()[1],
        os.uname().nodename,
        secrets.token_hex(16),
        secrets.token_hex(16),
    )
    return server, meeting


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def _own_address(towards: str) -> str | None:
    """The address under which this machine reaches another one, or its own; None when the name means nothing here."""
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, _, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of a datagram socket: looks at the routes, sends nothing
            own = probe.getsockname()[0]
            # Some systems give a host's own name a loopback address that means another machine elsewhere.
            return None if _is_loopback(own) else own
    return None


def _default_address() -> str | None:
    """This machine's address on the interface of its default route, as Linux lists it; None without one."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/net/route", encoding="ascii") as routes:
            rows = [line.split() for line in routes][1:]
        gateway = next((row[2] for row in rows if row[1] == "00000000" and row[2] != "00000000"), None)
        if gateway is not None:
            return _own_address(socket.inet_ntoa(int(gateway, 16).to_bytes(4, "little")))
    return None


def call(meeting: Meeting, rank: int) -> Link | None:
    """Connect to rank zero from another rank; None when none of its addresses can be reached."""
    for address in meeting.addresses:
        with contextlib.suppress(OSError, LinkClosed):
            connection = socket.create_connection((address, meeting.port), timeout=_CONNECT_SECONDS)
            link = Link(connection)
            try:
                connection.settimeout(_CONNECT_SECONDS)
                link.send_bytes(hello_line(meeting, rank))
                if _same(link.first_bytes(len(meeting.answered) + 1)[:-1], meeting.answered):
                    connection.settimeout(1.0)
                    return link
            except BaseException:
                link.close()
                raise
            link.close()
    return None


def hello_line(meeting: Meeting, rank: int) -> bytes:
    """The first line that a rank sends, without its end."""
    return f"{meeting.asked} {json.dumps({'rank': rank, 'host': os.uname().nodename})}".encode()


def _same(given: bytes, secret: str) -> bool:
    return hmac.compare_digest(given, secret.encode())


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; raises LinkClosed for anything else, however deep, long or badly encoded."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise LinkClosed("it does not speak our protocol")
    return message
