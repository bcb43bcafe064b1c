"""Load the train, validation and test samples of a run, and account for every row.

The order of the steps is fixed, because each one determines what the next one sees: read, find the columns, join the
teacher's completions, normalise the answers, assign splits, cut a test split, drop rows on which the teacher is wrong,
merge duplicates, drop leaks, cut a validation split. `specs` reads, `column_guess` finds columns, `drafts` handles
single rows, and `splits` has the steps on whole splits.
"""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.sample import SPLITS, ReasoningSample
from pst_dist.data.sources.choices import Convention, convention_of
from pst_dist.data.sources.column_guess import as_yaml, choose_columns, unused_text_columns
from pst_dist.data.sources.columns import ColumnMap
from pst_dist.data.sources.completions import TeacherFile, read_completions
from pst_dist.data.sources.drafts import Draft, make_draft
from pst_dist.data.sources.generators import GENERATOR_TASKS
from pst_dist.data.sources.rows import Input, RawRow, Reject, RowError, excerpt
from pst_dist.data.sources.specs import Source, read_specs
from pst_dist.data.sources.splits import (
    check_ids,
    conflicting_answers,
    cut_by_hash,
    final_ids,
    find_leaks,
    first_by_hash,
    merge_repeats,
    read_split_file,
    repeats,
    with_wrong_rationales,
    without,
)
from pst_dist.data.tasks import Task, get_task
from pst_dist.errors import ConfigError, DataError, InputError
from pst_dist.storage.manifest import digest_of

log = logging.getLogger(__name__)

_LOOK_AT = 50
"""Number of rows from which columns are guessed."""

Unreadable = Callable[[Sequence[ReasoningSample]], Mapping[int, str]]
"""Gives the reason for each sample that the student's tokenizer cannot encode, by position."""


@dataclass(frozen=True)
class LoadedData:
    """All rows of a run, and what happened to the rows that were left out."""

    splits: dict[str, list[ReasoningSample]]
    """`train`, `validation`, `test`; a list may be empty."""
    rejects: list[Reject]
    """Bad rows, in the order in which they were read."""
    report: dict[str, Any]
    """Counts, and `columns`: the column map of each file as YAML. Contains no local paths."""
    source_digest: str
    """sha256 over the digests of everything read, in order. Independent of how it was split."""
    inputs: list[Input] = field(default_factory=list)
    """Everything that was read: the sources of each split, the teacher's completions, the split file."""


def load_data(config: Config, unreadable: Unreadable | None = None) -> LoadedData:
    """Read, check and split the rows that `config.data` names; a row that is `unreadable` counts as a bad one.

    Raises ConfigError, InputError, DataError or EnvironmentFault, each naming its file. Also raises DataError when
    there are more bad rows than data.max_bad allows, when an arm needs rationales but there are none, and when
    data.leaks is `refuse` and a training question is also in validation or test.
    """
    loaded = survey(config, unreadable)
    enforce(config, loaded)
    log.info(
        "rows: %s",
        "  ".join(f"{name} {len(rows):,}" for name, rows in loaded.splits.items()),
    )
    return loaded


def survey(config: Config, unreadable: Unreadable | None = None) -> LoadedData:
    """Like `load_data`, but without refusing bad rows, missing rationales and leaks; for `pst check`."""
    return _Survey(config, unreadable).run()


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
                f"no training row has a rationale, and arm {arms[0]} needs one" + _unused(unused),
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


def _unused(columns: Sequence[str]) -> str:
    """The unused columns that may contain what is missing, for messages."""
    names = ", ".join(columns[:6]) + (", …" if len(columns) > 6 else "")
    return f"; unused text columns: {names}" if columns else ""


def _account(report: dict[str, Any]) -> str:
    names = ("bad_rows", "teacher_wrong_dropped", "duplicates_dropped", "leaks_dropped")
    return ", ".join(f"{name.replace('_', ' ')} {report[name]}" for name in names)


