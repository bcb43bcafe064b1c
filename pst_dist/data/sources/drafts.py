"""Turn one row into a draft: find its columns, join the teacher's completion, normalise its answer.

A draft is a sample with its location and information needed only while the splits are made. A row that cannot become a
draft becomes a `Reject` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pst_dist.data.sample import ReasoningSample, normalise_question, sample_id
from pst_dist.data.sources.choices import Convention, gold_answer
from pst_dist.data.sources.columns import ColumnMap, Fields
from pst_dist.data.sources.completions import Completion, TeacherFile
from pst_dist.data.sources.rows import Entry, Reject, RowError
from pst_dist.data.tasks import Task

Wrong = Literal["refuse", "drop", "ignore"]
"""What happens to a row with a rationale that is known to be wrong: it is refused; it counts as one on which the
teacher is wrong; or it is read without the rationale, where none is needed."""

_ID = re.compile(r"[A-Za-z0-9_\-]{1,120}")


@dataclass(frozen=True)
class Draft:
    """A sample on its way into a split."""

    sample: ReasoningSample
    path: str
    line: int
    teacher_correct: bool | None = None
    """Whether the teacher's own answer is right; None when there is no teacher answer."""

    @cached_property
    def question_key(self) -> str:
        """Equal for rows with the same question."""
        return normalise_question(self.sample.question)

    @property
    def where(self) -> str:
        """`path:line`."""
        return f"{self.path}:{self.line}"


def make_draft(
    entry: Entry,
    columns: ColumnMap | None,
    task: Task,
    stem: str,
    place: int,
    teacher: TeacherFile | None,
    told: Convention,
    *,
    wrong: Wrong,
) -> Draft | Reject:
    """One row as a draft, or a reject.

    `stem` is the short name of its file, `told` the convention of the file for multiple-choice answers, `wrong` what
    happens to a rationale that its row calls wrong.
    """
    if isinstance(entry, Reject) or columns is None:
        assert isinstance(entry, Reject)
        return entry
    try:
        found = columns.fields(entry.value)
        rationales, teacher_answer = found.rationales, found.teacher_answer
        if teacher is not None:
            completion = _completion(teacher, place, found)
            rationales = (completion.rationale,) if completion.rationale else ()
            teacher_answer = completion.answer
        known_wrong = found.known_wrong if teacher is None else ""
        if known_wrong and wrong == "ignore":
            rationales = ()
        elif known_wrong and (wrong == "refuse" or teacher_answer is None):
            way = "" if teacher_answer is None else ", or set data.keep=teacher_correct"
            raise RowError("rationale", known_wrong + way)
        # Beside options, 0 and 1 are the places of options.
        truth = _as_truth(found.answer) if task.answer_type == "bool" and not found.options else found.answer
        answer = gold_answer(task, found.question, truth, found.options, told, found.counts_from)
    except RowError as error:
        return entry.reject(error.code, error.what)
    except ValueError as error:
        return entry.reject("answer", f"answer {error}")
    known = teacher is not None or found.teacher_answer is not None
    named = found.id is not None and _ID.fullmatch(found.id) is not None
    sample = ReasoningSample(
        id=found.id if named and found.id else sample_id(stem, found.question, place),
        question=found.question,
        answer=answer,
        rationales=tuple(dict.fromkeys(rationales)),
        answer_type=task.answer_type,
        choices=found.options.texts if found.options else (),
        source=entry.label,
        turns=found.turns,
        synthetic=_maker(entry.value),
    )
    correct = task.is_correct(task.cleanse(teacher_answer or ""), answer) and not known_wrong if known else None
    return Draft(sample, entry.path, entry.line, correct)


def _maker(row: Mapping[str, Any]) -> str:
    """The model that made the question up, of a row that says so (`synthetic: true`, as `pst teach` writes it)."""
    mark = row.get("synthetic")
    if mark is not True and str(mark).lower() != "true":
        return ""
    name = row.get("taught_by")
    return name.strip() if isinstance(name, str) and name.strip() else "unknown"


def _as_truth(value: object) -> object:
    """Tables often store Booleans as 0 and 1."""
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    return {"0": False, "1": True}.get(value.strip(), value) if isinstance(value, str) else value


def _completion(teacher: TeacherFile, place: int, found: Fields) -> Completion:
    completion = teacher.by_index.get(place)
    if completion is None:
        raise RowError("missing", f"row {place} has no completion in {Path(teacher.path).name}")
    if completion.question is not None and completion.question.split() != found.question.split():
        raise RowError(
            "teacher", f"the question of row {place} differs from its completion's in {Path(teacher.path).name}"
        )
    return completion
