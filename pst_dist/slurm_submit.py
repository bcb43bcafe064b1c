"""`pst submit slurm`: look before submitting, submit, follow. Everything that talks to Slurm, through its own commands.

What the job is comes from `slurm`; what happens inside it is the script's and `train`'s. Following reads what anyone
may read (`scontrol show job` and the log file), so it can be stopped and taken up again, also from another machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pst_dist.config import Config
from pst_dist.config_io import dump_config
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, LockedError, PstError
from pst_dist.rundir import run_dir
from pst_dist.slurm import SlurmRequest, render
from pst_dist.storage import read_manifest, write_text

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 20.0
"""A controller that is down is noticed within 9 s by Slurm's own commands, a missing slurm.conf only after 60."""
_SILENT_SECONDS = 600.0
"""How long a controller may be away while a job is followed; a restart takes a minute."""
_POLL_SECONDS = 10.0
"""The longest wait between two questions about a job; PST_SLURM_POLL_SECONDS sets another."""
_LOG_SECONDS = 0.5
_MEMORY_FILES = ("tmpfs", "ramfs", "overlay")
_ENDED = {
    "COMPLETED": 0,
    "FAILED": 1,
    "CANCELLED": 130,
    "OUT_OF_MEMORY": 137,
    "TIMEOUT": 75,
    "DEADLINE": 75,
    "NODE_FAIL": 75,
    "BOOT_FAIL": 75,
    "PREEMPTED": 75,
}
"""Last states of a job -> the exit code where the script itself left none; after 75 the same command goes on."""


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of one partition."""

    name: str
    default: bool
    up: bool
    nodes: int
    gpus: int
    """Most GPUs on one of its nodes."""


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array, as `scontrol show job` gives it."""

    number: str
    """`12`, or `12_3` in an array; `12_[1-5]` for tasks that all still wait."""
    state: str
    reason: str
    nodes: str
    restarts: int
    exit_code: int
    """Of the script; 128 + number after a signal."""
    output: Path

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in _ENDED

    @property
    def result(self) -> int:
        """The exit code of an ended task: the script's own, or what its last state means."""
        if self.state in ("COMPLETED", "FAILED"):
            return self.exit_code or _ENDED[self.state]
        return _ENDED[self.state]

    @property
    def line(self) -> str:
        """Its state in words."""
        where = f" on {self.nodes}" if self.nodes not in ("", "(null)") else ""
        if self.ended:
            return f"job {self.number}: {self.state.lower()}{where}, exit code {self.result}"
        why = f" ({self.reason})" if self.reason not in ("", "None", "(null)") else ""
        again = f", start {self.restarts + 1}" if self.restarts else ""
        return f"job {self.number}: {self.state.lower()}{where}{again}{why}"


def submit(config: Config, request: SlurmRequest, *, say: Callable[[str], None]) -> str:
    """Check, write config and script into `output_dir/slurm`, and submit; returns the job's number.

    `say` gets the lines that a person should see. Raises EnvironmentFault, ConfigError, InputError or LockedError,
    with nothing submitted, when the job could not start or could not work.
    """
    check_controller()
    check_room(request, _partitions())
    _check_inputs(config.model_copy(update={"arms": list(request.arms) or config.arms}))
    base = Path(config.output_dir).absolute()
    _check_shared(base, request)
    for number, comment in _own_jobs():
        if comment == f"pst {base}":
            raise LockedError(
                f"job {number} already works here", f"follow it: pst submit slurm --follow {number}", path=base
            )
    folder = base / "slurm"
    script = folder / "train.sbatch"
    write_text(folder / "config.yaml", dump_config(config))
    write_text(script, render(request, config, folder / "config.yaml"))
    for line in script.read_text("utf-8").splitlines():
        if line.startswith(("#SBATCH", "export PST_", "export DS_", "set -- ")):
            say(f"  {line}")
    say(f"script: {script}")
    try:
        number = _ask("sbatch", "--parsable", str(script)).partition(";")[0].strip()
    except PstError:
        # A refused job leaves nothing behind; the log folder of earlier ones stays.
        script.unlink()
        (folder / "config.yaml").unlink()
        for place in (folder, base):
            with contextlib.suppress(OSError):
                place.rmdir()
        raise
    say(f"job {number}: submitted; log: {folder}/{number}{'_*' if request.tasks else ''}.log")
    return number


def check_controller() -> None:
    """Raises EnvironmentFault when this machine has no Slurm or its controller does not answer."""
    for command in ("sbatch", "scontrol", "sinfo", "squeue"):
        if shutil.which(command) is None:
            raise EnvironmentFault(
                f"{command} is not on this machine's PATH",
                "run this where jobs are submitted, such as the cluster's login node; --dry-run only prints the script",
            )
    answer = _run("scontrol", "ping")
    # Every controller has a line of its own; one that is up is enough.
    if " is UP" not in answer.stdout:
        said = next((line for line in (answer.stderr + answer.stdout).splitlines() if line.strip()), "no answer")
        raise EnvironmentFault(
            f"Slurm's controller does not answer ({said.strip()[:160]})", "check `scontrol ping` and SLURM_CONF"
        )


