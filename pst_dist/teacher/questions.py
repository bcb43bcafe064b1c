"""The questions to ask: training rows of any source, with or without gold answers, and the questions to stay away from.

Rows are read like those of a run (`data.sources`), so every format, column map and multiple-choice convention works.
Unlike in a run, a row may lack its answer. Test rows of a config are never asked; new questions must stay away from
them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.sample import Turns, normalise_question, sample_id
from pst_dist.data.sources.choices import Convention, convention_of
from pst_dist.data.sources.column_guess import choose_columns, guess_paths
from pst_dist.data.sources.columns import GUESSED, OUR_FIELDS, ColumnMap, FieldMap, asked_at
from pst_dist.data.sources.drafts import Draft, make_draft
from pst_dist.data.sources.paths import look_up
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import RawRow, Reject, RowError
from pst_dist.data.sources.source import Source
from pst_dist.data.sources.specs import read_specs
from pst_dist.data.sources.splits import cut_by_hash, read_split_file
from pst_dist.data.sources.values import as_id, as_text
from pst_dist.data.tasks import Task, get_task
from pst_dist.errors import ConfigError, DataError
from pst_dist.storage.manifest import digest_of

log = logging.getLogger(__name__)

_LOOK_AT = 50
_ANSWER_FIELDS = ("answer", "answer_from_0", "answer_from_1")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question for the teacher."""

    id: str
    text: str
    gold: str | None
    """The gold answer in canonical form; None if the row has none."""
    rationales: tuple[str, ...] = ()
    """Those that the row has already; examples for few-shot prompts."""
    choices: tuple[str, ...] = ()
    turns: Turns = ()
    """The conversation that ends with the question; `text` has all of it."""
    source: str = ""
    """`file:line`."""

    @property
    def key(self) -> str:
        """Equal for questions that differ in spacing, case and punctuation only."""
        return normalise_question(self.text)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What was read."""

    rows: tuple[Question, ...]
    """Each question once, in the order of the files."""
    task: Task
    rejects: tuple[Reject, ...] = ()
    avoid: tuple[str, ...] = ()
    """Texts of the test and validation questions that belong to the rows."""
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies the questions, their answers and their order."""
        # Turns are left out: the text has all of them.
        return digest_of([[row.id, row.text, row.gold, list(row.choices)] for row in self.rows])


def read_questions(config: Config) -> Questions:
    """The training rows that `config.data` names; raises as reading them for a run does.

    DataError when no row can be used, ConfigError when there is no data.train, or a mixture.
    """
    data = config.data
    if data.train is None:
        raise ConfigError("no rows are named", "pst teach rows.jsonl -o rationales.jsonl")
    if data.mixture:
        raise ConfigError("data.train is a mixture", "teach one source at a time: pst teach rows.jsonl -o FILE.jsonl")
    train = [str(spec) for spec in ([data.train] if isinstance(data.train, str) else data.train)]
    root = SourceRoot.of(config)
    task = get_task(config.task, data.answer_type)
    rejects: list[Reject] = []
    rows = _read(config, read_specs(train, "train", root), task, rejects)
    avoid: list[str] = []
    if data.split_file is not None:
        file = root.file(data.split_file)
        with file.errors():
            indices, _ = read_split_file(file.copy, len(rows))
        held_out = {index for split in ("validation", "test") for index in indices.get(split, ())}
        avoid += [row.text for index in sorted(held_out) if (row := rows[index]) is not None]
        rows = [rows[index] for index in indices.get("train", ())]
    found = [row for row in rows if row is not None]
    if data.test is None and data.split_file is None and data.test_size:
        found, cut = _cut(found, data.test_size)
        avoid += cut
    for spec, split in ((data.validation, "validation"), (data.test, "test")):
        if spec is not None:
            ignored: list[Reject] = []
            held = _read(config, read_specs(spec, split, root), task, ignored)
            avoid += [row.text for row in held if row is not None]
    kept = _each_once(found, {normalise_question(text) for text in avoid})
    if not kept:
        first = f"; the first bad row: {rejects[0]}" if rejects else ""
        raise DataError(f"none of {len(rows)} rows can be asked{first}", "run `pst check` on the rows")
    counts = {"read": len(rows), "bad": len(rejects), "repeated_or_held_out": len(found) - len(kept)}
    counts |= {"asked": len(kept), "without_gold": sum(row.gold is None for row in kept)}
    return Questions(rows=tuple(kept), task=task, rejects=tuple(rejects), avoid=tuple(avoid), counts=counts)


def read_texts(spec: str, config: Config) -> list[str]:
    """The questions of one further source, for `--avoid`."""
    task = get_task(config.task, config.data.answer_type)
    rejects: list[Reject] = []
    sources = read_specs(spec, "test", SourceRoot.of(config).here)
    rows = [row.text for row in _read(config, sources, task, rejects) if row is not None]
    if rejects:
        # A test question that cannot be read cannot be stayed away from.
        raise DataError(rejects[0].what, "fix the row, or remove it", path=rejects[0].path, line=rejects[0].line)
    return rows


