"""A run directory that was moved or copied: its saved config names the places where it was made.

The directory that a command names is the one it works on, and data that came along with it is used where it is now.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def at_its_place(tree: dict[str, Any], run: Path) -> dict[str, Any]:
    """The keys of the config saved in `run`, with the places that moved along with it.

    Unchanged when `output_dir` is `run`. Otherwise `output_dir` becomes `run`. Data that was inside the run moves with
    it; data beside it (as the arms of one run have it) does so where it lies beside `run` now; any other data_dir or
    data_cache stays, unless it is missing from here and lies at the same place relative to `run`.
    """
    recorded = tree.get("output_dir")
    if not isinstance(recorded, str) or _is_same(recorded, run):
        return tree
    moved = {**tree, "output_dir": str(run)}
    for key in ("data_dir", "data_cache"):
        folder = tree.get(key)
        if isinstance(folder, str) and "://" not in folder:
            moved[key] = _followed(folder, recorded, run)
    log.info("%s was made as %s and is used where it is now", run, recorded)
    return moved


def _followed(folder: str, recorded: str, run: Path) -> str:
    """Where a folder that a run names is, now that the run is no longer at its recorded place."""
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
