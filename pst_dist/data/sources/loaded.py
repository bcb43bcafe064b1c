"""What was read for a run, and the checks for which it is refused: bad rows, rationales and leaks.

`load` reads it. `pst check` reports on data that these checks refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.row_store import StoredRows
from pst_dist.data.sources.rows import Input, Reject
from pst_dist.errors import ConfigError, DataError


@dataclass(frozen=True)
class LoadedData:
    """All rows of a run, and what happened to the rows that were left out."""

    splits: Mapping[str, StoredRows]
    """`train`, `validation`, `test`; each may be empty. The rows are on disk and parsed when they are asked for."""
    rejects: Sequence[Reject]
    """Bad rows, in the order in which they were found."""
    report: dict[str, Any]
    """Counts, and `columns`: the column map of each file as YAML. Contains no local paths."""
    source_digest: str
    """sha256 over the digests of everything read, in order. Independent of how it was split."""
    inputs: list[Input] = field(default_factory=list)
    """Everything that was read: the sources of each split, the teacher's completions, the split file."""


def enforce(config: Config, loaded: LoadedData) -> None:
    """The checks of `load_data` on bad rows, rationales and leaks; raises DataError."""
    report, rejects = loaded.report, loaded.rejects
    if len(rejects) > bad_budget(config.data.max_bad, report["rows_read"]):
        first = rejects[0]
        more = f" ({len(rejects)} of {report['rows_read']} rows are bad, data.max_bad is {config.data.max_bad})"
        raise DataError(
            first.what + more,
            "`pst check` lists them all; fix them or raise data.max_bad",
            path=first.path,
            line=first.line,
        )
    if config.data.leaks == "refuse" and report["leaks_found"]:
        raise DataError(
            f"{report['leaks_found']} training questions are also in validation or test, "
            f"the first at {report['first_leak']}",
            "remove them, or set data.leaks=drop",
        )
    if config.data.train is not None:
        if not loaded.splits["train"]:
            raise DataError(
                f"none of {report['rows_read']} rows is left for training: {_account(report)}",
                "run `pst check` for details",
            )
        arms = [arm for arm in (config.arms or [config.arm]) if arm != "answer_only"]
        if arms and not report["train_rationales"]:
            unused = report.get("unused_text_columns", [])
            raise DataError(
                f"no training row has a rationale, and arm {arms[0]} needs one" + unused_words(unused),
                "set data.columns.rationale or data.teacher_completions, or use arm=answer_only",
                path=config.data.specs("train")[0],
            )


def bad_budget(max_bad: int | str, rows: int) -> int:
    """How many bad rows data.max_bad allows; raises ConfigError for one that is neither number nor percentage."""
    if isinstance(max_bad, int) and max_bad >= 0:
        return max_bad
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(max_bad))
    if match is None:
        raise ConfigError(f'data.max_bad={max_bad!r} is neither a number nor a percentage such as "2%"')
    return int(float(match.group(1)) / 100 * rows)


def unused_words(columns: Sequence[str]) -> str:
    """The unused columns that may contain what is missing, for messages."""
    names = ", ".join(columns[:6]) + (", …" if len(columns) > 6 else "")
    return f"; unused text columns: {names}" if columns else ""


def _account(report: dict[str, Any]) -> str:
    names = ("bad_rows", "teacher_wrong_dropped", "duplicates_dropped", "leaks_dropped")
    return ", ".join(f"{name.replace('_', ' ')} {report[name]}" for name in names)
