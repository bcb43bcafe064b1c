"""A web server on loopback whose files a test can change, refuse and cut off."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Web:
    """The state of the server."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Name -> content."""
    dates: dict[str, str] = field(default_factory=dict)
    """Name -> Last-Modified; a file without a date has an ETag instead."""
    chunked: bool = False
    """Whether files are sent in one chunk of HTTP, without their length."""
    silent: bool = False
    """Whether neither is said."""
    redirect: str | None = None
    """The address of another server to which all requests are sent."""
    status: int | None = None
    """The answer to everything, if set."""
    cut_after: int | None = None
    """The bytes after which a download is cut off."""
    on_get: Callable[[], None] = lambda: None
    """Called after a download."""
    requests: list[str] = field(default_factory=list)
    """`GET name` and so on, in order."""
    authorizations: set[str | None] = field(default_factory=set)

    def downloads(self) -> list[str]:
        """The names of the files that were fetched."""
        return [line[4:] for line in self.requests if line.startswith("GET ")]


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        content = self._answer()
        if content is not None:
            whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if self.web.chunked else content
            self.wfile.write(whole[: self.web.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.web.on_get()

    def _answer(self) -> bytes | None:
        web, name = self.web, self.path.partition("?")[0].lstrip("/")
        web.requests.append(f"{self.command} {name}")
        web.authorizations.add(self.headers.get("Authorization"))
        if web.redirect is not None:
            self.send_response(302)
            self.send_header("Location", f"{web.redirect}/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        content = web.files.get(name)
        status = web.status or (200 if content is not None else 404)
        self.send_response(status)
        if status != 200 or content is None:
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if web.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(content)))
        if name in web.dates:
            self.send_header("Last-Modified", web.dates[name])
        elif not web.silent:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.end_headers()
        return content


@contextlib.contextmanager
def web_server() -> Iterator[Web]:
    """Start a server in a thread of this process."""
    web = Web()
    handler = type("Handler", (_Handler,), {"web": web})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
