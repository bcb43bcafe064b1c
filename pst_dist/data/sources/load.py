"""Load the train, validation and test samples of a run, and account for every row.

The rows of each file are read, their columns found, a teacher's completions joined and the answers normalised; then
`arrange` turns them into splits. `specs` finds the files, `column_guess` the columns, and `row_work` handles single
rows in worker processes.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.processes import Processes, default_workers
from pst_dist.data.row_store import DROPPED
from pst_dist.data.sample import SPLITS, ReasoningSample
from pst_dist.data.sources.arrange import ReadRows, arrange, no_teacher_answers
from pst_dist.data.sources.choices import Convention, convention_of
from pst_dist.data.sources.column_guess import as_yaml, choose_columns, unused_text_columns
from pst_dist.data.sources.columns import ColumnMap
from pst_dist.data.sources.completions import TeacherFile, read_completions
from pst_dist.data.sources.drafts import Wrong
from pst_dist.data.sources.generators import GENERATOR_TASKS
from pst_dist.data.sources.loaded import LoadedData, bad_budget, enforce
from pst_dist.data.sources.options import Options
from pst_dist.data.sources.remote import RemoteSource
from pst_dist.data.sources.root import DataFile, SourceRoot
from pst_dist.data.sources.row_ids import first_repeated_id
from pst_dist.data.sources.row_work import RowWork, jobs_of
from pst_dist.data.sources.rows import Input, RawRow, Rejects, RowError
from pst_dist.data.sources.source import Source
from pst_dist.data.sources.specs import fetch, read_specs
from pst_dist.data.sources.splits import read_split_file
from pst_dist.data.tasks import Task, get_task
from pst_dist.errors import ConfigError, DataError, InputError
from pst_dist.logs import progress
from pst_dist.storage.manifest import digest_of

log = logging.getLogger(__name__)

_LOOK_AT = 50
"""Number of rows from which columns are guessed."""
_ALONE = 40
"""Jobs that are done in this process before others are started: about 20,000 lines, half a second."""
_AT_ONCE = 1000
"""Number of rows whose texts are encoded together."""

Unreadable = Callable[[Sequence[ReasoningSample]], Mapping[int, str]]
"""Gives the reason for each sample that the student's tokenizer cannot encode, by position."""


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


def survey(config: Config, unreadable: Unreadable | None = None, part: str = "") -> LoadedData:
    """Like `load_data`, but without refusing bad rows, missing rationales and leaks; for `pst check`.

    `part` is the name of this source in a mixture; its rows then record it.
    """
    return _Survey(config, unreadable, part).run()


