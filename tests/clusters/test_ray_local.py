"""The local Ray cluster that a command starts for itself: nobody else on the machine or the network can reach it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, stat
from pathlib import Path

from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.config.schema import RayConfig


def family():
    found, waiting = set(), [os.getpid()]
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            waiting += map(int, (task / "children").read_text().split())
    return found


def listening(pids):
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(descriptor))
            except OSError:
                pass
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                found.append(words[1].rpartition(":")[0])
    return found


with ray_cluster(RayConfig()) as ray:
    answer = ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60)
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    print(json.dumps({
        "answer": answer,
        "addresses": listening(family()),
        "modes": {str(path): stat.S_IMODE(path.stat().st_mode) for path in (session, *list(session.parents)[:2])},
    }))
print(json.dumps(session.exists()))
"""
LOOPBACK = {
    "0100007F",
    "00000000000000000000000001000000",
    "0000000000000000FFFF00000100007F",
}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as /proc/net/tcp and tcp6 write them."""


@pytest.mark.ray
def test_a_local_cluster_listens_on_loopback_alone_and_its_files_are_closed_to_others():
    pytest.importorskip("ray", reason="needs ray")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen, left = map(json.loads, done.stdout.splitlines()[-2:])
    assert seen["answer"] == 42
    assert len(seen["addresses"]) >= 4 and set(seen["addresses"]) <= LOOPBACK, seen["addresses"]
    assert len(seen["modes"]) == 3 and set(seen["modes"].values()) == {0o700}, seen["modes"]
    assert left is False, "nothing stays"
