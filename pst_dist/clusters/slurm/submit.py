"""`pst submit slurm`: checks a job, then submits it.

`script` renders the job and `follow` reports its progress. Slurm itself accepts a job that can never start and lets it
wait forever: hence the checks.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pst_dist.clusters.jobs import Job, Launcher, Say, Status, Submission
from pst_dist.clusters.slurm import follow
from pst_dist.clusters.slurm.commands import ask, check_controller, comment_of, unreadable, whole
from pst_dist.clusters.slurm.script import SlurmRequest, read_words, render
from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, LockedError, PstError
from pst_dist.storage.manifest import read_manifest
from pst_dist.storage.mounts import OF_ONE_MACHINE, filesystem_of
from pst_dist.storage.outputs import check_output, is_batch_script, is_config, write_output

_MOVE = "move it away"


@dataclass(frozen=True)
class Partition:
    """One partition as `sinfo` reports it."""

    name: str
    default: bool
    up: bool
    nodes: int
    gpus: int
    """Most GPUs on any of its nodes."""


class Slurm(Launcher):
    """Training as a batch job, or as an array with one task per arm and seed."""

    # These check files of the config, which the nodes share with this machine; GPUs and packages differ on the nodes.
    checks = frozenset({"deepspeed", "student"})

    def parse(self, config: str, words: Sequence[str]) -> Submission:
        """The options of `script.read_words`, and the config."""
        request, overrides = read_words(words)
        return Submission(load_config(config, overrides), request)

    def render(self, submission: Submission) -> str:
        """The batch script."""
        return render(submission.request, submission.config, _folder(submission.config) / "config.yaml")

    def check(self, submission: Submission) -> None:
        """Check that Slurm answers and can ever start the job, that its data exist and its directory is not in use."""
        self.render(submission)  # refuses values that cannot be quoted
        check(submission.config, submission.request)

    def submit(self, submission: Submission, say: Say) -> Job:
        """Write the script and submit it."""
        number = submit(submission.config, submission.request, say=say)
        return Job(number, submitted=submitted(submission.config, submission.request, number))

    def find(self, name: str, words: Sequence[str]) -> Job:
        """By the job's number."""
        if not re.fullmatch(r"\d+(_\d+)?", name):
            raise ConfigError(f"{name!r} is not a Slurm job", "give its number, such as 1234 or 1234_0")
        check_controller()
        return Job(name)

    def status(self, job: Job) -> Status:
        """The states of its tasks; the exit code is that of the first task that failed."""
        return follow.status(job.name)

    def follow(self, job: Job, say: Say) -> int:
        """See `follow`."""
        return follow.follow(job.name, say=say)

    def look_again(self, job: Job) -> str:
        """By the job's number."""
        return follow.look_again(job.name)


LAUNCHER = Slurm()


def _folder(config: Config) -> Path:
    return Path(config.output_dir).absolute() / "slurm"


def check(config: Config, request: SlurmRequest) -> None:
    """Raises EnvironmentFault, ConfigError, InputError or LockedError when the job could not start or succeed."""
    check_controller()
    check_room(request, partitions())
    _check_inputs(config.model_copy(update={"arms": list(request.arms) or config.arms}))
    base = Path(config.output_dir).absolute()
    _check_shared(base, request)
    for number, comment in _own_jobs():
        if comment == comment_of(base):
            raise LockedError(
                f"job {number} already uses this directory",
                f"follow it: pst submit slurm --follow {number}",
                path=base,
            )


def submit(config: Config, request: SlurmRequest, *, say: Say) -> str:
    """Write config and script into `output_dir/slurm` and submit; returns the job's number.

    `say` gets the lines for the user. Raises EnvironmentFault when Slurm refuses, and then leaves nothing behind.
    """
    folder = _folder(config)
    base = folder.parent
    script = folder / "train.sbatch"
    text = render(request, config, folder / "config.yaml")
    check_output(script, is_batch_script, inside=base, remedy=_MOVE)
    write_output(folder / "config.yaml", dump_config(config), is_config, inside=base, remedy=_MOVE)
    write_output(script, text, is_batch_script, inside=base, remedy=_MOVE)
    for line in script.read_text("utf-8").splitlines():
        if line.startswith(("#SBATCH", "export PST_", "export DS_", "set -- ")):
            say(f"  {line}")
    say(f"script: {script}")
    try:
        number = ask("sbatch", "--parsable", str(script)).partition(";")[0].strip()
    except PstError:
        # A refused job leaves nothing behind; the log folder of earlier ones stays.
        script.unlink()
        (folder / "config.yaml").unlink()
        for place in (folder, base):
            with contextlib.suppress(OSError):
                place.rmdir()
        raise
    return number


def submitted(config: Config, request: SlurmRequest, number: str) -> str:
    """The line that announces the job; the caller prints it once it is ready to handle a stop signal."""
    folder = _folder(config)
    return f"job {number}: submitted; log: {folder}/{number}{'_*' if request.tasks else ''}.log"


