"""The verb `pst submit`: hand a run to a kind of cluster, follow it, and end with its exit code.

Which words belong to the job and which to the config, and all that is done with them, is each cluster's own module.
Ctrl-C while following leaves the job alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pst_dist.cli.verb import MAYBE_CONFIG, Option, overrides, verb
from pst_dist.errors import ConfigError

JOB_WORDS = """\
slurm:   nodes=2 gpus=8 (a node) ranks=2 (a node without GPUs) time=04:00:00 partition=… account=… qos=… cpus=… mem=…
         name=… warn=120 (seconds before the limit in which to save), sbatch.OPTION=… for any other option,
         arms=[pst,answer_only] seeds=[0,1,2] parallel=3 (an array with a task for each arm and seed)
ray:     address=http://HEAD:8265 verb=run (or train, embed) dir=. (what the job gets a copy of) exclude=[big,*.bin]
         name=… cpus=… gpus=… (for the driver) env.NAME=…; ranks and actors are train.ray.… and embed.ray.…"""


def _slurm(arguments: argparse.Namespace) -> int:
    from pst_dist.clusters.slurm import commands, follow, script, submit
    from pst_dist.config.loading import load_config

    number, line = arguments.follow, None
    if number is None:
        request, keys = script.read_words(arguments.overrides)
        config = load_config(arguments.config, keys)
        if arguments.dry_run:
            print(script.render(request, config, Path(config.output_dir).absolute() / "slurm" / "config.yaml"), end="")
            return 0
        number = submit.submit(config, request, say=_say)
        line = submit.submitted(config, request, number)
    else:
        commands.check_controller()
    return _followed(
        number,
        line,
        None if arguments.no_follow else lambda: follow.follow(number, say=_say),
        follow.look_again(number),
    )


def _followed(job: str, submitted: str | None, follow: Callable[[], int] | None, again: str) -> int:
    """Say that a job was submitted and follow it; from that line on Ctrl-C is about a job that is there."""
    try:
        if submitted:
            _say(submitted)
        return follow() if follow else 0
    except KeyboardInterrupt:
        print(f"pst: no longer following job {job}: {again}", file=sys.stderr)
        return 130


def _say(line: str) -> None:
    print(line, flush=True)


def _ray(arguments: argparse.Namespace) -> int:
    from pst_dist.clusters.ray import dashboard, submit

    name, line = arguments.follow, None
    if name is None:
        request, keys = submit.read_words(arguments.overrides)
        job = submit.make_job(request, arguments.config, keys)
        if arguments.dry_run:
            print("\n".join(job.lines(submit.check_size(job))))
            return 0
        name = submit.submit(job, say=_say)
        line = f"job {name}: submitted; {request.address}/#/jobs/{name}"
    else:
        # With --follow there is no config: what stands in its place is a word.
        words = [*filter(None, [arguments.config]), *arguments.overrides]
        request, _ = submit.read_words(words)
    return _followed(
        name,
        line,
        None if arguments.no_follow else lambda: dashboard.follow(request.address, name, say=_say),
        dashboard.look_again(name, request.address),
    )


CLUSTERS: dict[str, Callable[[argparse.Namespace], int]] = {"slurm": _slurm, "ray": _ray}


@verb(
    "hand a run to a cluster and follow it",
    "pst submit slurm my.yaml nodes=2 gpus=8",
    Option("where", choices=sorted(CLUSTERS), help="which kind of cluster"),
    MAYBE_CONFIG,
    overrides("keys of the config, and those of the job (see below)"),
    Option("--dry-run", action="store_true", help="print what would be submitted, and end"),
    Option("--follow", metavar="JOB", help="only follow a job that was submitted before"),
    Option("--no-follow", action="store_true", help="end once the job is submitted"),
    more=lambda: JOB_WORDS,
)
def submit(arguments: argparse.Namespace) -> int:
    """Hand a run to a cluster; returns its exit code."""
    if arguments.config is None and arguments.follow is None:
        raise ConfigError("nothing to submit", f"pst submit {arguments.where} my.yaml")
    return CLUSTERS[arguments.where](arguments)
