"""A real S3 server on loopback, for tests of data in object storage."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class S3Server:
    """A running server: its client, and what was asked of it."""

    def __init__(self, system: Any, log: Path) -> None:
        self.system = system
        self._log = log

    def requests(self) -> list[tuple[str, str]]:
        """(method, path without its query) of each request so far."""
        return re.findall(r'"([A-Z]+) ([^ ?"]+)[^"]* HTTP', self._log.read_text())

    def downloads(self, since: int = 0) -> list[str]:
        """The objects that were fetched, after the first `since` requests."""
        return [path for method, path in self.requests()[since:] if method == "GET" and path.count("/") > 1]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server and point this process's environment to it; skips the test where a package is missing."""
    for package in ("s3fs", "moto", "flask"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'pst-dist[dev]'")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = folder / "log"
    with log.open("w") as stream:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=stream, stderr=stream)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.1)
        import s3fs

        forget_stores()
        system = s3fs.S3FileSystem(use_listings_cache=False)
        system.mkdir("data")
        yield S3Server(system, log)
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        forget_stores()


def forget_stores() -> None:
    """Let the next file system be made with the environment of now."""
    import s3fs

    from pst_dist.storage import object_store

    object_store._system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
