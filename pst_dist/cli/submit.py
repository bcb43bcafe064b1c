"""The verb `pst submit`: hand a run to a kind of cluster, follow it, and end with its exit code.

Which words belong to the job and what is done with them is each launcher's own (`clusters.jobs`). Ctrl-C while
following leaves the job alone.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pst_dist.cli.verb import MAYBE_CONFIG, Option, overrides, verb
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.redaction import redact

if TYPE_CHECKING:
    from pst_dist.clusters.jobs import Job, Launcher, Submission


def job_words() -> str:
    """The words of each launcher, for `pst submit --help`."""
    from pst_dist.clusters.jobs import words_of_folders

    return f"{words_of_folders()}\nothers: packages with an entry point of the group pst_dist.launchers"


def check_machine(launcher: Launcher, submission: Submission) -> None:
    """Raises EnvironmentFault for what `pst doctor` would find here and the job would meet there."""
    if not launcher.checks:
        return
    from pst_dist.diagnostics.machine.examine import examine, split_request

    _, findings = examine(submission.config, split_request([])[1], only=launcher.checks)
    for found in findings:
        if found.level == "problem":
            raise EnvironmentFault(f"{found.subject}: {found.what}", found.remedy or "see `pst doctor`")


def _refuse_secrets(submission: Submission) -> None:
    """Raises ConfigError for a password in the config: job scripts and commands can be read by others."""
    from pst_dist.config.loading import flat_keys
    from pst_dist.redaction import has_secret

    for key, value in flat_keys(submission.config.model_dump(mode="json")).items():
        if isinstance(value, str) and "://" in value and has_secret(value):
            raise ConfigError(
                f"{key}={value} contains a password, which would be written into the job",
                "leave it out of the URL and set it in the environment of the nodes, such as FSSPEC_SFTP_PASSWORD",
            )


def _followed(launcher: Launcher, job: Job) -> int:
    """Announce a new job and follow it; from that line on Ctrl-C only ends the following."""
    try:
        if job.submitted:
            _say(job.submitted)
        return launcher.follow(job, _say)
    except KeyboardInterrupt:
        print(f"pst: no longer following job {job.name}: {launcher.look_again(job)}", file=sys.stderr)
        return 130


def _say(line: str) -> None:
    print(redact(line), flush=True)


@verb(
    "hand a run to a cluster and follow it",
    "pst submit slurm my.yaml nodes=2 gpus=8",
    Option("where", metavar="LAUNCHER", help="which kind of cluster: slurm, ray, or another launcher"),
    MAYBE_CONFIG,
    overrides("keys of the config, and those of the job (see below)"),
    Option("--dry-run", action="store_true", help="print what would be submitted, and end"),
    Option("--follow", metavar="JOB", help="only follow a job that was submitted before"),
    Option("--status", metavar="JOB", help="only print where a job stands"),
    Option("--no-follow", action="store_true", help="end once the job is submitted"),
    more=job_words,
)
def submit(arguments: argparse.Namespace) -> int:
    """Hand a run to a cluster; returns its exit code."""
    from pst_dist.clusters.jobs import load_launcher

    launcher = load_launcher(arguments.where)
    earlier = arguments.follow or arguments.status
    if earlier is not None:
        # With --follow and --status there is no config: the first word is one of the launcher's.
        job = launcher.find(earlier, [*filter(None, [arguments.config]), *arguments.overrides])
        if arguments.status:
            status = launcher.status(job)
            _say(status.line)
            return status.exit_code or 0
        return _followed(launcher, job)
    if arguments.config is None:
        raise ConfigError("nothing to submit", f"pst submit {arguments.where} my.yaml")
    submission = launcher.parse(arguments.config, arguments.overrides)
    _refuse_secrets(submission)
    if arguments.dry_run:
        print(redact(launcher.render(submission)), end="")
        return 0
    launcher.check(submission)
    check_machine(launcher, submission)
    job = launcher.submit(submission, _say)
    if arguments.no_follow:
        _say(job.submitted)
        return 0
    return _followed(launcher, job)
