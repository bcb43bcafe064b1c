"""Load the train, validation and test samples of a run, and account for every row.

The order of the steps is fixed, because each one determines what the next one sees: read, find the columns, join the
teacher's completions, normalise the answers, assign splits, cut a test split, drop rows on which the teacher is wrong,
merge duplicates, drop leaks, cut a validation split. `specs` reads, `column_guess` finds columns, `drafts` handles
single rows, and `splits` has the steps on whole splits.
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
from pst_dist.data.row_store import DROPPED, RowStore
from pst_dist.data.sample import SPLITS, ReasoningSample
from pst_dist.data.sources.arrange import (
    TEST,
    TRAIN,
    VALIDATION,
    cut,
    final_ids,
    first_repeated_id,
    index_questions,
    keep_first,
    repeats_in,
    settle,
    spoil_rationales,
)
from pst_dist.data.sources.choices import Convention, convention_of
from pst_dist.data.sources.column_guess import as_yaml, choose_columns, unused_text_columns
from pst_dist.data.sources.columns import ColumnMap
from pst_dist.data.sources.completions import TeacherFile, read_completions
from pst_dist.data.sources.generators import GENERATOR_TASKS
from pst_dist.data.sources.loaded import LoadedData, bad_budget, enforce, unused_words
from pst_dist.data.sources.options import Options
from pst_dist.data.sources.remote import RemoteSource
from pst_dist.data.sources.root import DataFile, SourceRoot
from pst_dist.data.sources.row_work import RowWork, jobs_of
from pst_dist.data.sources.rows import Input, RawRow, Reject, Rejects, RowError, excerpt
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
"""Jobs that are done before processes are started: about 20,000 lines, half a second."""
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

    `part` is the name of a source of a mixture, which its rows then have.
    """
    return _Survey(config, unreadable, part).run()