@dataclass
class _Survey:
    """One pass over the data; its steps share what they found out."""

    config: Config
    unreadable: Unreadable | None = None
    part: str = ""
    """In a mixture, the name of this source; its rows then record it and their task."""
    rows: ReadRows = field(default_factory=ReadRows)
    digests: list[Any] = field(default_factory=list)
    """What was read, in order: split or purpose, name and sha256 of each file."""
    inputs: list[Input] = field(default_factory=list)
    told: dict[tuple[str, int], Convention] = field(default_factory=dict)
    """(split, position among its sources) -> the convention of the file's multiple-choice answers."""

    def run(self) -> LoadedData:
        data = self.config.data
        specs = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
        self._check_config(specs)
        bad_budget(data.max_bad, 0)
        root = SourceRoot.of(self.config)
        task = get_task(self.config.task, data.answer_type)
        sources = {split: read_specs(spec, split, root) for split, spec in specs.items()}
        fetch(itertools.chain.from_iterable(sources.values()), root)
        teacher = read_completions(data.teacher_completions, root) if data.teacher_completions else None
        self.rows.report["rows_read"] = 0
        columns = {
            (split, place): self._columns(source, split)
            for split, found in sources.items()
            for place, source in enumerate(found)
        }
        self._compare_choices(sources, columns)
        first, workers = 0, self.config.shards.workers
        with Processes(workers or default_workers(), alone=0 if workers else _ALONE) as processes:
            for split, found in sources.items():
                own = teacher if split == "train" else None
                first += self._read(split, found, columns, task, own, first, processes)
        _refuse_shared_files(sources)
        if teacher is not None:
            self.digests += [["teacher", *digest] for digest in teacher.digests]
            self.inputs += teacher.inputs
        for split in specs:
            self._refuse_unreadable(SPLITS.index(split))
        if data.split_file is not None:
            self._by_split_file(root.file(data.split_file))
        arrange(self.rows, data)
        samples = {split: self.rows.store.rows_of(split) for split in SPLITS}
        return LoadedData(samples, Rejects(self.rows.store), self.rows.report, digest_of(self.digests), self.inputs)

    def _check_config(self, specs: dict[str, Any]) -> None:
        data = self.config.data
        if not specs:
            raise ConfigError("data.train is not set", "set it to a file, a URL, hf:NAME:SPLIT or gen:TASK?rows=N")
        if "train" not in specs and (data.split_file or data.teacher_completions):
            raise ConfigError(
                "data.split_file and data.teacher_completions refer to rows of data.train, which is not set"
            )
        if data.split_file and ("test" in specs or "validation" in specs):
            raise ConfigError(
                "data.split_file cannot be combined with data.test or data.validation", "keep only one of them"
            )
        if data.keep == "teacher_correct" and not data.teacher_completions:
            # A ready-made map may have them: the answers of replies beside gold answers.
            if isinstance(data.columns, dict) and "teacher_answer" not in data.columns:
                raise no_teacher_answers()

    def _compare_choices(
        self, sources: dict[str, list[Source]], columns: dict[tuple[str, int], ColumnMap | None]
    ) -> None:
        """Infer how the answers of each file name their options, such as by an index from 0 or from 1.

        A file that does not show it follows the other files with the same columns.
        """
        own: dict[tuple[str, int], Convention] = {}
        for (split, place), found in columns.items():
            has_options = found is not None and found.has_options
            own[split, place] = convention_of(_answers(sources[split][place], found) if has_options and found else ())
        for where, convention in own.items():
            alike = [own[other] for other, found in columns.items() if found == columns[where]]
            self.told[where] = convention if convention.numbers else functools.reduce(operator.or_, alike, convention)

    def _read(
        self,
        split: str,
        sources: Sequence[Source],
        columns: dict[tuple[str, int], ColumnMap | None],
        task: Task,
        teacher: TeacherFile | None,
        first: int,
        processes: Processes,
    ) -> int:
        """Put the rows of a split into the store, from place `first` on, and return their number.

        Bad rows take a place too. Raises DataError for a repeated id, and when a teacher's completions are joined by
        position and their number differs from that of the rows.
        """
        rows = 0
        with progress(f"read {split}", unit="rows") as bar:
            for number, source in enumerate(sources):
                if source.generated and self.config.task:
                    _refuse_other_task(source, task)
                where = (split, number)
                self.rows.paths.append(source.path)
                work = RowWork.of(
                    columns[where],
                    task=task,
                    told=self.told[where],
                    stem=source.stem,
                    split=SPLITS.index(split),
                    path=len(self.rows.paths) - 1,
                    part=self.part,
                    wrong=_wrong_in(split, self.config.data.keep),
                    ranked=self._cuts(),
                )
                for made in processes.map(jobs_of(source.items(), work, rows, first + rows, teacher)):
                    for one in made:
                        if isinstance(one, dict):
                            self.rows.store.reject(one)
                        else:
                            self.rows.store.add(*one)
                    rows += len(made)
                    bar.advance(len(made))
                self.digests.append([split, source.stem, source.sha256])
                self.inputs += source.inputs
        if teacher is not None and teacher.whole and len(teacher.by_index) != rows:
            raise DataError(
                f"{len(teacher.by_index)} completions for {rows} training rows",
                "they are joined by position, so the counts must be equal",
                path=teacher.path,
            )
        self.rows.report["rows_read"] += rows
        self.rows.report[f"{split}_read"] = rows
        self._check_ids(SPLITS.index(split))
        return rows

    def _cuts(self) -> tuple[bool, bool, bool]:
        """Which of `PURPOSES` need the ranks of the training rows."""
        data = self.config.data
        test = bool(data.test_size) and data.test is None and data.split_file is None
        return test, bool(data.validation_size) and data.validation is None, data.max_rows is not None

    def _check_ids(self, split: int) -> None:
        """Raise DataError, naming both locations, if two different rows of a split have the same id."""
        found = first_repeated_id(self.rows.store, split)
        if found is not None:
            later, earlier = (self.rows.where(place) for place in found)
            raise DataError(
                f"duplicate id {self.rows.store.sample(found[0]).id!r}, first used at {earlier[0]}:{earlier[1]}",
                "make ids unique, or remove them so that they are generated",
                path=later[0],
                line=later[1],
            )

    def _columns(self, source: Source, split: str) -> ColumnMap | None:
        sampled = source.head(_LOOK_AT)
        if not sampled:
            return None
        # The rows of a generator always have the usual field names; `data.columns` is for other files.
        setting = None if source.generated else self.config.data.columns
        columns = choose_columns(setting, sampled, source.path, split)
        self.rows.columns[f"{split}: {source.stem}"] = as_yaml(columns)
        if split == "train":
            self.rows.unused[source.path] = unused_text_columns(columns, sampled)
        return columns

    def _refuse_unreadable(self, split: int) -> None:
        """Record the rows that the student's tokenizer cannot encode as bad ones, and drop them."""
        if self.unreadable is None:
            return
        rows = self.rows.store.samples(split)
        gone = []
        while part := list(itertools.islice(rows, _AT_ONCE)):
            for index, what in sorted(self.unreadable([sample for _, sample in part]).items()):
                gone.append((part[index][0], what))
        for place, what in gone:
            self.rows.reject(place, "token", what)
        self.rows.store.run_many("UPDATE rows SET split=? WHERE place=?", ((DROPPED, place) for place, _ in gone))

    def _by_split_file(self, file: DataFile | RemoteSource) -> None:
        rows = self.rows.report["train_read"]
        with file.errors():
            indices, found = read_split_file(file.copy, rows)
        self.digests.append(["split_file", file.copy.name, found.sha256])
        self.inputs.append(file.input(found))
        self.rows.report["rows_unused"] = rows - sum(map(len, indices.values()))
        self.rows.store.reorder(
            (number, index) for number, split in enumerate(SPLITS) for index in indices.get(split, ())
        )


def _wrong_in(split: str, keep: str) -> Wrong:
    """What happens to rationales that are known to be wrong. Test rows need none."""
    if split == "test":
        return "ignore"
    return "drop" if keep == "teacher_correct" else "refuse"


def _answers(source: Source, columns: ColumnMap) -> Iterator[tuple[object, Options]]:
    """Answer and options of each row of multiple choice that can be read."""
    for entry in source.rows():
        if isinstance(entry, RawRow):
            try:
                fields = columns.fields(entry.value)
            except RowError:
                continue
            if fields.options is not None:
                yield fields.answer, fields.options


def _refuse_other_task(source: Source, task: Task) -> None:
    """Raise ConfigError for a generator whose answers are of another type than the task's."""
    wanted = GENERATOR_TASKS[source.stem]
    if task.answer_type != wanted.answer_type:
        raise ConfigError(
            f"{source.path} generates rows for task {wanted.name}, but task is {task.name}", f"set task={wanted.name}"
        )


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
