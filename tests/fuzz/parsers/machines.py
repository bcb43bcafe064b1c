"""Parsers of what clusters and machines print, and of what they send each other."""

from __future__ import annotations

import contextlib
from pathlib import Path

from .registry import parser, put


@parser(
    "scontrol",
    "JobId=12 JobName=pst-x\n   UserId=me(1000) JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0\n"
    "   NodeList=node[1-2]\n   Command=/x/50%/slurm/train.sbatch\n   StdOut=/x/slurm/12.log\n\n"
    "JobId=13 ArrayJobId=13 ArrayTaskId=1-5%2 JobState=FAILED ExitCode=0:9 Reason=NonZeroExitCode NodeList=(null)\n"
    "   StdOut=/x y/%A_%a.log\n",
)
def _scontrol(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.follow import _by_number, read_jobs

    tasks = read_jobs(content.decode("utf-8", "replace"))
    ended = [task.result for task in tasks if task.ended]
    return [task.line for task in sorted(tasks, key=lambda task: _by_number((task.number, task)))], ended


@parser(
    "sinfo",
    "gpu|gpu*|up|4|2-00:00:00|n/a|gpu:a100:8(S:0-1),gpu:h100:4\ncpu|cpu|down|12|infinite|1:00|(null)\ngpu|gpu*|up|2|30|5:00|gpu:2\n",
)
def _sinfo(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.partitions import check_room, read_partitions
    from pst_dist.clusters.slurm.script import SlurmRequest

    return check_room(SlurmRequest(nodes=1, gpus="8"), read_partitions(content.decode("utf-8", "replace")))


@parser("squeue", "12|pst /x/runs/demo\n13_4|(null)\n", weight=0.5)
def _squeue(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.submit import read_own_jobs

    return read_own_jobs(content.decode("utf-8", "replace"))


@parser(
    "nvidia-smi", "0, NVIDIA H200, 143771, 1, 9.0, 570.1, [N/A], 0\n1, NVIDIA H200, 143771, 1, 9.0, 570.1, Enabled, 2\n"
)
def _nvidia(content: bytes, folder: Path) -> object:
    from pst_dist.diagnostics.machine.facts import read_gpus

    return read_gpus(content.decode("utf-8", "replace"))


@parser("mounts", "/dev/sda / ext4 rw 0 0\ntmpfs /tmp\\040x tmpfs rw 0 0\nnfs:/a /scratch nfs4 rw 0 0\n", weight=0.3)
def _mounts(content: bytes, folder: Path) -> object:
    from pst_dist.storage.mounts import filesystem_of

    return filesystem_of(folder, content.decode("utf-8", "replace"))


@parser("ray dashboard", {"ray_version": "2.50.0", "ray_commit": "x", "session_name": "s"}, weight=0.5)
def _dashboard(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.ray.dashboard import read_version

    return read_version(content, "http://127.0.0.1:8265")


@parser("peer hello", {"rank": 1, "host": "node-1"})
def _peer(content: bytes, folder: Path) -> object:
    from pst_dist.distributed.peer_link import LinkClosed, _parsed

    with contextlib.suppress(LinkClosed):  # the watcher's own signal
        return _parsed(content)
    return None


_NODE = {
    "kind": "pst doctor",
    "host": "a",
    "python": "3.11.7",
    "pst_dist": "0.1",
    "code": "0f",
    "packages": {"torch": "2.9", "ray": "2.50"},
    "torch_cuda": "13.0",
    "nccl": None,
    "gpus": [{"index": 0, "name": "H200", "memory_mib": 143771, "used_mib": 1, "capability": "9.0"}],
    "driver": "570",
    "cores": 8,
}


@parser("doctor report", _NODE, {**_NODE, "host": "b", "gpus": []})
def _doctor(content: bytes, folder: Path) -> object:
    from pst_dist.diagnostics.machine.facts import differences, read_report

    reports = [read_report(put(folder, "a.json", content)), _NODE]
    return [found.line() for found in differences(reports)]
