"""Turns the rows that were read into finished splits: cuts, filters and merges them, and counts every removed row.

The order of the steps is fixed, because each one determines what the next one sees: cut a test split, drop rows on
which the teacher is wrong, merge duplicates, drop leaks, cut a validation split, keep at most `data.max_rows`. `cuts`
and `repeats` have the steps; `load` reads the rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from pst_dist.config.schema import DataConfig
from pst_dist.data.row_store import TEST, TRAIN, VALIDATION, RowStore
from pst_dist.data.sample import SPLITS
from pst_dist.data.sources.cuts import cut, keep_first
from pst_dist.data.sources.loaded import unused_words
from pst_dist.data.sources.repeats import index_questions, repeats_in, settle
from pst_dist.data.sources.row_ids import final_ids
from pst_dist.data.sources.rows import Reject, excerpt
from pst_dist.data.sources.wrong_rationales import spoil_rationales
from pst_dist.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadRows:
    """All rows that were read, on disk, with what reading found out about them."""

    store: RowStore = field(default_factory=RowStore)
    paths: list[str] = field(default_factory=list)
    """Paths of the sources; a row has the position of its own."""
    columns: dict[str, str] = field(default_factory=dict)
    """Source -> its column map as YAML."""
    unused: dict[str, list[str]] = field(default_factory=dict)
    """Path of a training file -> its unused text columns."""
    report: dict[str, Any] = field(default_factory=dict)
    """`LoadedData.report`."""

    def where(self, place: int) -> tuple[str, int]:
        """(path, line) of a row."""
        path, line = self.store.run("SELECT path, line FROM rows WHERE place=?", (place,)).fetchone()
        return self.paths[path], line

    def reject(self, place: int, code: str, what: str) -> None:
        """Record a row as a bad one; the caller then drops it."""
        path, line = self.where(place)
        self.store.reject(Reject(path, line, code, what, excerpt(self.store.sample(place).question)).to_json())


def arrange(rows: ReadRows, data: DataConfig) -> None:
    """Turn the rows into finished splits and complete the report.

    Raises ConfigError for a cut that leaves no training rows, and DataError when wrong rationales need more rows.
    """
    index_questions(rows.store)
    _assign(rows, data)
    final_ids(rows.store)
    _count(rows, data)
    rows.store.finish()


def no_teacher_answers() -> ConfigError:
    """The error for `data.keep=teacher_correct` without answers of the teacher."""
    return ConfigError(
        "data.keep=teacher_correct needs the teacher's answers",
        "set data.teacher_completions or data.columns.teacher_answer",
    )


def _assign(rows: ReadRows, data: DataConfig) -> None:
    """Cut, filter and merge the rows; every removed row is counted."""
    report, store = rows.report, rows.store
    if data.test is None and data.split_file is None:
        cut(store, data.test_size, "test", TEST)
    _refuse_without_rationale(rows)
    if data.keep == "teacher_correct":
        if (
            store.count(TRAIN)
            and not store.run("SELECT 1 FROM rows WHERE split=0 AND correct IS NOT NULL LIMIT 1").fetchone()
        ):
            raise no_teacher_answers()
        before = store.count(TRAIN) + store.count(VALIDATION)
        store.run("UPDATE rows SET split=-1 WHERE split=0 AND correct IS NOT 1 OR split=1 AND correct IS 0")
        report["teacher_wrong_dropped"] = before - store.count(TRAIN) - store.count(VALIDATION)
    found = settle(store, merge=data.duplicates == "drop", drop_leaks=data.leaks != "keep")
    report["duplicates_found"] = found.repeated[TRAIN]
    report["validation_duplicates"], report["test_duplicates"] = found.repeated[VALIDATION:]
    if data.duplicates == "drop":
        report["rationales_merged"], report["duplicates_dropped"] = found.merged, found.dropped
    report["leaks_found"], report["validation_leaks_found"] = found.leaks[TRAIN], found.leaks[VALIDATION]
    if found.first_leak is not None:
        report["first_leak"] = " and ".join(store.sample(place).source for place in found.first_leak)
    if data.leaks != "keep":
        report["leaks_dropped"] = found.leaks[TRAIN]
    report["conflicting_answers"] = found.conflicts
    if found.first_conflict is not None:
        one, other = (store.sample(place) for place in found.first_conflict)
        report["first_conflict"] = f"{one.source} has {one.answer}, {other.source} has {other.answer}"
        log.warning("%d questions have two different answers: %s", found.conflicts, report["first_conflict"])
    if data.validation is None and data.validation_size and not store.count(VALIDATION):
        cut(store, data.validation_size, "validation", VALIDATION)
    kept = store.count(TRAIN)
    if data.max_rows is not None and kept > data.max_rows:
        report["rows_over_max_rows"] = kept - data.max_rows
        keep_first(store, data.max_rows)
    report["wrong_rationales"] = spoil_rationales(store, data.wrong_rationales)


def _refuse_without_rationale(rows: ReadRows) -> None:
    """Refuse training rows without a rationale if other rows have one, whatever the arm.

    All arms then train on identical rows. `load.load_data` refuses an arm that needs rationales when no row has one.
    """
    lacking = "split=0 AND rationales=0"
    if rows.store.number("SELECT EXISTS(SELECT 1 FROM rows WHERE split=0 AND rationales>0)"):
        for (place,) in rows.store.run(f"SELECT place FROM rows WHERE {lacking} ORDER BY place"):
            unused = unused_words(rows.unused.get(rows.where(place)[0], []))
            rows.reject(place, "missing", "rationale is missing or empty" + unused)
        rows.store.run(f"UPDATE rows SET split=-1 WHERE {lacking}")


def _count(rows: ReadRows, data: DataConfig) -> None:
    report, store = rows.report, rows.store
    for name in (
        "teacher_wrong_dropped",
        "rationales_merged",
        "duplicates_dropped",
        "leaks_dropped",
        "rows_unused",
    ):
        report.setdefault(name, 0)
    report["bad_rows"] = store.rejected
    for number, split in enumerate(SPLITS):
        report.setdefault(f"{split}_read", 0)
        query = "SELECT COUNT(*), SUM(rationales), SUM(rationales=0) FROM rows WHERE split=?"
        count, rationales, lacking = store.run(query, (number,)).fetchone()
        report[f"{split}_rows"] = count
        if f"{split}_duplicates" not in report:
            merged = data.duplicates == "drop"
            report[f"{split}_duplicates"] = 0 if merged else repeats_in(store, number)
        report[f"{split}_rationales"] = rationales or 0
        report[f"{split}_without_rationale"] = lacking or 0
    report["columns"] = rows.columns
    report["unused_text_columns"] = list(dict.fromkeys(name for names in rows.unused.values() for name in names))
