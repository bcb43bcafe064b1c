"""A real Ray head with dashboard and token for tests, in a home and a temporary folder of its own.

Every process that it starts, or that is started through `environment`, carries a mark by which it is found again:
other clusters on this machine are neither met nor stopped.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ports import free_ports

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RayHead:
    """A running head."""

    dashboard: str
    """`http://127.0.0.1:PORT`"""
    gcs_port: int
    client_port: int
    mark: str
    environment: dict[str, str]
    """For every process that works with it: home, token, mark."""

    def post(self, path: str) -> None:
        """An empty POST to the dashboard, with the token."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{self.dashboard}{path}", method="POST", headers={"Authorization": f"Bearer {token}"}
        )
        urllib.request.urlopen(request, timeout=60).read()

    def processes(self, title: str = "") -> list[int]:
        """Ids of the live processes of this head whose command line begins with `title`."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                marked = entry.name.isdigit() and f"PST_TEST_MARK={self.mark}".encode() in (
                    entry / "environ"
                ).read_bytes().split(b"\0")
                if marked and (entry / "cmdline").read_bytes().startswith(title.encode()):
                    found.append(int(entry.name))
        return found


def _light_python(folder: Path) -> Path:
    """An environment without packages of its own, which sees those of this one.

    For a job with pip packages Ray copies the environment that it runs in, which would be gigabytes.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (ours,), (theirs,) = ({Path(path) for path in site.getsitepackages()}, folder.glob("lib/python*/site-packages"))
    (theirs / "rest.pth").write_text(f"import site; site.addsitedir({str(ours)!r})\n")
    return folder / "bin" / "python"


@contextlib.contextmanager
def ray_head(folder: Path, *, cpus: int) -> Iterator[RayHead]:
    """Start a head below `folder` and end it, with all that belongs to it."""
    home = folder / "home"
    home.mkdir(parents=True)
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    mark = uuid.uuid4().hex
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PST_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    temporary = Path(tempfile.mkdtemp(prefix="pst-rt-", dir="/tmp"))  # sockets lie in it: at most 107 bytes of path
    python = _light_python(folder / "python")
    environment |= {
        "HOME": str(home),
        "PATH": f"{python.parent}:{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PST_TEST_MARK": mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray hears of metrics and checkpoints when it looks.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less for each start of ranks
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    ports = free_ports(4)
    head = RayHead(f"http://127.0.0.1:{ports[1]}", ports[0], ports[2], mark, environment)
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}"]
    command += [f"--ray-client-server-port={ports[2]}", f"--dashboard-agent-listen-port={ports[3]}"]
    command += [f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=100000000"]
    log = folder / "head.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        _wait_for_dashboard(head, process, log)
        yield head
    finally:
        process.terminate()
        deadline = time.monotonic() + 5  # some never go by themselves
        while head.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in head.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_for_dashboard(head: RayHead, process: subprocess.Popen, log: Path) -> None:
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    # Answered by the agent of a node, so that node can take a job too.
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(request, timeout=5).status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"no Ray head came up:\n{log.read_text()[-3000:]}")
