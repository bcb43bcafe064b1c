"""Use a run directory that was moved or copied, although its saved config has the original paths.

A command works on the directory that it names, and data that was moved with it is used at its new path.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def at_its_place(tree: dict[str, Any], run: Path) -> dict[str, Any]:
    """The keys of the config saved in `run`, with paths adjusted to where the run is now.

    Unchanged if `output_dir` is `run`; otherwise `output_dir` becomes `run`. A data_dir or data_cache inside the run
    moves with it. One next to the run (shared by the arms of a run) moves if it exists next to `run` now. Any other
    path is kept, unless it does not exist here but does at the same path relative to `run`.
    """
    recorded = tree.get("output_dir")
    if not isinstance(recorded, str) or _is_same(recorded, run):
        return tree
    moved = {**tree, "output_dir": str(run)}
    for key in ("data_dir", "data_cache"):
        folder = tree.get(key)
        if isinstance(folder, str) and "://" not in folder:
            moved[key] = _followed(folder, recorded, run)
    log.info("%s was created as %s; using it at its current path", run, recorded)
    return moved


def _followed(folder: str, recorded: str, run: Path) -> str:
    """The current path of a folder that a moved run names."""
    relative = os.path.relpath(folder, recorded)
    here = os.path.normpath(run / relative)
    if not relative.startswith(os.pardir):
        return here
    is_beside = relative.count(os.pardir) == 1
    return here if os.path.isdir(here) and (is_beside or not os.path.isdir(folder)) else folder


def _is_same(recorded: str, run: Path) -> bool:
    try:
        return os.path.samefile(recorded, run)
    except (OSError, ValueError):
        return False
