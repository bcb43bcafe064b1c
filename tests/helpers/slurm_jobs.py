"""`pst submit slurm` as a process whose lines a test reads, for a small run on the Slurm of `slurm_cluster`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import losses
from slurm_cluster import SlurmCluster
from small_run import small_config
from waiting import wait_until

from pst_dist.config.loading import dump_config

PST = (sys.executable, "-m", "pst_dist.cli")
STEPS = 40


def write_config(folder: Path, data: Path, name: str, **changes) -> Path:
    """A small run as a file, as a user has it."""
    settings = {"train__max_steps": STEPS, "train__eval_steps": 1000, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(small_config(data, folder / name, **settings)))
    return path


def start_submit(slurm: SlurmCluster, *words: str | Path) -> subprocess.Popen:
    """`pst submit slurm …` as a process, its lines on one pipe."""
    command = [*PST, "submit", "slurm", *map(str, words)]
    return subprocess.Popen(
        command, env=slurm.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def lines_until(process: subprocess.Popen, pattern: str, seen: list[str]) -> str:
    """Read a followed job's lines until one matches; bounded by the test's own time limit."""
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            return found[1] if found.groups() else found[0]
    pytest.fail(f"no line matches {pattern!r} in:\n{''.join(seen)}")


def ended(process: subprocess.Popen, seen: list[str]) -> int:
    """The exit code of a followed job, its last lines added to `seen`; bounded by the test's own time limit."""
    rest, _ = process.communicate()
    seen.append(rest)
    return process.returncode


def wait_for_step(run: Path, step: int) -> None:
    """Until a run has logged that many steps."""
    wait_until(lambda: len(losses(run)) >= step, f"step {step} of {run}", seconds=120)
