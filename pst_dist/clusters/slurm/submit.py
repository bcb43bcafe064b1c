"""`pst submit slurm`: checks a run, then submits its jobs, each after the one before it.

`render` makes the scripts, and `follow` reports the jobs' progress. Slurm itself accepts a job that can never start and
lets it wait forever: hence the checks.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from pst_dist.clusters.jobs import Job, Launcher, Say, Status, Submission
from pst_dist.clusters.slurm import follow
from pst_dist.clusters.slurm.checks import check_ranks, check_time, check_torch
from pst_dist.clusters.slurm.commands import ask, check_controller, comment_of, run
from pst_dist.clusters.slurm.partitions import check_room, partitions
from pst_dist.clusters.slurm.render import Stage, render, stages
from pst_dist.clusters.slurm.script import SlurmRequest, read_words
from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, LockedError, PstError
from pst_dist.storage.manifest import read_manifest
from pst_dist.storage.mounts import OF_ONE_MACHINE, filesystem_of
from pst_dist.storage.outputs import check_output, is_batch_script, is_config, write_output

_MOVE = "move it away"


class Slurm(Launcher):
    """A run as batch jobs, or its training alone; with an array with one task per arm and seed."""

    # The nodes share the config's files and this Python with this machine; GPUs, cores and memory differ.
    checks = frozenset({"packages", "deepspeed", "student", "encoder"})

    def parse(self, config: str, words: Sequence[str]) -> Submission:
        """The options of `script.read_words`, and the config."""
        request, overrides = read_words(words)
        return Submission(load_config(config, overrides), request)

    def render(self, submission: Submission) -> str:
        """The batch scripts, one after the other; before each but the first, what its job waits for."""
        config, request = submission.config, submission.request
        texts, before = [], None
        for stage in stages(request, config):
            if before is not None:
                texts.append(f"\n# ---- next job: sbatch {' '.join(_after(before, stage, 'PREVIOUS_JOB'))}\n")
            texts.append(render(request, config, _folder(config) / "config.yaml", stage))
            before = stage
        return "".join(texts)

    def check(self, submission: Submission) -> None:
        """Check that Slurm answers and can ever start the jobs, that they can succeed, and that no other is at work."""
        self.render(submission)  # refuses values that cannot be quoted
        check(submission.config, submission.request)

    def submit(self, submission: Submission, say: Say) -> Job:
        """Write the scripts and submit them."""
        numbers = submit(submission.config, submission.request, say=say)
        return Job(",".join(numbers), submitted=submitted(submission.config, submission.request, numbers))

    def find(self, name: str, words: Sequence[str]) -> Job:
        """By the job's number, or the numbers of several with commas."""
        if not re.fullmatch(r"\d+(_\d+)?(,\d+(_\d+)?)*", name):
            raise ConfigError(f"{name!r} is not a Slurm job", "give its number, such as 1234, 1234_0 or 1234,1235,1236")
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
    check_ranks(config, request)
    check_time(request, None)
    check_controller()
    found = check_room(request, partitions())
    check_time(request, found)
    check_torch(request)
    if request.verb == "train":
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


def submit(config: Config, request: SlurmRequest, *, say: Say) -> list[str]:
    """Write config and scripts into `output_dir/slurm` and submit; returns the jobs' numbers, in order.

    `say` gets the lines for the user. Raises EnvironmentFault when Slurm refuses one, and then leaves nothing behind.
    """
    folder = _folder(config)
    base = folder.parent
    jobs = stages(request, config)
    scripts = {
        folder / f"{stage.name}.sbatch": render(request, config, folder / "config.yaml", stage) for stage in jobs
    }
    for script in scripts:
        check_output(script, is_batch_script, inside=base, remedy=_MOVE)
    write_output(folder / "config.yaml", dump_config(config), is_config, inside=base, remedy=_MOVE)
    for script, text in scripts.items():
        write_output(script, text, is_batch_script, inside=base, remedy=_MOVE)
        for line in text.splitlines():
            if line.startswith(("#SBATCH", "export PST_", "export DS_", "set -- ")):
                say(f"  {line}")
        say(f"script: {script}")
    numbers: list[str] = []
    try:
        before = None
        for script, stage in zip(scripts, jobs, strict=True):
            after: list[str] = [] if before is None else _after(before, stage, numbers[-1])
            numbers.append(ask("sbatch", "--parsable", *after, str(script)).partition(";")[0].strip())
            before = stage
    except PstError:
        # A refused submission leaves nothing behind; the log folder of earlier ones stays.
        if numbers:
            run("scancel", *numbers)
        for path in (*scripts, folder / "config.yaml"):
            path.unlink()
        for place in (folder, base):
            with contextlib.suppress(OSError):
                place.rmdir()
        raise
    return numbers


def _after(before: Stage, stage: Stage, job: str) -> list[str]:
    """sbatch's options that make `stage` wait for the job of the stage before it."""
    # A task waits for the same task of the array before it. Slurm removes a job whose predecessor failed.
    kind = "aftercorr" if before.is_array and stage.is_array else "afterok"
    return [f"--dependency={kind}:{job}", "--kill-on-invalid-dep=yes"]


def submitted(config: Config, request: SlurmRequest, numbers: Sequence[str]) -> str:
    """The lines that announce the jobs; the caller prints them once it is ready to handle a stop signal."""
    folder = _folder(config)
    lines = []
    for index, (number, stage) in enumerate(zip(numbers, stages(request, config), strict=True)):
        what = "" if request.verb == "train" else f" ({' '.join(stage.verbs)})"
        after = f" after {numbers[index - 1]}" if index else ""
        log = f"{folder}/{number}{'_*' if stage.is_array else ''}.log"
        lines.append(f"job {number}{what}: submitted{after}; log: {log}")
    return "\n".join(lines)


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

    Other local disks may be exported to the nodes; only the nodes can know this, so the script checks there.
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