@dataclass
class _Survey:
    """One pass over the data. It is a class so that its steps can share the report."""

    config: Config
    unreadable: Unreadable | None = None
    part: str = ""
    """In a mixture, the name of this source; its rows then name their task too."""
    store: RowStore = field(default_factory=RowStore)
    paths: list[str] = field(default_factory=list)
    """Paths of the sources; a row has the position of its own."""
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
        root = SourceRoot.of(self.config)
        task = get_task(self.config.task, data.answer_type)
        sources = {split: read_specs(spec, split, root) for split, spec in specs.items()}
        fetch(itertools.chain.from_iterable(sources.values()), root)
        teacher = read_completions(data.teacher_completions, root) if data.teacher_completions else None
        self.report["rows_read"] = 0
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
        self.arrange()
        samples = {split: self.store.rows_of(split) for split in SPLITS}
        return LoadedData(samples, Rejects(self.store), self.report, digest_of(self.digests), self.inputs)

    def arrange(self) -> None:
        """Turn the rows that were read into finished splits."""
        index_questions(self.store)
        self._arrange()
        final_ids(self.store)
        self._count()
        self.store.finish()

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
        """Put the rows of a split into the store, from place `first` on; bad rows have a place too. Their number."""
        rows = 0
        with progress(f"read {split}", unit="rows") as bar:
            for number, source in enumerate(sources):
                if source.generated and self.config.task:
                    _refuse_other_task(source, task)
                where = (split, number)
                self.paths.append(source.path)
                work = RowWork.of(
                    columns[where],
                    task=task,
                    told=self.told[where],
                    stem=source.stem,
                    split=SPLITS.index(split),
                    path=len(self.paths) - 1,
                    part=self.part,
                    ranked=self._cuts(),
                )
                for made in processes.map(jobs_of(source.items(), work, rows, first + rows, teacher)):
                    for one in made:
                        if isinstance(one, dict):
                            self.store.reject(one)
                        else:
                            self.store.add(*one)
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
        self.report["rows_read"] += rows
        self.report[f"{split}_read"] = rows
        self._check_ids(SPLITS.index(split))
        return rows

    def _cuts(self) -> tuple[bool, bool, bool]:
        """Which of `PURPOSES` need the ranks of the training rows."""
        data = self.config.data
        test = bool(data.test_size) and data.test is None and data.split_file is None
        return test, bool(data.validation_size) and data.validation is None, data.max_rows is not None

    def _check_ids(self, split: int) -> None:
        """Raise DataError, naming both locations, if two different rows of a split have the same id."""
        found = first_repeated_id(self.store, split)
        if found is not None:
            later, earlier = (self._where(place) for place in found)
            raise DataError(
                f"duplicate id {self.store.sample(found[0]).id!r}, first used at {earlier[0]}:{earlier[1]}",
                "make ids unique, or remove them so that they are generated",
                path=later[0],
                line=later[1],
            )

    def _where(self, place: int) -> tuple[str, int]:
        path, line = self.store.run("SELECT path, line FROM rows WHERE place=?", (place,)).fetchone()
        return self.paths[path], line

    def _reject(self, place: int, code: str, what: str) -> None:
        """Make a bad row of a good one, which the caller then drops."""
        path, line = self._where(place)
        self.store.reject(Reject(path, line, code, what, excerpt(self.store.sample(place).question)).to_json())

    def _columns(self, source: Source, split: str) -> ColumnMap | None:
        sampled = source.head(_LOOK_AT)
        if not sampled:
            return None
        # A generator's rows have our own field names, whatever map the config has for other files.
        setting = None if source.generated else self.config.data.columns
        columns = choose_columns(setting, sampled, source.path, split)
        self.columns[f"{split}: {source.stem}"] = as_yaml(columns)
        if split == "train":
            self.unused[source.path] = unused_text_columns(columns, sampled)
        return columns

    def _refuse_unreadable(self, split: int) -> None:
        """Make a bad row of each that the student's tokenizer cannot encode."""
        if self.unreadable is None:
            return
        rows = self.store.samples(split)
        gone = []
        while part := list(itertools.islice(rows, _AT_ONCE)):
            for index, what in sorted(self.unreadable([sample for _, sample in part]).items()):
                gone.append((part[index][0], what))
        for place, what in gone:
            self._reject(place, "token", what)
        self.store.run_many("UPDATE rows SET split=? WHERE place=?", ((DROPPED, place) for place, _ in gone))

    def _by_split_file(self, file: DataFile | RemoteSource) -> None:
        rows = self.report["train_read"]
        with file.errors():
            indices, found = read_split_file(file.copy, rows)
        self.digests.append(["split_file", file.copy.name, found.sha256])
        self.inputs.append(file.input(found))
        self.report["rows_unused"] = rows - sum(map(len, indices.values()))
        self.store.reorder((number, index) for number, split in enumerate(SPLITS) for index in indices.get(split, ()))

    def _arrange(self) -> None:
        """Cut, filter and merge the rows; every removed row is counted."""
        data, report, store = self.config.data, self.report, self.store
        if data.test is None and data.split_file is None:
            cut(store, data.test_size, "test", TEST)
        self._refuse_without_rationale()
        if data.keep == "teacher_correct":
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
        rows = store.count(TRAIN)
        if data.max_rows is not None and rows > data.max_rows:
            report["rows_over_max_rows"] = rows - data.max_rows
            keep_first(store, data.max_rows)
        report["wrong_rationales"] = spoil_rationales(store, data.wrong_rationales)

    def _refuse_without_rationale(self) -> None:
        """Refuse training rows without a rationale if other rows have one, whatever the arm.

        All arms then train on identical rows. `load_data` refuses an arm that needs rationales when no row has one.
        """
        lacking = "split=0 AND rationales=0"
        if self.store.number("SELECT EXISTS(SELECT 1 FROM rows WHERE split=0 AND rationales>0)"):
            for (place,) in self.store.run(f"SELECT place FROM rows WHERE {lacking} ORDER BY place"):
                unused = unused_words(self.unused.get(self._where(place)[0], []))
                self._reject(place, "missing", "rationale is missing or empty" + unused)
            self.store.run(f"UPDATE rows SET split=-1 WHERE {lacking}")

    def _count(self) -> None:
        report, store = self.report, self.store
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
            rows, rationales, lacking = store.run(query, (number,)).fetchone()
            report[f"{split}_rows"] = rows
            if f"{split}_duplicates" not in report:
                merged = self.config.data.duplicates == "drop"
                report[f"{split}_duplicates"] = 0 if merged else repeats_in(store, number)
            report[f"{split}_rationales"] = rationales or 0
            report[f"{split}_without_rationale"] = lacking or 0
        report["columns"] = self.columns
        report["unused_text_columns"] = list(dict.fromkeys(name for names in self.unused.values() for name in names))


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
