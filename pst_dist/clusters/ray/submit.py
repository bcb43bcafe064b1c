"""A run as a Ray job: the command line's options, the files that are sent along, and the submission.

The job's command is `pst run my.yaml on=ray …` in a copy of the working directory: it shards, embeds with actors,
trains with workers, scores and reports, and Ray places each stage. `clusters.ray.dashboard` contacts the dashboard.
"""

from __future__ import annotations

import logging
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.clusters.jobs import Job, Launcher, Say, Status, Submission
from pst_dist.clusters.ray import dashboard
from pst_dist.clusters.ray.dashboard import check_dashboard, connect, dashboard_address, find_token
from pst_dist.config.loading import load_config, locate_config, ready_made_configs
from pst_dist.config.run_dir import refuse_relative
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, EnvironmentFault, LockedError
from pst_dist.plain import plain
from pst_dist.redaction import redact
from pst_dist.storage.object_store import is_url

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
_OWN = ("address", "verb", "dir", "exclude", "name", "cpus", "gpus")
_OFFENDERS = 5


@dataclass(frozen=True, kw_only=True)
class RayRequest:
    """What a job asks for; every option comes from the command line."""

    address: str
    """`http://host:8265` of the dashboard."""
    verb: str = "run"
    """`run` for the whole pipeline, `train` or `embed` for that stage alone."""
    folder: Path = field(default_factory=Path.cwd)
    """The directory that the job gets a copy of."""
    exclude: tuple[str, ...] = ()
    """More patterns of files that are not sent."""
    name: str | None = None
    """The job's id; generated when not given."""
    cpus: float = 0.0
    gpus: float = 0.0
    """Reserved for the job's driver, which shards, scores and exports; embedding and training reserve their own."""
    environment: dict[str, str] = field(default_factory=dict)


def read_words(words: Sequence[str]) -> tuple[RayRequest, list[str]]:
    """Split `address=… verb=train env.NAME=… train.bf16=true` into the request and the config's overrides."""
    asked: dict[str, str] = {}
    environment, rest = {}, []
    for word in words:
        key, _, value = word.partition("=")
        if key in _OWN or key.startswith("env."):
            plain(value, key if key in _OWN else "a variable of the job's environment")
        if key in _OWN:
            asked[key] = value
        elif key.startswith("env."):
            variable = key.removeprefix("env.")
            if not re.fullmatch(r"[A-Za-z_]\w*", variable):
                raise ConfigError(f"{key!r} is not a valid environment variable", "write env.NAME=value")
            environment[variable] = value
        elif key == "on":
            raise ConfigError(f"{word}: a job of `pst submit ray` already runs on Ray", "leave it out")
        else:
            rest.append(word)
    verb = asked.get("verb", "run")
    if verb not in ("run", "train", "embed"):
        raise ConfigError(f"verb={verb} is not a stage that runs on Ray", "write verb=run, verb=train or verb=embed")
    folder = Path(asked.get("dir", ".")).resolve()
    if not folder.is_dir():
        raise ConfigError(f"dir={asked['dir']} is not a directory", "give the directory that contains the config")
    name = asked.get("name")
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"name={name} is not a valid job name", "use letters, digits, dots, dashes and underscores")
    return (
        RayRequest(
            address=dashboard_address(asked.get("address")),
            verb=verb,
            folder=folder,
            exclude=_patterns(asked.get("exclude")),
            name=name,
            cpus=_amount(asked, "cpus"),
            gpus=_amount(asked, "gpus"),
            environment=environment,
        ),
        rest,
    )


def _patterns(text: str | None) -> tuple[str, ...]:
    # Not parsed as YAML, where *.bin is an alias.
    return tuple(part.strip() for part in (text or "").strip("[]").split(",") if part.strip())


def _amount(asked: dict[str, str], key: str) -> float:
    text = asked.get(key, "0")
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ConfigError(f"{key}={text} is not a number", f"write for example {key}=1")
    return float(text)


@dataclass(frozen=True)
class RayJob:
    """A job as it would be submitted."""

    request: RayRequest
    config: Config
    command: str
    excludes: tuple[str, ...]

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment of the job's processes, in Ray's format."""
        return {
            "working_dir": str(self.request.folder),
            "excludes": list(self.excludes),
            # By default `ray job stop` waits three seconds, too short for a step and a checkpoint.
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", **self.request.environment},
        }

    def lines(self, files: dict[str, int]) -> list[str]:
        """The lines shown before submission; `files` maps each file that is sent to its size in bytes."""
        lines = [
            f"  cluster   {self.request.address}",
            f"  command   {self.command}",
            f"  output    {self.config.output_dir} (on a disk that all nodes share)",
            f"  sent      {len(files)} files, {_mib(sum(files.values()))} from {self.request.folder}",
        ]
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
        check_dashboard(job.request.address, find_token())
        check_size(job)

    def submit(self, submission: Submission, say: Say) -> Job:
        """Submit the job."""
        job: RayJob = submission.request
        name, address = submit(job, say=say), job.request.address
        return Job(name, address, f"job {name}: submitted; {address}/#/jobs/{name}")

    def find(self, name: str, words: Sequence[str]) -> Job:
        """By the job's name, at `address=`."""
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"{name!r} is not a Ray job", "`ray job list` lists the jobs")
        return Job(name, read_words(words)[0].address)

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
        if request.folder not in path.parents:
            raise ConfigError(
                f"{path} is not in {request.folder}, the directory that the job gets a copy of", "give dir=…"
            )
        word = str(path.relative_to(request.folder))
    excludes = [*EXCLUDES, *request.exclude]
    for folder in (config.output_dir, config.data_dir):
        if folder is not None and not is_url(folder) and request.folder in Path(folder).parents:
            excludes.append("/" + str(Path(folder).relative_to(request.folder)))
    command = shlex.join(["python", "-m", "pst_dist.cli", request.verb, word, *overrides, "on=ray"])
    return RayJob(request, config, command, tuple(excludes))


def _on_ray(verb: str) -> list[str]:
    return [f"{stage}.backend=ray" for stage in ("embed", "train") if verb in (stage, "run")]


def check_size(job: RayJob) -> dict[str, int]:
    """Path -> size of every file that Ray would send; raises ConfigError, naming the largest, when they are too large.

    Ray limits the compressed size, which may be smaller; but a directory too large uncompressed is not just code.
    """
    dashboard.prepare_token()
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
            metadata={"pst": job.config.output_dir},
            entrypoint_num_cpus=job.request.cpus or None,
            entrypoint_num_gpus=job.request.gpus or None,
        )
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EnvironmentFault(f"Ray refused the job: {first[:200]}", "change the job's options") from error
    return name


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
