"""An HTTP proxy on loopback in front of a real server, which fails in the ways that real endpoints do.

    with faulty_proxy(server_url, lambda number, body: status(429, retry_after=1) if number < 3 else None) as proxy:
        ...  # ask proxy.url; proxy.seen has every request that arrived

The function gets the request's number, from 0, and its JSON; it returns a fault, or None to pass the request on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What happens instead of, or with, the server's reply."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay_seconds: float = 0
    """Wait so long before anything is done."""
    cut: bool = False
    """Send half of the server's reply and close."""
    drop: bool = False
    """Close without a reply, after the server has worked."""


def status(code: int, message: str = "no", *, retry_after: object = None, **headers: str) -> Fault:
    """An error in the form that OpenAI's interface has."""
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    return Fault(
        code, {"content-type": "application/json", **headers}, json.dumps({"error": {"message": message}}).encode()
    )


def says(text: str | None, finish: str = "stop", usage: tuple[int, int] | None = (10, 5), **message: Any) -> Fault:
    """A chat reply with this text."""
    said = {"role": "assistant", "content": text, **message}
    body: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": said}],
    }
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Fault(200, {"content-type": "application/json"}, json.dumps(body).encode())


def raw(body: bytes, code: int = 200, content_type: str = "application/json") -> Fault:
    """Any bytes."""
    return Fault(code, {"content-type": content_type}, body)


@dataclass
class Seen:
    """One request that arrived."""

    path: str
    headers: dict[str, str]
    body: Any


Choose = Callable[[int, Any], Fault | None]


class Proxy:
    """A running proxy."""

    def __init__(self, backend: str, choose: Choose) -> None:
        self.backend, self.choose = urllib.parse.urlsplit(backend), choose
        self.seen: list[Seen] = []
        self.url = ""
        self.in_flight = self.most_in_flight = 0

    @property
    def endpoint(self) -> str:
        """The base URL for clients."""
        return self.url + "/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
            }
            content = await reader.readexactly(int(headers.get("content-length", 0)))
            number = len(self.seen)
            body = json.loads(content) if content else None
            self.seen.append(Seen(first.split()[1], headers, body))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await self._answer(number, first, headers, content, body, writer)
            finally:
                self.in_flight -= 1
        with contextlib.suppress(ConnectionError):
            writer.close()

    async def _answer(self, number, first, headers, content, body, writer) -> None:
        fault = self.choose(number, body)
        if fault is not None:
            await asyncio.sleep(fault.delay_seconds)
        if fault is not None and fault.status is not None:
            reply = _response(fault)
        else:
            reply = await self._passed_on(first, headers, content)
        if fault is not None and fault.drop:
            return
        writer.write(reply[: len(reply) // 2] if fault is not None and fault.cut else reply)
        await writer.drain()

    async def _passed_on(self, first: str, headers: dict[str, str], content: bytes) -> bytes:
        kept = {**headers, "host": self.backend.netloc, "connection": "close"}
        head = "\r\n".join([first, *(f"{name}: {value}" for name, value in kept.items())])
        try:
            reader, writer = await asyncio.open_connection(self.backend.hostname, self.backend.port)
            writer.write(head.encode("latin-1") + b"\r\n\r\n" + content)
            await writer.drain()
            reply = await reader.read(-1)
            writer.close()
        except OSError:
            return b""  # the server is gone: so is the connection
        return reply


def _response(fault: Fault) -> bytes:
    lines = [f"HTTP/1.1 {fault.status} X", f"content-length: {len(fault.body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fault.headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + fault.body


@contextlib.contextmanager
def faulty_proxy(backend: str, choose: Choose = lambda number, body: None) -> Iterator[Proxy]:
    """A proxy in front of `backend`, in a thread; `proxy.choose` may be changed at any time."""
    proxy = Proxy(backend, choose)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