def check_room(request: SlurmRequest, partitions: Sequence[Partition]) -> None:
    """Raises ConfigError when the partition can never run the job: Slurm would let it wait forever."""
    names = ", ".join(partition.name for partition in partitions)
    wanted = request.options.get("partition")
    if wanted is None:
        found = next((partition for partition in partitions if partition.default), None)
        if found is None:
            raise ConfigError("this cluster has no default partition", f"give partition=, one of {names}")
    else:
        # Of several partitions Slurm uses the first that is free; one that fits is enough.
        choice = [partition for partition in partitions if partition.name in wanted.split(",")]
        if not choice:
            raise ConfigError(f"there is no partition {wanted!r}", f"give partition=, one of {names}")
        found = max(choice, key=lambda partition: (partition.gpus >= request.gpu_count, partition.nodes))
    if not found.up:
        raise ConfigError(f"partition {found.name} is down", f"choose from {names}")
    if request.nodes > found.nodes:
        raise ConfigError(
            f"nodes={request.nodes}, but partition {found.name} has {found.nodes}",
            f"ask for at most {found.nodes}, or another partition of {names}",
        )
    if request.gpu_count > found.gpus:
        has = f"at most {found.gpus} per node" if found.gpus else "none"
        raise ConfigError(
            f"gpus={request.gpus}, but partition {found.name} has {has}",
            "leave gpus= out for CPU ranks (ranks=2), or give another partition" if not found.gpus else "ask for fewer",
        )


def partitions() -> list[Partition]:
    """All partitions; raises EnvironmentFault when sinfo fails or its answer cannot be read."""
    return read_partitions(ask("sinfo", "--noheader", "--format=%R|%P|%a|%D|%G"))


def read_partitions(text: str) -> list[Partition]:
    """The partitions in sinfo's answer, the rows of one added up: there is a row for each kind of node."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        if line.count("|") < 4:
            raise unreadable("sinfo", line)
        name, starred, state, nodes, gres = line.split("|", 4)
        before = found.get(name)
        found[name] = Partition(
            name,
            starred.endswith("*"),
            state == "up",
            whole(nodes, "sinfo") + (before.nodes if before else 0),
            max(gpus_of(gres), before.gpus if before else 0),
        )
    return list(found.values())


def gpus_of(gres: str) -> int:
    """Number of GPUs in a node's generic resources: `gpu:a100:8(S:0-1),gpu:h100:4,nvme:1` -> 12."""
    total = 0
    for entry in gres.split(","):  # cut inside (IDX:0,2) too, whose parts are no gpu
        kind, *parts = entry.partition("(")[0].strip().split(":")
        if kind == "gpu" and parts and parts[-1].isdecimal():
            total += whole(parts[-1], "sinfo")
    return total


def _check_inputs(config: Config) -> None:
    """Raises InputError when shards or embeddings are missing: better now than after a night in the queue."""
    from pst_dist.data.shards import ShardSet
    from pst_dist.embedding.targets import needs_embeddings

    run = run_dir(config)
    if run.remote is not None:
        for kind in ("shards", "embeddings") if needs_embeddings(config) else ("shards",):
            if run.remote.child(kind).manifest(kind) is None:
                raise InputError(f"no {kind} here", "run `pst shard` and `pst embed` first", path=run.remote.url)
        return
    ShardSet.open(run.shards, verify=False)
    if needs_embeddings(config) and read_manifest(run.embeddings, "embeddings") is None:
        raise InputError("no embeddings here", "run `pst embed` first", path=run.embeddings)


def _check_shared(folder: Path, request: SlurmRequest) -> None:
    """Raises EnvironmentFault when a folder is on an in-memory file system of this machine and jobs run elsewhere.

    Other local disks may be exported to the nodes; only the nodes can tell, and the script checks there.
    """
    here = {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"}
    partition = request.options.get("partition")
    hosts = ask("sinfo", "--noheader", "--Node", "--format=%n", *([f"--partition={partition}"] if partition else []))
    if set(hosts.split()) <= here:
        return
    kind = filesystem_of(folder, Path("/proc/self/mounts").read_text())
    if kind in OF_ONE_MACHINE:
        raise EnvironmentFault(
            f"this is a {kind} that only this machine sees, and jobs run on others",
            "set output_dir to a directory on a shared file system (NFS, Lustre, …)",
            path=folder,
        )


def _own_jobs() -> list[tuple[str, str]]:
    """Number and comment of this user's waiting and running jobs."""
    return read_own_jobs(ask("squeue", "--me", "--noheader", "--format=%i|%k"))


def read_own_jobs(text: str) -> list[tuple[str, str]]:
    """Number and comment in each line of squeue's answer."""
    rows = text.splitlines()
    return [(number, comment) for number, _, comment in (row.strip().partition("|") for row in rows)]