@dataclass
class _Survey:
    """One pass over the data. It is a class so that its steps can share the report."""

    config: Config
    unreadable: Unreadable | None = None
    rejects: list[Reject] = field(default_factory=list)
    digests: list[Any] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    """Path of a training file -> its unused text columns."""
    report: dict[str, Any] = field(default_factory=dict)
    told: dict[tuple[str, int], Convention] = field(default_factory=dict)
    """(split, position among its sources) -> the convention of the file's multiple-choice answers."""

    def run(self) -> LoadedData:
        data = self.config.data
        specs = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
        self._check_config(specs)
        bad_budget(data.max_bad, 0)
        root = Path(data.root).expanduser() if data.root else Path()
        task = get_task(self.config.task, data.answer_type)
        sources = {split: read_specs(spec, split, root) for split, spec in specs.items()}
        _refuse_shared_files(sources)
        teacher = read_completions(data.teacher_completions, root) if data.teacher_completions else None
        self.report["rows_read"] = 0
        columns = {
            (split, place): self._columns(source, split)
            for split, found in sources.items()
            for place, source in enumerate(found)
        }
        self._compare_choices(sources, columns)
        drafts: dict[str, list[Draft | None]] = {}
        for split, found in sources.items():
            drafts[split] = self._drafts(split, found, columns, task, teacher if split == "train" else None)
        if teacher is not None:
            self.digests += [["teacher", *digest] for digest in teacher.digests]
            self.inputs += teacher.inputs
        for rows in drafts.values():
            self._refuse_unreadable(rows)
        whole = {split: [draft for draft in rows if draft is not None] for split, rows in drafts.items()}
        if data.split_file is not None:
            whole |= self._by_split_file(root / data.split_file, drafts["train"])
        splits = self._arrange({split: whole.get(split, []) for split in SPLITS})
        samples = final_ids(splits)
        self._count(splits)
        return LoadedData(samples, self.rejects, self.report, digest_of(self.digests), self.inputs)

    def _check_config(self, specs: dict[str, Any]) -> None:
        data = self.config.data
        if not specs:
            raise ConfigError("data.train is not set", "set it to a file, hf:NAME:SPLIT or gen:TASK?rows=N")
        if "train" not in specs and (data.split_file or data.teacher_completions):
            raise ConfigError(
                "data.split_file and data.teacher_completions refer to rows of data.train, which is not set"
            )
        if data.split_file and ("test" in specs or "validation" in specs):
            raise ConfigError(
                "data.split_file cannot be combined with data.test or data.validation", "keep only one of them"
            )
        if data.keep == "teacher_correct" and not data.teacher_completions:
            named = data.columns if isinstance(data.columns, dict) else {}
            if "teacher_answer" not in named:
                raise ConfigError(
                    "data.keep=teacher_correct needs the teacher's answers",
                    "set data.teacher_completions or data.columns.teacher_answer",
                )

    def _compare_choices(
        self, sources: dict[str, list[Source]], columns: dict[tuple[str, int], ColumnMap | None]
    ) -> None:
        """Infer what each file's indices count from. An ambiguous file follows the other files of its layout."""
        own: dict[tuple[str, int], Convention] = {}
        for (split, place), found in columns.items():
            rows = []
            for entry in sources[split][place].entries if found is not None and found.has_options else ():
                if isinstance(entry, RawRow) and found is not None:
                    try:
                        fields = found.fields(entry.value)
                    except RowError:
                        continue
                    if fields.options is not None:
                        rows.append((fields.answer, fields.options))
            own[split, place] = convention_of(rows)
        for where, convention in own.items():
            alike = [own[other] for other, found in columns.items() if found == columns[where]]
            self.told[where] = convention if convention.numbers else functools.reduce(operator.or_, alike, convention)

    def _drafts(
        self,
        split: str,
        sources: Sequence[Source],
        columns: dict[tuple[str, int], ColumnMap | None],
        task: Task,
        teacher: TeacherFile | None,
    ) -> list[Draft | None]:
        """One draft per row, None for a bad row, so that positions match those in the file."""
        drafts: list[Draft | None] = []
        rows = sum(len(source.entries) for source in sources)
        if teacher is not None and teacher.whole and len(teacher.by_index) != rows:
            raise DataError(
                f"{len(teacher.by_index)} completions for {rows} training rows",
                "they are joined by position, so the counts must be equal",
                path=teacher.path,
            )
        for number, source in enumerate(sources):
            self.digests.append([split, source.stem, source.sha256])
            self.inputs += source.inputs
            if source.generated and task.answer_type != GENERATOR_TASKS[source.stem].answer_type and self.config.task:
                wanted = GENERATOR_TASKS[source.stem].name
                raise ConfigError(
                    f"{source.path} generates rows for task {wanted}, but task is {task.name}", f"set task={wanted}"
                )
            where = (split, number)
            for entry in source.entries:
                made = make_draft(entry, columns[where], task, source, len(drafts), teacher, self.told[where])
                if isinstance(made, Reject):
                    self.rejects.append(made)
                drafts.append(None if isinstance(made, Reject) else made)
        self.report["rows_read"] += rows
        self.report[f"{split}_read"] = rows
        check_ids([draft for draft in drafts if draft is not None])
        return drafts

    def _columns(self, source: Source, split: str) -> ColumnMap | None:
        sampled = [entry.value for entry in source.entries if isinstance(entry, RawRow)][:_LOOK_AT]
        if not sampled:
            return None
        # A generator's rows have our own field names, whatever map the config has for other files.
        setting = None if source.generated else self.config.data.columns
        columns = choose_columns(setting, sampled, source.path, split)
        self.columns[f"{split}: {source.stem}"] = as_yaml(columns)
        if split == "train":
            self.unused[source.path] = unused_text_columns(columns, sampled)
        return columns

    def _refuse_unreadable(self, drafts: list[Draft | None]) -> None:
        """Make a bad row of each that the student's tokenizer cannot encode; changes `drafts`."""
        places = [place for place, draft in enumerate(drafts) if draft is not None]
        if self.unreadable is None or not places:
            return
        rows = [draft for draft in drafts if draft is not None]
        for index, what in sorted(self.unreadable([draft.sample for draft in rows]).items()):
            draft = rows[index]
            self.rejects.append(Reject(draft.path, draft.line, "token", what, excerpt(draft.sample.question)))
            drafts[places[index]] = None

    def _by_split_file(self, path: Path, drafts: list[Draft | None]) -> dict[str, list[Draft]]:
        indices, found = read_split_file(path, len(drafts))
        self.digests.append(["split_file", path.name, found.sha256])
        self.inputs.append(found)
        self.report["rows_unused"] = len(drafts) - sum(map(len, indices.values()))
        return {
            split: [draft for draft in (drafts[index] for index in rows) if draft is not None]
            for split, rows in indices.items()
        }

    def _arrange(self, splits: dict[str, list[Draft]]) -> dict[str, list[Draft]]:
        """Cut, filter and merge the drafts; every removed row is counted."""
        data, report = self.config.data, self.report
        train, validation, test = (splits[name] for name in SPLITS)
        if data.test is None and data.split_file is None:
            train, test = cut_by_hash(train, data.test_size, "test")
        train = self._with_rationale(train)
        if data.keep == "teacher_correct":
            right = [draft for draft in train if draft.teacher_correct]
            kept = [draft for draft in validation if draft.teacher_correct is not False]
            report["teacher_wrong_dropped"] = len(train) - len(right) + len(validation) - len(kept)
            train, validation = right, kept
        report["duplicates_found"] = repeats(train)
        for name, drafts in (("validation", validation), ("test", test)):
            report[f"{name}_duplicates"] = repeats(drafts)
        if data.duplicates == "drop":
            train, report["rationales_merged"], report["duplicates_dropped"] = merge_repeats(train)
            # Scores and their standard errors count questions: a question with several rationales is one sample.
            validation, test = merge_repeats(validation)[0], merge_repeats(test)[0]
        train_leaks = find_leaks(train, [*validation, *test])
        validation_leaks = find_leaks(validation, test)
        report["leaks_found"] = len(train_leaks)
        report["validation_leaks_found"] = len(validation_leaks)
        if train_leaks:
            report["first_leak"] = " and ".join(draft.sample.source for draft in train_leaks[0])
        if data.leaks != "keep":
            train = without(train, [draft for draft, _ in train_leaks])
            validation = without(validation, [draft for draft, _ in validation_leaks])
            report["leaks_dropped"] = len(train_leaks)
        conflicts = conflicting_answers(train)
        report["conflicting_answers"] = len(conflicts)
        if conflicts:
            one, other = conflicts[0]
            report["first_conflict"] = (
                f"{one.sample.source} has {one.sample.answer}, {other.sample.source} has {other.sample.answer}"
            )
            log.warning("%d questions have two different answers: %s", len(conflicts), report["first_conflict"])
        if not validation and data.validation is None and data.validation_size:
            train, validation = cut_by_hash(train, data.validation_size, "validation")
        if data.max_rows is not None and len(train) > data.max_rows:
            report["rows_over_max_rows"] = len(train) - data.max_rows
            train = first_by_hash(train, data.max_rows)
        train, report["wrong_rationales"] = with_wrong_rationales(train, data.wrong_rationales)
        return {"train": train, "validation": validation, "test": test}

    def _with_rationale(self, train: list[Draft]) -> list[Draft]:
        """Refuse training rows without a rationale if other rows have one, whatever the arm.

        All arms then train on identical rows. `load_data` refuses an arm that needs rationales when no row has one.
        """
        have = [draft for draft in train if draft.sample.rationales]
        if have:
            self.rejects += [
                Reject(
                    draft.path,
                    draft.line,
                    "missing",
                    "rationale is missing or empty" + _unused(self.unused.get(draft.path, [])),
                    excerpt(draft.sample.question),
                )
                for draft in train
                if not draft.sample.rationales
            ]
        return have or train

    def _count(self, splits: dict[str, list[Draft]]) -> None:
        report = self.report
        for name in (
            "teacher_wrong_dropped",
            "rationales_merged",
            "duplicates_dropped",
            "leaks_dropped",
            "rows_unused",
        ):
            report.setdefault(name, 0)
        report["bad_rows"] = len(self.rejects)
        for split, drafts in splits.items():
            report.setdefault(f"{split}_read", 0)
            report[f"{split}_rows"] = len(drafts)
            report.setdefault(f"{split}_duplicates", repeats(drafts))
            report[f"{split}_rationales"] = sum(len(draft.sample.rationales) for draft in drafts)
            report[f"{split}_without_rationale"] = sum(not draft.sample.rationales for draft in drafts)
        report["columns"] = self.columns
        report["unused_text_columns"] = list(dict.fromkeys(name for names in self.unused.values() for name in names))


def _refuse_shared_files(sources: dict[str, list[Source]]) -> None:
    """Refuse the same file in two splits, which would be a complete leak; raises InputError."""
    owners: dict[str, str] = {}
    for split, found in sources.items():
        for source in found:
            # The same generator spec generates different rows for each split.
            if source.generated:
                continue
            earlier = owners.setdefault(source.sha256, split)
            if earlier != split:
                raise InputError(
                    f"data.{earlier} and data.{split} have the same content", "use separate rows", path=source.path
                )
