"""Calls Slurm's own commands with a timeout, and checks whether Slurm is available."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pst_dist.errors import EnvironmentFault, PstError

_ANSWER_SECONDS = 20.0
"""Slurm's own commands notice within 9 s that the controller is down, but a missing slurm.conf only after 60 s."""


def check_controller() -> None:
    """Raises EnvironmentFault when this machine has no Slurm or its controller does not answer."""
    for command in ("sbatch", "scontrol", "sinfo", "squeue"):
        if shutil.which(command) is None:
            raise EnvironmentFault(
                f"{command} is not on this machine's PATH",
                "run this on a machine that can submit jobs, such as the login node; --dry-run only prints the script",
            )
    answer = run("scontrol", "ping")
    # There is one line per controller; one that is up is enough.
    if " is UP" not in answer.stdout:
        said = next((line for line in (answer.stderr + answer.stdout).splitlines() if line.strip()), "no answer")
        raise EnvironmentFault(
            f"Slurm's controller does not answer ({said.strip()[:160]})", "check `scontrol ping` and SLURM_CONF"
        )


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands with a timeout; no answer counts as a failure."""
    environment = submission_environment() | {"LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, timeout=_ANSWER_SECONDS, env=environment, **_TEXT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: no answer in {_ANSWER_SECONDS:.0f} s")


_TEXT: dict[str, Any] = {"text": True, "encoding": "utf-8", "errors": "replace"}
"""A job's name or comment may contain any bytes."""


def unreadable(command: str, said: str) -> EnvironmentFault:
    """The error for an answer of Slurm that is not in the form its manual gives."""
    return EnvironmentFault(
        f"cannot read the output of {command}: {said[:80]!a}", "pst reads the output of Slurm 20 to 25"
    )


def whole(text: str, command: str) -> int:
    """A number in such an answer; raises EnvironmentFault for anything but at most nine digits."""
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise unreadable(command, text)
    return int(text)


def comment_of(folder: Path) -> str:
    """The Slurm comment with which our jobs record their output directory."""
    return f"pst {folder}"


def submission_environment() -> dict[str, str]:
    """This process's environment, without the variables that describe the job or rank in which it runs.

    sbatch also reads every option from a variable, and passes its environment on to the job. So a submission from
    inside a job (salloc, a notebook) would give the new job the memory, tasks and export settings of the outer one.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in _WHICH_SLURM or not (name.startswith(_OF_A_JOB) or name in _OF_A_RANK)
    }


_WHICH_SLURM = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SBATCH_ACCOUNT")
"""Variables that select the Slurm cluster and the account; users set them in their profile, and no job sets them."""
_OF_A_JOB = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "TORCHELASTIC_")
_OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


def ask(*command: str) -> str:
    """The output of a command; raises EnvironmentFault with its error message when it fails."""
    answer = run(*command)
    if answer.returncode:
        lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
        raise _refusal(command[0], lines[0] if lines else f"exit code {answer.returncode}")
    return answer.stdout


def _refusal(command: str, said: str) -> PstError:
    said = re.sub(rf"^{command}: (error: )?(Batch job submission failed: )?", "", said)
    return EnvironmentFault(
        f"{command} failed: {said[:200]}", "change the options, or ask the cluster's administrators"
    )