def read_examples(spec: str, config: Config) -> list[Question]:
    """The rows of a file that have an answer and a rationale."""
    task = get_task(config.task, config.data.answer_type)
    rejects: list[Reject] = []
    rows = _read(config, read_specs(spec, "train", SourceRoot.of(config).here), task, rejects)
    usable = [row for row in rows if row is not None and row.gold is not None and row.rationales]
    if not usable:
        why = f": {rejects[0]}" if rejects else ""
        raise DataError(f"no row has a question, an answer and a rationale{why}", "see --examples", path=spec)
    return usable


def _read(config: Config, sources: Sequence[Source], task: Task, rejects: list[Reject]) -> list[Question | None]:
    """One question per row, None for a bad one, which is added to `rejects`."""
    rows: list[Question | None] = []
    for source in sources:
        columns = _columns(config, source)
        told = _told(source, columns)
        for place, entry in enumerate(source.entries):
            draft: Draft | Reject | Question
            if isinstance(entry, RawRow) and _lacks_answer(entry, columns):
                draft = _without_answer(entry, columns, source, place)
            else:  # a new rationale is asked for
                draft = make_draft(entry, columns, task, source.stem, place, None, told, wrong="ignore")
            if isinstance(draft, Reject):
                rejects.append(draft)
                rows.append(None)
            else:
                rows.append(draft if isinstance(draft, Question) else _question(draft))
    return rows


def _question(draft: Draft) -> Question:
    sample = draft.sample
    return Question(
        id=sample.id,
        text=sample.question,
        gold=sample.answer,
        rationales=sample.rationales,
        choices=sample.choices,
        turns=sample.turns,
        source=sample.source,
    )


def _columns(config: Config, source: Source) -> ColumnMap | None:
    """The column map of a file; a map without an answer for a file that has questions only."""
    sampled = [entry.value for entry in source.entries if isinstance(entry, RawRow)][:_LOOK_AT]
    if not sampled:
        return None
    setting = None if source.generated else config.data.columns
    if isinstance(setting, dict) and not any(name in setting for name in _ANSWER_FIELDS):
        unknown = [name for name in setting if name not in OUR_FIELDS]
        if unknown or "question" not in setting:
            raise ConfigError(f"data.columns: {unknown[0] if unknown else 'no question'}", "use the fields of our rows")
        return FieldMap(dict(setting))
    if setting is None:
        found = guess_paths(sampled)
        if isinstance(found, dict) and "question" in found and "answer" not in found:
            return FieldMap(found, GUESSED)
    # "test": a map's rationale column may be absent, because rationales are what is asked for.
    return choose_columns(setting, sampled, source.path, "test")


def _told(source: Source, columns: ColumnMap | None) -> Convention:
    """What the file's multiple-choice indices count from, as in `data.sources.load`."""
    found = []
    for entry in source.entries if columns is not None and columns.has_options else ():
        if isinstance(entry, RawRow) and columns is not None and not _lacks_answer(entry, columns):
            try:
                fields = columns.fields(entry.value)
            except RowError:
                continue
            if fields.options is not None:
                found.append((fields.answer, fields.options))
    return convention_of(found)


def _lacks_answer(entry: RawRow, columns: ColumnMap | None) -> bool:
    """Whether a row has no answer at all. An answer that cannot be read is a bad row, not a missing one."""
    if not isinstance(columns, FieldMap):
        return False
    path = next((columns.paths[name] for name in _ANSWER_FIELDS if name in columns.paths), None)
    value = None if path is None else look_up(entry.value, path)
    return value is None or (isinstance(value, str) and not value.strip())


def _without_answer(entry: RawRow, columns: ColumnMap | None, source: Source, place: int) -> Question | Reject:
    assert isinstance(columns, FieldMap)
    paths = columns.paths
    try:
        asked, options = asked_at(entry.value, paths, guessed=columns.name == GUESSED)
        text = as_text(asked.text, "question")
        named = as_id(look_up(entry.value, paths["id"])) if "id" in paths else None
    except RowError as error:
        return entry.reject(error.code, error.what)
    except ValueError as error:
        return entry.reject("choices", str(error))
    made = sample_id(source.stem, text, place)
    given: Any = named if named and named.replace("-", "").replace("_", "").isalnum() and named.isascii() else None
    return Question(
        id=given or made,
        text=text,
        gold=None,
        choices=options.texts if options else (),
        turns=asked.turns,
        source=entry.label,
    )


def _cut(rows: list[Question], size: int | float) -> tuple[list[Question], list[str]]:
    """(the rest, the texts of the test questions), cut as a run of the same config cuts them."""
    from pst_dist.data.sample import ReasoningSample

    drafts = [
        Draft(ReasoningSample(id=row.id, question=row.text, answer=row.gold or "?"), row.source, place)
        for place, row in enumerate(rows)
    ]
    rest, test = cut_by_hash(drafts, size, "test")
    return [rows[draft.line] for draft in rest], [draft.sample.question for draft in test]


def _each_once(rows: Sequence[Question], held_out: set[str]) -> list[Question]:
    """Each question once, without those that are also held out; a repeated question keeps its first row.

    Ids often count from 0 in every file: one that is taken gets a number as a suffix.
    """
    seen, ids = set(held_out), set()
    kept = []
    for row in rows:
        if row.key in seen:
            continue
        seen.add(row.key)
        name, number = row.id, 1
        while name in ids:
            number += 1
            name = f"{row.id[:110]}-{number}"
        ids.add(name)
        kept.append(row if name == row.id else replace(row, id=name))
    return kept