def check_room(request: SlurmRequest, partitions: Sequence[Partition]) -> None:
    """Raises ConfigError when the partition cannot ever hold the job: Slurm would let it wait without end."""
    names = ", ".join(partition.name for partition in partitions)
    wanted = request.options.get("partition")
    if wanted is None:
        found = next((partition for partition in partitions if partition.default), None)
        if found is None:
            raise ConfigError("this cluster has no default partition", f"give partition=, one of {names}")
    else:
        # Slurm takes the first free one of several; each is looked at, and one that fits is enough.
        choice = [partition for partition in partitions if partition.name in wanted.split(",")]
        if not choice:
            raise ConfigError(f"there is no partition {wanted!r}", f"give partition=, one of {names}")
        found = max(choice, key=lambda partition: (partition.gpus >= request.gpu_count, partition.nodes))
    if not found.up:
        raise ConfigError(f"partition {found.name} is down", f"partitions: {names}")
    if request.nodes > found.nodes:
        raise ConfigError(
            f"nodes={request.nodes}, but partition {found.name} has {found.nodes}",
            f"ask for at most {found.nodes}, or another partition of {names}",
        )
    if request.gpu_count > found.gpus:
        has = f"at most {found.gpus} a node" if found.gpus else "none"
        raise ConfigError(
            f"gpus={request.gpus}, but partition {found.name} has {has}",
            "leave gpus= out for CPU ranks (ranks=2), or give another partition" if not found.gpus else "ask for less",
        )


def _partitions() -> list[Partition]:
    """All partitions, the rows of one added up: sinfo gives a row for each kind of node."""
    found: dict[str, Partition] = {}
    for line in _ask("sinfo", "--noheader", "--format=%R|%P|%a|%D|%G").splitlines():
        name, starred, state, nodes, gres = line.split("|", 4)
        before = found.get(name)
        found[name] = Partition(
            name,
            starred.endswith("*"),
            state == "up",
            int(nodes) + (before.nodes if before else 0),
            max(gpus_of(gres), before.gpus if before else 0),
        )
    return list(found.values())


def gpus_of(gres: str) -> int:
    """GPUs in a node's generic resources as Slurm writes them: `gpu:a100:8(S:0-1),gpu:h100:4,nvme:1` -> 12."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[^:,(]*[^:,(\d][^:,(]*)?:(\d+)", gres))


def _check_inputs(config: Config) -> None:
    """Raises InputError when shards or embeddings are not there: better here than after a night in the queue."""
    from pst_dist.pipeline import needs_embeddings
    from pst_dist.shards import ShardSet

    run = run_dir(config)
    ShardSet.open(run.shards, verify=False)
    if needs_embeddings(config) and read_manifest(run.embeddings, "embeddings") is None:
        raise InputError("no embeddings here", "run `pst embed` first", path=run.embeddings)


def _check_shared(folder: Path, request: SlurmRequest) -> None:
    """Raises EnvironmentFault when a folder lies on a file system of this machine's memory and jobs run elsewhere.

    Other local disks may be exported to the nodes: that is seen only there, where the script looks before it starts.
    """
    here = {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"}
    partition = request.options.get("partition")
    hosts = _ask("sinfo", "--noheader", "--Node", "--format=%n", *([f"--partition={partition}"] if partition else []))
    if set(hosts.split()) <= here:
        return
    kind = filesystem_of(folder, Path("/proc/self/mounts").read_text())
    if kind in _MEMORY_FILES:
        raise EnvironmentFault(
            f"this is a {kind} of this machine alone, and jobs run on others",
            "set output_dir to a directory on a shared file system (NFS, Lustre, …)",
            path=folder,
        )


def filesystem_of(folder: Path, mounts: str) -> str:
    """The type of the file system that holds a folder, by the text of /proc/self/mounts."""
    parts = folder.absolute().parts
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, place, found, *_ = line.split(" ")
        mounted = Path(place.replace("\\040", " ")).parts
        if parts[: len(mounted)] == mounted and len(mounted) >= best:
            best, kind = len(mounted), found
    return kind


def _own_jobs() -> list[tuple[str, str]]:
    """Number and comment of this user's jobs that wait or run."""
    rows = _ask("squeue", "--me", "--noheader", "--format=%i|%k").splitlines()
    return [(number, comment) for number, _, comment in (row.strip().partition("|") for row in rows)]


