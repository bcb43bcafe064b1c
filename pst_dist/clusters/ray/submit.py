"""A run as a Ray job: its command, the files that are sent along, and the submission.

The job's command is `pst run my.yaml on=ray …` in a copy of the working directory: it shards, embeds with actors,
trains with workers, scores and reports, and Ray places each stage. `clusters.ray.words` reads the command line,
`clusters.ray.dashboard` contacts the dashboard.
"""

from __future__ import annotations

import logging
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.clusters.jobs import Job, Launcher, Say, Status, Submission
from pst_dist.clusters.ray import dashboard
from pst_dist.clusters.ray.dashboard import check_dashboard, connect, reached
from pst_dist.clusters.ray.runtime_env import check_runtime_env
from pst_dist.clusters.ray.token import find_token, prepare_token
from pst_dist.clusters.ray.words import RayRequest, read_words
from pst_dist.config.loading import load_config
from pst_dist.config.locate import locate_config, ready_made_configs
from pst_dist.config.run_dir import refuse_relative
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, EnvironmentFault, LockedError
from pst_dist.storage.object_store import is_url
from pst_dist.text.redaction import redact

EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    ".tox",
    "node_modules",
    "__pycache__",
    ".*_cache",
    "*.partial",
    "runs",
    "shards",
    "embeddings",
    "checkpoints",
    "tensorboard",
)
"""Patterns of files that are never sent, in .gitignore syntax; the directory's .gitignore and .rayignore add more."""
_OFFENDERS = 5


@dataclass(frozen=True)
class RayJob:
    """A job as it would be submitted."""

    request: RayRequest
    config: Config
    command: str
    excludes: tuple[str, ...]

    @property
    def runs_in_image(self) -> bool:
        """Whether the job runs in a container image, which gets no copy of a directory."""
        return "image_uri" in self.request.runtime_env or "container" in self.request.runtime_env

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment of the job's processes, in Ray's format."""
        copied = {"working_dir": str(self.request.folder), "excludes": list(self.excludes)}
        return {
            **self.request.runtime_env,
            **({} if self.runs_in_image else copied),
            # By default `ray job stop` waits three seconds, too short for a step and a checkpoint.
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", **self.request.environment},
        }

    def lines(self, files: dict[str, int]) -> list[str]:
        """The lines shown before submission; `files` maps each file that is sent to its size in bytes."""
        lines = [
            f"  cluster   {self.request.address}",
            f"  command   {self.command}",
            f"  output    {self.config.output_dir} (on a disk that all nodes share)",
            f"  sent      {len(files)} files, {_mib(sum(files.values()))} from {self.request.folder}"
            if not self.runs_in_image
            else "  sent      nothing: Ray gives an image no copy of a directory; it must contain the config",
        ]
        lines += [f"  {key:<9} {value}" for key, value in self.request.runtime_env.items()]
        return [redact(line) for line in lines]


class Ray(Launcher):
    """A run as a Ray job, submitted through the cluster's dashboard."""

    # The job's driver has a copy of this directory.
    checks = frozenset({"deepspeed"})

    def parse(self, config: str, words: Sequence[str]) -> Submission:
        """The options of `read_words`, and the job that they describe."""
        request, overrides = read_words(words)
        job = make_job(request, config, overrides)
        return Submission(job.config, job)

    def render(self, submission: Submission) -> str:
        """What would be sent."""
        job: RayJob = submission.request
        return "".join(f"{line}\n" for line in job.lines(check_size(job)))

    def check(self, submission: Submission) -> None:
        """Check that the dashboard answers and accepts our token, and that Ray accepts files of this size."""
        job: RayJob = submission.request
        check_dashboard(reached(job.request.address), find_token())
        check_size(job)

    def submit(self, submission: Submission, say: Say) -> Job:
        """Submit the job."""
        job: RayJob = submission.request
        name, address = submit(job, say=say), reached(job.request.address)
        return Job(name, address, f"job {name}: submitted; {address}/#/jobs/{name}")

    def find(self, name: str, words: Sequence[str]) -> Job:
        """By the job's name, at `address=`."""
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"{name!r} is not a Ray job", "`ray job list` lists the jobs")
        return Job(name, reached(read_words(words)[0].address))

    def status(self, job: Job) -> Status:
        """The state that the dashboard reports."""
        return dashboard.status(job.place, job.name)

    def follow(self, job: Job, say: Say) -> int:
        """See `dashboard.follow`."""
        return dashboard.follow(job.place, job.name, say=say)

    def look_again(self, job: Job) -> str:
        """By the job's name and address."""
        return dashboard.look_again(job.name, job.place)


LAUNCHER = Ray()


