"""Finds the student in a directory, and the probability below which an adaptive student thinks first."""

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
        raise InputError("this directory contains several arms", f"name one: {', '.join(arms)}", path=path)
    return path


def threshold_of(student: LoadedStudent, asked: float | None = None) -> float:
    """The student thinks first when the probability of its immediate answer is below this; 0 for other arms.

    Taken from `asked`, else from the export, else from the evaluation. Raises InputError when `asked` is given for a
    student that is not adaptive.
    """
    if not ARMS[student.format.arm].chooses_order:
        if asked is not None:
            raise InputError(
                f"think_below applies to the arm adaptive only; this student's arm is {student.format.arm}",
                "omit it",
                path=student.directory,
            )
        return 0.0
    chosen = asked if asked is not None else student.format.think_below
    if chosen is None:
        chosen = chosen_threshold(evaluations_of(student.directory.parent, student.manifest))
    if chosen is None:
        log.warning("no threshold has been chosen, so the student never thinks first: evaluate it, or set think_below")
    return chosen or 0.0