def follow(number: str, *, say: Callable[[str], None]) -> int:
    """Say each change of state and each line of the logs until the job has ended; returns its exit code.

    For an array that is the code of the first task, by number, that failed. Raises EnvironmentFault when the
    controller stays away or has forgotten the job; the job itself is never touched.
    """
    tasks: dict[str, Task] = {}
    logs: dict[Path, _Log] = {}
    slowest = float(os.environ.get("PST_SLURM_POLL_SECONDS", _POLL_SECONDS))
    heard, wait = time.monotonic(), min(1.0, slowest)
    while True:
        seen = _show(number)
        fresh: list[Task] = []
        if seen is not None:
            heard = time.monotonic()
            known = {task.number: task for task in seen}
            # What has ended is forgotten after some minutes (MinJobAge), while other tasks go on.
            gone = [task for name, task in tasks.items() if name not in known and not task.ended and "[" not in name]
            if gone or not (known or tasks):
                raise EnvironmentFault(f"Slurm knows no job {gone[0].number if gone else number}", "see `sacct`")
            fresh = [task for name, task in known.items() if name not in tasks or task.line != tasks[name].line]
            tasks = {name: task for name, task in tasks.items() if task.ended} | known
        elif time.monotonic() - heard > _SILENT_SECONDS:
            raise EnvironmentFault("Slurm's controller has been away for 10 minutes", _look_again(number))
        for line in (task.line for task in fresh if not task.ended):
            say(line)
        _read_logs(tasks, logs, say)
        for line in (task.line for task in fresh if task.ended):  # after its last words
            say(line)
        if seen is not None and tasks and all(task.ended for task in tasks.values()):
            return next((task.result for _, task in sorted(tasks.items(), key=_by_number) if task.result), 0)
        # Files may be looked at often; the controller, which serves everybody, is asked ever less.
        wait = min(1.0, slowest) if fresh else min(wait * 1.5, slowest)
        again = time.monotonic() + wait
        while time.monotonic() < again:
            time.sleep(_LOG_SECONDS)
            _read_logs(tasks, logs, say)


def _read_logs(tasks: dict[str, Task], logs: dict[Path, _Log], say: Callable[[str], None]) -> None:
    """Say what is new in the logs of all tasks that have started."""
    for task in tasks.values():
        if "[" not in task.number and str(task.output) not in ("", "/dev/null"):
            several = f"{task.number}: " if "_" in task.number else ""
            logs.setdefault(task.output, _Log(task.output, several)).read(say, last=task.ended)


def _by_number(item: tuple[str, Task]) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", item[0])]


def _look_again(number: str) -> str:
    return f"the job goes on; look again: pst submit slurm --follow {number}, end it: scancel {number}"


def stopped_following(number: str) -> str:
    """What to tell a person who pressed Ctrl-C."""
    return f"pst: no longer following job {number}: {_look_again(number)}"


class _Log:
    """A log file that grows, read line by line; it may not be there yet."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix, self._place = path, prefix, 0

    def read(self, say: Callable[[str], None], *, last: bool) -> None:
        """Say the whole lines that came since; with `last` also one without an end."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._place)
                fresh = stream.read()
        except OSError:
            return
        end = len(fresh) if last else fresh.rfind(b"\n") + 1
        self._place += end
        for line in fresh[:end].decode("utf-8", "replace").splitlines():
            say(self._prefix + line)


def _show(number: str) -> list[Task] | None:
    """The job's tasks; none when Slurm does not know it, None when the controller did not answer."""
    answer = _run("scontrol", "show", "job", number)
    if answer.returncode:
        return [] if "Invalid job id" in answer.stderr + answer.stdout else None
    return read_jobs(answer.stdout)


def read_jobs(text: str) -> list[Task]:
    """The tasks in the output of `scontrol show job`, which has a block of `Key=value` lines for each."""
    tasks = []
    for block in re.split(r"\n(?=JobId=)", text.strip()):
        values = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", block))
        output = re.search(r"^\s*StdOut=(.*)$", block, re.MULTILINE)  # a path may have blanks in it
        code, _, ending = values.get("ExitCode", "0:0").partition(":")
        number = values["JobId"]
        if "ArrayJobId" in values:
            index = values.get("ArrayTaskId", "")
            number = f"{values['ArrayJobId']}_{index if index.isdecimal() else f'[{index}]'}"
        tasks.append(
            Task(
                number=number,
                state=values["JobState"],
                reason=values.get("Reason", ""),
                nodes=values.get("NodeList", ""),
                restarts=int(values.get("Restarts", "0")),
                exit_code=int(code) or (128 + int(ending) if int(ending or 0) else 0),
                output=Path(output[1].strip() if output else ""),
            )
        )
    return tasks


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands, with a limit in time; silence counts as a failure."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: no answer in {_ANSWER_SECONDS:.0f} s")


def _ask(*command: str) -> str:
    """What a command printed; raises EnvironmentFault with its own last words when it fails."""
    answer = _run(*command)
    if answer.returncode:
        lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
        raise _refusal(command[0], lines[0] if lines else f"exit code {answer.returncode}")
    return answer.stdout


def _refusal(command: str, said: str) -> PstError:
    said = re.sub(rf"^{command}: (error: )?(Batch job submission failed: )?", "", said)
    return EnvironmentFault(f"{command} says: {said[:200]}", "ask for something else, or ask the cluster's keepers")