def make_job(request: RayRequest, config_name: str, overrides: Sequence[str]) -> RayJob:
    """The job for a config; raises ConfigError when it could not run in a copy of the directory."""
    config = load_config(config_name, [*overrides, *_on_ray(request.verb)])
    refuse_relative(config, "the job works")
    word = config_name
    if config_name not in ready_made_configs():
        path = locate_config(config_name).resolve()
        in_image = "image_uri" in request.runtime_env or "container" in request.runtime_env
        if in_image:
            word = str(path)
        elif request.folder not in path.parents:
            raise ConfigError(
                f"{path} is not in {request.folder}, the directory that the job gets a copy of", "give dir=…"
            )
        else:
            word = str(path.relative_to(request.folder))
    excludes = [*EXCLUDES, *request.exclude]
    for folder in (config.output_dir, config.data_dir):
        if folder is not None and not is_url(folder) and request.folder in Path(folder).parents:
            excludes.append("/" + str(Path(folder).relative_to(request.folder)))
    own = _in_home(config)
    words = [*(other for other in overrides if other not in own), *own]
    command = shlex.join(["python", "-m", "pst_dist.cli", request.verb, word, *words, "on=ray"])
    return RayJob(request, config, command, tuple(excludes))


def _in_home(config: Config) -> list[str]:
    """The folders in this home directory, spelled out: in the job, `~` may be another directory."""
    folders = {"output_dir": config.output_dir, "data_dir": config.data_dir, "data_cache": config.data_cache}
    return [f"{key}={folder}" for key, folder in folders.items() if folder and Path.home() in Path(folder).parents]


def _on_ray(verb: str) -> list[str]:
    return [f"{stage}.backend=ray" for stage in ("embed", "train", "evaluate") if verb in (stage, "run")]


def check_size(job: RayJob) -> dict[str, int]:
    """Path -> size of every file that Ray would send; raises ConfigError, naming the largest, when they are too large,
    and for a runtime environment that Ray would not take.

    Ray limits the compressed size, which may be smaller; but a directory too large uncompressed is not just code.
    """
    prepare_token()
    check_runtime_env(job.runtime_env)
    if job.runs_in_image:
        return {}
    from ray._private.runtime_env import packaging  # Ray's own walk, so that we count exactly what is sent

    folder, files = job.request.folder, {}

    def count(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size

    silent = logging.Logger("silent", logging.CRITICAL)  # Ray would log every ignore file that it reads
    ours = packaging._get_excludes(folder, list(job.excludes))
    packaging._dir_travel(folder, [ours], count, include_gitignore=True, logger=silent)
    limit = packaging.GCS_STORAGE_MAX_SIZE
    if sum(files.values()) >= limit:
        by_entry: dict[str, int] = {}
        for name, size in files.items():
            entry = "/".join(Path(name).parts[:2])
            by_entry[entry] = by_entry.get(entry, 0) + size
        largest = sorted(by_entry.items(), key=lambda item: -item[1])[:_OFFENDERS]
        named = ", ".join(f"{entry} {_mib(size)}" for entry, size in largest)
        raise ConfigError(
            f"{_mib(sum(files.values()))} would be sent, but Ray accepts {_mib(limit)}; the largest: {named}",
            "add them to .gitignore or .rayignore, or give exclude=[…]; keep rows on a shared disk (data.root)",
            path=folder,
        )
    config = shlex.split(job.command)[4]
    if (folder / config).is_file() and config not in files:
        raise ConfigError(
            "this config would not be sent", "remove its pattern from .gitignore, .rayignore or exclude=", path=config
        )
    return files


def submit(job: RayJob, *, say: Say) -> str:
    """Check and submit a job; returns its id.

    Raises EnvironmentFault when the cluster cannot be reached or refuses it, LockedError when another job already uses
    the output directory.
    """
    client = connect(job.request.address)
    files = check_size(job)
    for other in client.list_jobs():
        if (other.metadata or {}).get("pst") == job.config.output_dir and str(other.status) in ("PENDING", "RUNNING"):
            raise LockedError(
                f"job {other.submission_id} already uses this directory",
                f"follow it: pst submit ray --follow {other.submission_id} address={job.request.address}",
                path=job.config.output_dir,
            )
    for line in job.lines(files):
        say(line)
    name = job.request.name or f"pst-{Path(job.config.output_dir).name}-{secrets.token_hex(3)}"
    try:
        client.submit_job(
            entrypoint=job.command,
            submission_id=name,
            runtime_env=job.runtime_env,
            metadata={
                "pst": job.config.output_dir,
                dashboard.NEEDS["CPU"]: str(job.request.cpus),
                dashboard.NEEDS["GPU"]: str(job.request.gpus),
            },
            entrypoint_num_cpus=job.request.cpus or None,
            entrypoint_num_gpus=job.request.gpus or None,
        )
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EnvironmentFault(f"Ray refused the job: {first[:200]}", "change the job's options") from error
    return name


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
