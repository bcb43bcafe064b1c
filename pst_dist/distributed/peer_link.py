"""The connection between a rank's watcher and rank zero's: short JSON lines over TCP, and how the two find each other.

Anyone on the network can connect, so a connection must authenticate first: its first bytes must be a secret that the
ranks shared through the process group, compared as bytes and in constant time. Only what follows is parsed, as JSON
and never unpickled. An unauthenticated connection may send `_HELLO_BYTES` and stay a few seconds, and their number is
limited. `peer_messages` defines what the lines mean, `peer_verdict` who is lost.
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
"""How long a peer's kernel may leave our bytes unacknowledged. The kernel of a stopped process still acknowledges them;
a machine without power or network does not."""
STRANGERS = 64
"""Limit of unauthenticated connections; a further one replaces the oldest."""
HELLO_SECONDS = 10.0
"""How long a connection may take to authenticate."""
_HELLO_BYTES = 512
"""Size limit of the first line: the secret, a rank and a host name."""
_LONGEST_LINE = 4096
_CONNECT_SECONDS = 5.0


class LinkClosed(Exception):
    """The connection has ended; the message says how."""


@dataclass(frozen=True)
class Meeting:
    """Where rank zero listens and how both sides authenticate; sent through the process group."""

    addresses: tuple[str, ...]
    """Addresses by which other hosts may reach rank zero, best first."""
    port: int
    host: str
    """Rank zero's host name, for people."""
    asked: str
    """Secret that a connecting rank sends."""
    answered: str
    """Secret that rank zero sends in return."""


@dataclass(frozen=True)
class Hello:
    """The rank and host of an authenticated connection."""

    rank: int
    host: str


class Link:
    """One connection that sends and receives complete lines."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.since = time.monotonic()
        self._rest = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(UNANSWERED_SECONDS * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        # A line is small and the buffer large: a send blocks only when the peer is long gone.
        connection.settimeout(1.0)

    def send(self, message: dict[str, Any]) -> None:
        """Send one line; raises LinkClosed."""
        self.send_bytes(json.dumps(message).encode())

    def send_bytes(self, line: bytes) -> None:
        """Send one line unchanged; raises LinkClosed."""
        try:
            self.socket.sendall(line + b"\n")
        except OSError as error:
            raise LinkClosed("connection closed") from error

    def greet(self, meeting: Meeting, world_size: int) -> Hello | None:
        """Who is connecting; None while its first line is incomplete. Raises LinkClosed for anyone but a rank of ours.

        The line is `SECRET {"rank": 1, "host": "n1"}`. Bytes that do not begin with the secret are never parsed.
        """
        self._read(_HELLO_BYTES)
        line, ended, rest = self._rest.partition(b"\n")
        size = len(meeting.asked)
        if not ended and len(line) < size:
            return None  # compared only as a whole: an answer to each byte would let a stranger guess byte by byte
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
        """The lines that have arrived, waiting at most a second for the first; raises LinkClosed at the end."""
        self._read(65536)
        return self.waiting_lines()

    def waiting_lines(self) -> list[dict[str, Any]]:
        """The complete lines among the bytes read so far; raises LinkClosed for a line that is not in our protocol."""
        *lines, self._rest = self._rest.split(b"\n")
        if max(map(len, (*lines, self._rest))) > _LONGEST_LINE:
            raise LinkClosed("a line is too long")
        return [_parsed(line) for line in lines]

    def first_bytes(self, count: int) -> bytes:
        """Read exactly `count` bytes (rank zero's secret); raises LinkClosed when they do not arrive."""
        while len(self._rest) < count:
            before = len(self._rest)
            self._read(count - before)
            if len(self._rest) == before:  # nothing arrived in time
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
        """Close the connection."""
        self.socket.close()


def listen() -> tuple[socket.socket, Meeting]:
    """Rank zero's listening socket, and what the other ranks need to connect to it.

    It listens on one interface, that of MASTER_ADDR: loopback when the whole run is on this machine.
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
    # In a network with address translation, other hosts may reach this one only by name.
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
    """This machine's address on the route to a host, which may be itself; None when the name does not resolve."""
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, _, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # a datagram socket only looks up the route; it sends nothing
            own = probe.getsockname()[0]
            # Some systems resolve a host's own name to loopback, an address that other machines cannot use.
            return None if _is_loopback(own) else own
    return None


def _default_address() -> str | None:
    """This machine's address on the interface of its default route (from /proc/net/route); None without one."""
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
    """The first line that a rank sends, without its line ending."""
    return f"{meeting.asked} {json.dumps({'rank': rank, 'host': os.uname().nodename})}".encode()


def _same(given: bytes, secret: str) -> bool:
    return hmac.compare_digest(given, secret.encode())


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; raises LinkClosed for anything else, including deep nesting and bad encodings."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise LinkClosed("it does not speak our protocol")
    return message
