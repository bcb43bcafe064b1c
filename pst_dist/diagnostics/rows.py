"""`pst check`: a report on the data before any compute is spent on it, and a column map to paste into the config.

Problems for which `load_data` would refuse the data because of their number (bad rows, leaks, missing rationales) are
listed instead; `ok` says whether `load_data` would succeed. `rows_page` has the text about the rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.sample import SPLITS
from pst_dist.data.sources import LoadedData, enforce, survey
from pst_dist.data.sources.column_guess import as_yaml, guess_paths
from pst_dist.data.sources.columns import FieldMap
from pst_dist.data.sources.context import is_attached, unread_columns
from pst_dist.data.sources.field_guess import with_columns
from pst_dist.data.sources.paths import columns_in, look_up
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import excerpt, write_rejects
from pst_dist.data.sources.source import Source
from pst_dist.data.sources.specs import read_specs
from pst_dist.diagnostics.answer_types import likely_type
from pst_dist.diagnostics.rows_page import finding_lines, first_row_lines, reject_lines, split_lines
from pst_dist.embedding.lengths import measure
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import DataError, InputError, PstError
from pst_dist.storage.outputs import check_output, is_reject_list
from pst_dist.student.unreadable import unreadable_rows

_REJECTS_REMEDY = "give --rejects another name"


@dataclass(frozen=True)
class CheckReport:
    """The findings; `lines()` is the text."""

    loaded: LoadedData | None
    """None when the data could not be read at all."""
    problem: PstError | None
    """The error that `load_data` would raise; None if it would succeed."""
    proposal: str
    """YAML for the data section, when no columns are given in the config; empty otherwise."""
    columns: list[str] = field(default_factory=list)
    """The columns of the first file with an example of each, when no map was found."""
    rejects_path: Path | None = None
    models: list[str] = field(default_factory=list)
    """Lines on how student and encoder read the rows."""
    answer_type: str = ""
    """The type that fits all answers, when none is set in the config; empty if none does."""
    hints: list[str] = field(default_factory=list)
    """Lines on what the rows may be meant to be."""

    @property
    def ok(self) -> bool:
        """True when the same config would load."""
        return self.problem is None

    def lines(self) -> list[str]:
        """The report as lines of text."""
        text: list[str] = []
        if self.loaded is not None:
            text += first_row_lines(self.loaded)
            text += split_lines(self.loaded)
            text += finding_lines(self.loaded)
            text += reject_lines(self.loaded.rejects, self.rejects_path)
        text += self.models
        text += self.hints
        text += self.columns
        if self.proposal:
            text += ["", "proposed columns, to paste into the config:", *self.proposal.splitlines()]
        text += ["", "ok" if self.problem is None else str(self.problem)]
        return text


def check(config: Config, rejects_path: Path | None = None) -> CheckReport:
    """Read the data as `load_data` would and report on all of it; writes bad rows to `rejects_path`.

    Raises errors that prevent a report: a config that contradicts itself, a file that cannot be read. For a file with
    unknown columns the report proposes a column map instead.
    """
    if rejects_path is not None:
        _refuse_own_source(config, rejects_path)
        check_output(rejects_path, is_reject_list, remedy=_REJECTS_REMEDY)
    models: list[str] = []
    unreadable = None
    try:
        unreadable = unreadable_rows(config)
    except PstError as error:
        models.append(f"not checked: whether the student can read every row ({error.what})")
    try:
        loaded = survey(config, unreadable)
    except DataError as error:
        first = _first_source(config)
        found = guess_paths(_sample(first))
        if not isinstance(found, dict) or {"question", "answer"} <= set(found):
            raise  # the columns are clear: the error is about something else
        return CheckReport(None, error, _proposal(config, found, ""), _column_lines(first))
    problem: PstError | None = None
    try:
        enforce(config, loaded)
    except DataError as error:
        problem = error
    if rejects_path is not None:
        # No empty file next to the rows, because a later `*.jsonl` would match it.
        if loaded.rejects or rejects_path.is_file():
            write_rejects(rejects_path, loaded.rejects)
    proposal, likely = "", ""
    hints = _unused_columns(loaded)
    if config.data.train is not None and not config.data.mixture:
        likely, nearly = likely_type(config, _first_source(config))
        hints += nearly
        if config.data.columns is None:
            found = guess_paths(_sample(_first_source(config)))
            proposal = _proposal(config, found if isinstance(found, dict) else found.name, likely)
    models += _length_findings(config, loaded)
    return CheckReport(loaded, problem, proposal, [], rejects_path, models, likely, hints)


def _length_findings(config: Config, loaded: LoadedData) -> list[str]:
    """How many rationales the encoder would truncate, if there are any and the config needs vectors."""
    if not needs_embeddings(config):
        return []
    texts = (text for split in SPLITS for sample in loaded.splits[split] for text in sample.rationales)
    try:
        found = measure(config.embed, texts)
    except PstError as error:
        return [f"not checked: the length of rationales in the encoder's tokens ({error.what})"]
    if found is None or not found.truncated:
        return []
    return [
        f"{found.truncated:,} of {found.rationales:,} rationales exceed the encoder's {found.limit:,} tokens "
        "and will be truncated"
    ]


def _refuse_own_source(config: Config, rejects_path: Path) -> None:
    """Raises InputError when the file for bad rows is one of the files with the rows, which it would replace."""
    root = SourceRoot.of(config)
    for split in SPLITS:
        for word in config.data.specs(split):
            place = root.place(word)
            if isinstance(place, Path) and os.path.realpath(place) == os.path.realpath(rejects_path):
                raise InputError("is one of the input files", _REJECTS_REMEDY, path=rejects_path)


def _first_source(config: Config) -> Source:
    data = config.data
    split = next(name for name in SPLITS if data.specs(name))
    return read_specs(data.specs(split), split, SourceRoot.of(config))[0]


def _sample(source: Source) -> list[dict[str, Any]]:
    return source.head(50)


def _column_lines(source: Source) -> list[str]:
    """Every column of the first rows with the start of a value."""
    text = [f"columns of {source.path}:"]
    seen: dict[str, object] = {}
    for row in _sample(source):
        for column, value in row.items():
            if seen.get(column) is None:
                seen[column] = value
    return text + [f"  {excerpt(str(column))}: {excerpt(str(value))}" for column, value in seen.items()]


def _proposal(config: Config, found: dict[str, str] | str, answer_type: str) -> str:
    """The `data:` section as YAML; a field without a matching column gets a placeholder.

    A column that a guessed map refuses to leave out is in the question, if it has text.
    """
    if isinstance(found, str):
        lines = [f"  columns: {found}"]
    else:
        found = _with_unread(found, _sample(_first_source(config)))
        paths = {name: found.get(name, "") for name in ("question", "answer")}
        paths |= {name: path for name, path in found.items() if name not in paths}
        whole = as_yaml(FieldMap({name: path or "COLUMN" for name, path in paths.items()}))
        lines = ["  " + line for line in whole.splitlines()]
    if answer_type:
        lines.append(f"  answer_type: {answer_type}")
    return "\n".join(["data:", *lines])


def _with_unread(found: dict[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    if "question" not in found:
        return found
    read = columns_in(tuple(found.values()))
    asked = [(row, look_up(row, found["question"])) for row in rows]
    unread = dict.fromkeys(name for row, text in asked for name in unread_columns(row, read, text))
    texts = [name for name in unread if not is_attached(name)]
    return {**found, "question": with_columns(found["question"], texts, rows)}


def _unused_columns(loaded: LoadedData) -> list[str]:
    """A line with the columns of text that are not read."""
    unused = loaded.report.get("unused_text_columns", [])
    kept = len(loaded.splits["train"])
    if not unused or not kept:
        return []
    explained = kept != loaded.report["train_without_rationale"]
    use = "one that a question depends on belongs to data.columns.question"
    return [
        f"columns of text that are not read: {', '.join(unused)}; "
        + (use if explained else "data.columns.rationale takes one")
    ]
