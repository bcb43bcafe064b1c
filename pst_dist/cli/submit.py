"""The verb `pst submit`: submit a run to a cluster, follow it, and exit with its exit code.

Each launcher defines its own arguments and what they do (`clusters.jobs`). Ctrl-C while following does not affect the
job.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pst_dist.cli.verb import MAYBE_CONFIG, Option, overrides, verb
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.text.redaction import redact

if TYPE_CHECKING:
    from pst_dist.clusters.jobs import Job, Launcher, Submission


def job_words() -> str:
    """The arguments of each launcher, for `pst submit --help`."""
    from pst_dist.clusters.jobs import words_of_folders

    return f"{words_of_folders()}\nothers: packages with an entry point in the group pst_dist.launchers"


def check_machine(launcher: Launcher, submission: Submission) -> None:
    """Raises EnvironmentFault for problems on this machine that would also affect the job."""
    if not launcher.checks:
        return
    from pst_dist.diagnostics.machine.examine import examine, split_request

    _, findings = examine(submission.config, split_request([])[1], only=launcher.checks)
    for found in findings:
        if found.level == "problem":
            raise EnvironmentFault(f"{found.subject}: {found.what}", found.remedy or "see `pst doctor`")


def _refuse_secrets(submission: Submission) -> None:
    """Raises ConfigError for a password in the config, because others can read job scripts and commands."""
    from pst_dist.config.keys import flat_keys
    from pst_dist.text.redaction import has_secret

    for key, value in flat_keys(submission.config.model_dump(mode="json")).items():
        if isinstance(value, str) and "://" in value and has_secret(value):
            raise ConfigError(
                f"{key}={value} contains a password, which would be written into the job",
                "remove it from the URL and set it in the environment of the nodes, such as FSSPEC_SFTP_PASSWORD",
            )


def _followed(launcher: Launcher, job: Job) -> int:
    """Announce a new job and follow it; from then on Ctrl-C only stops following."""
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
    "submit a run to a cluster and follow it",
    "pst submit slurm my.yaml nodes=2 gpus=8",
    Option("where", metavar="LAUNCHER", help="the kind of cluster: slurm, ray, or another launcher"),
    MAYBE_CONFIG,
    overrides("keys of the config, and arguments of the job (see below)"),
    Option("--dry-run", action="store_true", help="print what would be submitted, without submitting it"),
    Option("--follow", metavar="JOB", help="follow a job that was submitted earlier"),
    Option("--status", metavar="JOB", help="print the state of a job"),
    Option("--no-follow", action="store_true", help="exit once the job is submitted"),
    more=job_words,
)
def submit(arguments: argparse.Namespace) -> int:
    """Submit a run to a cluster; returns its exit code."""
    from pst_dist.clusters.jobs import load_launcher

    launcher = load_launcher(arguments.where)
    earlier = arguments.follow or arguments.status
    if earlier is not None:
        # With --follow and --status there is no config: the first word is an argument of the launcher.
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
