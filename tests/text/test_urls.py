"""A token follows a redirect to its own origin only."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

from pst_dist.clusters.ray import dashboard

CANARY = "canary-3f9a71"


@contextmanager
def server(answer) -> Iterator[tuple[str, list[str | None]]]:
    """A web server on loopback; yields its address and the Authorization header of each request that it gets."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}", seen
    finally:
        found.shutdown()
        found.server_close()
        thread.join()


VERSION = b'{"ray_version": "2.60.0"}'


def test_a_redirect_to_another_origin_does_not_get_the_token():
    with (
        server(lambda path: (200, {}, VERSION)) as (other, seen_there),
        server(lambda path: (302, {"Location": f"{other}/version"}, b"")) as (head, seen),
    ):
        assert dashboard.check_dashboard(head, CANARY) == "2.60.0"
        assert seen == [f"Bearer {CANARY}"] and seen_there == [None]


def test_a_redirect_on_the_same_origin_keeps_the_token():
    def answer(path):
        return (302, {"Location": "/v2"}, b"") if path == "/api/version" else (200, {}, VERSION)

    with server(answer) as (head, seen):
        assert dashboard.check_dashboard(head, CANARY) == "2.60.0"
        assert seen == [f"Bearer {CANARY}"] * 2
