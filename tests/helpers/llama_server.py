"""A real llama.cpp server on loopback, in a process of its own, from the package xllamacpp.

    with llama_server(Path("student.gguf"), slots=4) as url:
        httpx.post(f"{url}/v1/chat/completions", json={...})

Run as a program it serves until its standard input closes, so it never outlives the test that started it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def llama_server(file: Path, *, slots: int = 1, context: int = 1024, threads: int = 1) -> Iterator[str]:
    """Yield the URL of a server of `file` with `slots` slots of `context` tokens each; raises RuntimeError."""
    words = [sys.executable, __file__, str(file), str(slots), str(context), str(threads)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert server.stdin is not None and server.stdout is not None
        # Closing its input ends a server that hangs while it loads, and the line below then ends the wait.
        timer = threading.Timer(120, server.kill)
        timer.start()
        try:
            line = next((line for line in server.stdout if line.startswith("http")), "")
            timer.cancel()
            if not line:
                log.seek(0)
                raise RuntimeError("the server did not start: " + log.read().decode(errors="replace")[-2000:])
            yield line.strip()
        finally:
            timer.cancel()
            server.stdin.close()
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _serve(file: str, slots: int, context: int, threads: int) -> None:
    import os

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:5]))
