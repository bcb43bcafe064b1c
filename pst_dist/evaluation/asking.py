"""Which student of a directory answers questions, and below which probability an adaptive one thinks first."""

from __future__ import annotations

import logging
from pathlib import Path

from pst_dist.arms import ARMS
from pst_dist.errors import InputError
from pst_dist.evaluation.adaptive import chosen_threshold
from pst_dist.evaluation.evaluate import evaluations_of
from pst_dist.student.saved import FORMAT_FILE, LoadedStudent

log = logging.getLogger(__name__)


def student_folder(path: Path) -> Path:
    """A run's best student, or the folder itself when it is a student or an export.

    Raises InputError, naming the arms, for the directory of a run with several.
    """
    if (path / "best").is_dir():
        return path / "best"
    arms = sorted(child.parent.name for child in path.glob("*/best"))
    if arms and not (path / FORMAT_FILE).is_file():
        raise InputError("this directory holds several arms", f"name one: {', '.join(arms)}", path=path)
    return path


def threshold_of(student: LoadedStudent, asked: float | None = None) -> float:
    """Below this probability of its first answer a student thinks first; 0 for arms that never do.

    It is the one asked for, else the exported one, else the one that the evaluation chose. Raises InputError when one
    is asked for and the student is not adaptive.
    """
    if not ARMS[student.format.arm].chooses_order:
        if asked is not None:
            raise InputError(
                f"think_below is for students of arm adaptive, this one is of {student.format.arm}",
                "leave it out",
                path=student.directory,
            )
        return 0.0
    chosen = asked if asked is not None else student.format.think_below
    if chosen is None:
        chosen = chosen_threshold(evaluations_of(student.directory.parent, student.manifest))
    if chosen is None:
        log.warning("no threshold was chosen yet, so the student never thinks first: evaluate it, or set think_below")
    return chosen or 0.0
