"""llama.cpp's own server of a GGUF file, from the package xllamacpp, in a process of its own.

    with serving(Path("student.gguf"), slots=4, context=512) as url:
        httpx.post(f"{url}/v1/chat/completions", json={...})

As a program, where no `llama-server` is installed: python -m pst_dist.publish.gguf.server student.gguf --port 8080
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from pst_dist.errors import EnvironmentFault, first_line

PACKAGE = "xllamacpp"
_LOADING_SECONDS, _ENDING_SECONDS = 600, 10


def engine_version() -> str | None:
    """The version of xllamacpp; None when it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    from importlib.metadata import version

    return version(PACKAGE)


def server_command(file: Path, *, slots: int, context: int) -> list[str]:
    """The command of a server that prints its URL and ends when its standard input is closed.

    `slots` requests are answered at the same time, each with room for `context` tokens.
    """
    words = [str(file), "--slots", str(slots), "--context", str(context), "--threads", str(_threads())]
    return [sys.executable, "-m", __name__, *words, "--with-parent"]


@contextlib.contextmanager
def serving(file: Path, *, slots: int, context: int) -> Iterator[str]:
    """The URL of a server of `file`; it ends with the block, and with this process.

    Raises EnvironmentFault with llama.cpp's own reason when it does not start.
    """
    command = server_command(file, slots=slots, context=context)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert server.stdin is not None and server.stdout is not None
        timer = threading.Timer(_LOADING_SECONDS, server.kill)
        timer.start()
        try:
            address = next((line.strip() for line in server.stdout if line.startswith("http")), None)
            timer.cancel()
            if address is None:
                log.seek(0)
                raise EnvironmentFault(
                    f"llama.cpp does not serve this file: {_reason(log.read().decode(errors='replace'))}",
                    f"pip install -U {PACKAGE}, or use another program",
                    path=file.name,
                )
            yield address
        finally:
            timer.cancel()
            server.stdin.close()
            try:
                server.wait(timeout=_ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            server.stdout.close()


def _threads() -> int:
    """On a shared machine more threads than free cores make llama.cpp many times slower; torch's setting counts too."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


def _reason(log: str) -> str:
    """The first line of llama.cpp's log that reports an error, without its time stamp."""
    errors = [found[1] for line in log.splitlines() if (found := re.match(r"[\d.]+ E (.*)", line))]
    return (errors or log.splitlines()[-1:] or ["no reason given"])[0][:300]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}", description="Serve a GGUF file with llama.cpp until Ctrl-C."
    )
    parser.add_argument("file", help="the GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument("--slots", type=int, default=4, help="requests answered at the same time (%(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a prompt and its reply (%(default)s)")
    parser.add_argument("--threads", type=int, default=_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input is closed")
    return parser


def _check_port(host: str, port: int) -> None:
    """End the program if the port cannot be had: llama.cpp's server would wait for ever."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        sys.exit(f"pst: cannot listen on {host} port {port}: {first_line(error)}")


def main(words: list[str] | None = None) -> int:
    """Print the server's URL and serve."""
    given = _parser().parse_args(words)
    if engine_version() is None:
        sys.exit("pst: this needs llama.cpp: pip install 'pst-dist[llama-cpp]'")
    if not Path(given.file).is_file():
        sys.exit(f"pst: {given.file}: no such file")
    _check_port(given.host, given.port)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = given.file
    params.hostnames, params.port = [given.host], given.port
    params.n_parallel, params.n_ctx = given.slots, given.slots * given.context
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.exit(f"pst: {given.file}: llama.cpp does not serve it: {first_line(error)}; its log above says why")
    print(server.listening_address, flush=True)  # noqa: T201
    with contextlib.suppress(KeyboardInterrupt):
        if given.with_parent:
            sys.stdin.read()
        else:
            threading.Event().wait()
    os._exit(0)  # the server's own threads would keep the process alive


if __name__ == "__main__":
    main()
