"""`pst submit slurm`: check before submitting, then submit.

What the job is comes from `script`, what happens inside it is the script's and `train`'s, and `follow` reports how it
goes. Slurm itself accepts a job that can never start and lets it wait forever: hence the checks.
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
    """What `sinfo` says of one partition."""

    name: str
    default: bool
    up: bool
    nodes: int
    gpus: int
    """Most GPUs on one of its nodes."""


class Slurm(Launcher):
    """A training as a batch job, or as an array with a task for each arm and seed."""

    # The config's own files, which nodes see as this machine does; GPUs and packages are theirs.
    checks = frozenset({"deepspeed", "student"})

    def parse(self, config: str, words: Sequence[str]) -> Submission:
        """The words of `script.read_words`, and the config."""
        request, overrides = read_words(words)
        return Submission(load_config(config, overrides), request)

    def render(self, submission: Submission) -> str:
        """The batch script."""
        return render(submission.request, submission.config, _folder(submission.config) / "config.yaml")

    def check(self, submission: Submission) -> None:
        """Whether Slurm answers, could ever start the job, and the job would find its data and an unused directory."""
        self.render(submission)  # refuses what cannot be quoted
        check(submission.config, submission.request)

    def submit(self, submission: Submission, say: Say) -> Job:
        """Write the script and hand it in."""
        number = submit(submission.config, submission.request, say=say)
        return Job(number, submitted=submitted(submission.config, submission.request, number))

    def find(self, name: str, words: Sequence[str]) -> Job:
        """By the job's number."""
        if not re.fullmatch(r"\d+(_\d+)?", name):
            raise ConfigError(f"{name!r} is not a job of Slurm", "give its number, such as 1234 or 1234_0")
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
    """Raises EnvironmentFault, ConfigError, InputError or LockedError when the job could not start or not work."""
    check_controller()
    check_room(request, partitions())
    _check_inputs(config.model_copy(update={"arms": list(request.arms) or config.arms}))
    base = Path(config.output_dir).absolute()
    _check_shared(base, request)
    for number, comment in _own_jobs():
        if comment == comment_of(base):
            raise LockedError(
                f"job {number} already works here", f"follow it: pst submit slurm --follow {number}", path=base
            )


def submit(config: Config, request: SlurmRequest, *, say: Say) -> str:
    """Write config and script into `output_dir/slurm` and submit; returns the job's number.

    `say` gets the lines that a person should see. Raises EnvironmentFault when Slurm refuses; nothing is left then.
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
    """The line that says so; for the caller to say when it is ready to be told to stop."""
    folder = _folder(config)
    return f"job {number}: submitted; log: {folder}/{number}{'_*' if request.tasks else ''}.log"


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
    """GPUs in a node's generic resources as Slurm writes them: `gpu:a100:8(S:0-1),gpu:h100:4,nvme:1` -> 12."""
    total = 0
    for entry in gres.split(","):  # cut inside (IDX:0,2) too, whose parts are no gpu
        kind, *parts = entry.partition("(")[0].strip().split(":")
        if kind == "gpu" and parts and parts[-1].isdecimal():
            total += whole(parts[-1], "sinfo")
    return total


def _check_inputs(config: Config) -> None:
    """Raises InputError when shards or embeddings are not there: better here than after a night in the queue."""
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
    """Raises EnvironmentFault when a folder lies on a file system of this machine's memory and jobs run elsewhere.

    Other local disks may be exported to the nodes: that is seen only there, where the script looks before it starts.
    """
    here = {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"}
    partition = request.options.get("partition")
    hosts = ask("sinfo", "--noheader", "--Node", "--format=%n", *([f"--partition={partition}"] if partition else []))
    if set(hosts.split()) <= here:
        return
    kind = filesystem_of(folder, Path("/proc/self/mounts").read_text())
    if kind in OF_ONE_MACHINE:
        raise EnvironmentFault(
            f"this is a {kind} of this machine alone, and jobs run on others",
            "set output_dir to a directory on a shared file system (NFS, Lustre, …)",
            path=folder,
        )


def _own_jobs() -> list[tuple[str, str]]:
    """Number and comment of this user's jobs that wait or run."""
    return read_own_jobs(ask("squeue", "--me", "--noheader", "--format=%i|%k"))


def read_own_jobs(text: str) -> list[tuple[str, str]]:
    """Number and comment in each line of squeue's answer."""
    rows = text.splitlines()
    return [(number, comment) for number, _, comment in (row.strip().partition("|") for row in rows)]
