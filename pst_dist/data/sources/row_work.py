"""The part of reading that takes time, as jobs for several processes: entries of a source become rows of the store.

A job is a pure function of its entries, so that equal rows give equal bytes however many processes there are. `load`
reads the sources, hands out the jobs and stores their results in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pst_dist.data.row_store import Row, content_of, digest
from pst_dist.data.sample import SPLITS
from pst_dist.data.sources.choices import Convention
from pst_dist.data.sources.column_guess import READY_MADE
from pst_dist.data.sources.columns import ColumnMap, Layout
from pst_dist.data.sources.completions import TeacherFile
from pst_dist.data.sources.drafts import Draft, Wrong, make_draft
from pst_dist.data.sources.rows import Entry, Reject
from pst_dist.data.sources.splits import rank_of
from pst_dist.data.sources.strict_json import Line
from pst_dist.data.tasks import Task

PURPOSES = ("test", "validation", "rows")
"""What training rows are ranked for, each by another hash: the two splits that are cut, and data.max_rows."""
MOST_LINES = 512
_MOST_ENTRIES = 64
"""Of a table, where one cell may have 16 MiB."""
_MOST_BYTES = 1 << 20

Made = tuple[Row, bytes] | dict[str, Any]
"""The columns and the bytes of a row, or the JSON of a reject."""


@dataclass(frozen=True)
class RowWork:
    """What all entries of one source have in common."""

    task: Task
    columns: ColumnMap | str | None
    """A ready-made map by its name, since its functions cannot be sent; None where no row is good."""
    told: Convention
    stem: str
    split: int
    path: int
    """Position of the source among all paths."""
    part: str
    wrong: Wrong
    ranked: tuple[bool, ...]
    """Which of `PURPOSES` need the ranks of the training rows."""

    @classmethod
    def of(cls, columns: ColumnMap | None, **facts: Any) -> RowWork:
        """The work for rows with these columns."""
        return cls(columns=columns.name if isinstance(columns, Layout) else columns, **facts)


@dataclass(frozen=True)
class RowJob:
    """Some entries of a source that follow each other; calling it makes their rows."""

    work: RowWork
    entries: list[Line | Entry]
    first: int
    """Position of the first entry in its split."""
    place: int
    """Its place in the store."""
    teacher: TeacherFile | None

    def __call__(self) -> list[Made]:
        """One result for each entry."""
        work = self.work
        columns = READY_MADE[work.columns] if isinstance(work.columns, str) else work.columns
        made: list[Made] = []
        for offset, item in enumerate(self.entries):
            entry = item.entry() if isinstance(item, Line) else item
            place = self.first + offset
            draft = make_draft(entry, columns, work.task, work.stem, place, self.teacher, work.told, wrong=work.wrong)
            made.append(draft.to_json() if isinstance(draft, Reject) else row_of(draft, self.place + offset, work))
        return made


def jobs_of(
    items: Iterable[Line | Entry], work: RowWork, first: int, place: int, teacher: TeacherFile | None
) -> Iterator[RowJob]:
    """Jobs for all items of a source, whose first one has this position in its split and this place in the store."""
    # An answer in mathematics may take five seconds, and progress is reported after each job.
    most = 1 if work.task.rule == "math" else MOST_LINES
    entries: list[Line | Entry] = []
    size = 0

    def job() -> RowJob:
        own = None if teacher is None else _between(teacher, first, first + len(entries))
        return RowJob(work, entries, first, place, own)

    for item in items:
        entries.append(item)
        size += len(item.raw) if isinstance(item, Line) else _MOST_BYTES // _MOST_ENTRIES
        if len(entries) >= most or size >= _MOST_BYTES:
            yield job()
            first, place, entries, size = first + len(entries), place + len(entries), [], 0
    if entries:
        yield job()


def _between(teacher: TeacherFile, start: int, stop: int) -> TeacherFile:
    """The completions of some rows."""
    own = {index: teacher.by_index[index] for index in range(start, stop) if index in teacher.by_index}
    return TeacherFile(teacher.path, own, [], (), teacher.whole)


def row_of(draft: Draft, place: int, work: RowWork) -> tuple[Row, bytes]:
    """The columns of a row at a place in the store, and its bytes."""
    sample = draft.sample
    if work.part:
        sample = replace(sample, part=work.part, task=work.task.name)
    key = draft.question_key.encode("utf-8", "surrogatepass")
    answer = sample.answer.encode("utf-8", "surrogatepass")
    is_train = SPLITS[work.split] == "train"
    ranks = [
        rank_of(sample.id, purpose) if needed and is_train else None
        for purpose, needed in zip(PURPOSES, work.ranked, strict=True)
    ]
    columns = (
        *(place, work.split, 0, work.path, draft.line, sample.id, digest(key), digest(key, answer)),
        *(len(sample.rationales), draft.teacher_correct, len(sample.turns), sample.synthetic, *ranks),
    )
    return columns, content_of(sample)
