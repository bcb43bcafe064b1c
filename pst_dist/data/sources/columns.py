"""Find question, answer and rationale in a row: the fields, and the column maps that give them.

`paths` knows nested paths and templates, `common_maps` has the known layouts (messages, alpaca, …), `task_maps` those
of individual public datasets, and `column_guess` chooses between them. `tasks` decides what a valid answer is.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pst_dist.data.sample import Turns
from pst_dist.data.sources.context import ADD_COLUMN, is_blank, refuse_slots, refuse_unread
from pst_dist.data.sources.conversations import Question, is_turns, read_question
from pst_dist.data.sources.no_answers import refuse_no_answer, refuse_prose
from pst_dist.data.sources.options import Options, read_options, with_choices
from pst_dist.data.sources.paths import columns_in, columns_of_list, look_up, options_at, refuse_partial, turns_at
from pst_dist.data.sources.replies import begins_with_mark, has_mark, split_reply
from pst_dist.data.sources.rows import RowError
from pst_dist.data.sources.scales import refuse_unread_scale
from pst_dist.data.sources.values import as_answer, as_id, as_rationales, as_text, names_steps, refuse_unclear_list
from pst_dist.data.sources.verdicts import are_right, refuse_known_wrong
from pst_dist.errors import ConfigError

GUESSED = "guessed"
"""The name of a guessed map. Such a map must not leave out a column that the question may depend on."""
_ANSWERS = {"answer": None, "answer_from_0": 0, "answer_from_1": 1}
"""The fields for the answer, with what an index into the choices counts from; None means inferred from the rows."""
TURNS = "turns"
"""The field, and the column in files of ours, with the conversation that a question ends."""
OUR_FIELDS = ("question", TURNS, *_ANSWERS, "rationale", "rationales", "choices", "id", "teacher_answer")
"""The fields of a column map. The last one is the teacher's own answer, for keep=teacher_correct."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What was found in one row. The answer is not normalised yet."""

    question: str
    answer: object
    turns: Turns = ()
    """The conversation that ends with the question; empty where the row has no more than a question."""
    rationales: tuple[str, ...] = ()
    options: Options | None = None
    """The options of a multiple-choice question. None for other questions, or if only the question text lists them."""
    counts_from: int | None = None
    """What an index counts from, 0 or 1, if the column map defines it."""
    id: str | None = None
    teacher_answer: str | None = None
    known_wrong: str = ""
    """Why the rationales are known to be wrong. Such a training row is refused, unless `data.keep` leaves it out."""


class ColumnMap(Protocol):
    """Turns a row into `Fields`."""

    @property
    def name(self) -> str:
        """The name of the ready-made map, or the origin of the map."""

    @property
    def has_options(self) -> bool:
        """Whether rows may have the options of multiple-choice questions."""

    def fields(self, row: Mapping[str, Any]) -> Fields:
        """The row's fields; raises RowError."""


@dataclass(frozen=True)
class FieldMap:
    """A map from our fields to paths `a.b[0].c` or templates `{a} {b}`; `{c?}` is left out where c is blank."""

    paths: Mapping[str, str]
    name: str = "columns"

    @property
    def has_options(self) -> bool:
        """Whether the map has the field `choices`."""
        return "choices" in self.paths

    def fields(self, row: Mapping[str, Any]) -> Fields:
        """Look up every field. `load` decides whether a row needs a rationale.

        If the answer column contains a thought or an answer mark, it is split as a reply. Beside a rationale, a phrase
        such as "the answer is" must begin a sentence.
        """
        paths = self.paths
        asked, options = asked_at(row, paths, guessed=self.name == GUESSED)
        rationales: tuple[str, ...] = ()
        for name in ("rationale", "rationales"):
            for path in columns_of_list(row, paths[name]) if name in paths else ():
                told, are_steps = look_up(row, path), names_steps(path)
                if name == "rationale" and not are_steps:
                    refuse_unclear_list(told, path)
                if isinstance(told, list) and not are_steps:
                    told = [one for one, right in zip(told, are_right(row, len(told)), strict=True) if right]
                rationales += as_rationales(told, are_steps=are_steps)
        answer_field = next(name for name in _ANSWERS if name in paths)
        judged = "teacher_answer" in paths
        wrong = refuse_known_wrong(row, paths[answer_field], explained=bool(rationales), judged=judged)
        question = as_text(asked.text, "question")
        answer = as_answer(look_up(row, paths[answer_field]), paths[answer_field])
        literal = paths[answer_field].startswith("{")  # the template '{answer}' takes all of a text
        if self.name == GUESSED and not literal:
            refuse_unread_scale(row, columns_in(tuple(paths.values())), answer, paths[answer_field])
        if not literal and options is None:
            refuse_no_answer(answer, question, row, paths[answer_field])
        if isinstance(answer, str) and not literal and (begins_with_mark(answer) if rationales else has_mark(answer)):
            found = split_reply(answer)
            answer, rationales = found.answer, rationales or as_rationales(found.rationale)
        elif self.name == GUESSED and not literal and options is None:
            refuse_prose(answer, paths[answer_field], explained=bool(rationales))
        teacher = look_up(row, paths["teacher_answer"]) if judged else None
        return Fields(
            question=question,
            turns=asked.turns,
            answer=answer,
            # A solution that is only the answer, as in DAPO-Math-17k-Processed, explains nothing.
            rationales=tuple(text for text in dict.fromkeys(rationales) if text != str(answer)),
            options=options,
            counts_from=_ANSWERS[answer_field],
            id=as_id(look_up(row, paths["id"])) if "id" in paths else None,
            teacher_answer=None if teacher is None else str(teacher),
            known_wrong=wrong,
        )


@dataclass(frozen=True)
class Layout:
    """A layout whose fields are found by a function instead of by column names."""

    name: str
    read: Callable[[Mapping[str, Any]], Fields]
    needs: tuple[str, ...]
    """Columns that every row needs."""
    fits: Callable[[Mapping[str, Any]], bool]
    """Whether a row looks like this layout; used for guessing."""
    by_marks: bool = False
    """Whether the layout is recognised by marks inside a text, which some rows of a file may lack."""
    has_options: bool = False
    """Whether rows may have the options of multiple-choice questions."""

    def fields(self, row: Mapping[str, Any]) -> Fields:
        """The row's fields; raises RowError."""
        return self.read(row)


def asked_at(
    row: Mapping[str, Any],
    paths: Mapping[str, str],
    *,
    guessed: bool,
    remedy: str = ADD_COLUMN,
) -> tuple[Question, Options | None]:
    """(the question with its turns and options, those options) at the paths `question`, `turns` and `choices`.

    The question may be a text or a list of turns. A guessed map reads turns beside it wherever a row has them. Raises
    RowError for turns that end with another question and, with `remedy`, for a context column that a guessed map would
    leave out.
    """
    if guessed:
        refuse_partial(row, paths["question"])
    place = paths.get(TURNS, TURNS if guessed and is_turns(row.get(TURNS)) else None)
    turns = None if place is None else look_up(row, place)
    asked = _question_at(row, paths["question"])
    if not is_blank(turns):
        whole = read_question(turns, TURNS, {})
        last = whole.turns[-1][1] if whole.turns else whole.text
        if asked.text not in (whole.text, last):
            raise RowError("context", f"{TURNS} end with another question than the column of the question has")
        asked = whole
    refuse_slots(row, asked.text)
    if guessed:
        refuse_unread(row, columns_in(tuple(paths.values())), asked.text, remedy)
    if "choices" not in paths:
        return asked, None
    options = read_options(options_at(row, paths["choices"]))
    told = tuple((role, text) for role, text in asked.turns[:-1])
    if asked.turns:
        told += (("user", with_choices(asked.turns[-1][1], options.texts)),)
    text = with_choices(as_text(asked.text, "question"), options.texts)
    return replace(asked, text=text, turns=told), options


def _question_at(row: Mapping[str, Any], path: str) -> Question:
    """The question at a path, a text or a list of turns. What a template has before turns is their system text."""
    value, told = look_up(row, path), turns_at(row, path)
    if told is not None:
        turns, before = told
        return read_question(turns, "question", {"system": as_text(before, "question")} if before != "" else {})
    return read_question(value, "question", {}) if is_turns(value) else Question(as_text(value, "question"))


def field_map(paths: Mapping[str, str]) -> FieldMap:
    """A validated map; raises ConfigError for an unknown field, a missing question or answer, or an empty path."""
    for name, path in paths.items():
        if name not in OUR_FIELDS:
            near = difflib.get_close_matches(name, OUR_FIELDS, n=1)
            raise ConfigError(
                f"data.columns has the unknown field {name!r}",
                f"did you mean {near[0]!r}?" if near else "use " + ", ".join(OUR_FIELDS),
            )
        if not path.strip():
            raise ConfigError(f"data.columns.{name} is empty")
    if "question" not in paths:
        raise ConfigError("data.columns has no question", "add `question: COLUMN`")
    answers = [name for name in _ANSWERS if name in paths]
    if not answers:
        raise ConfigError("data.columns has no answer", "add `answer: COLUMN`")
    if len(answers) > 1:
        raise ConfigError(f"data.columns has both {' and '.join(answers)}", "keep one of them")
    if answers != ["answer"] and "choices" not in paths:
        raise ConfigError(f"data.columns has {answers[0]}, but no choices", "add `choices: COLUMN`")
    return FieldMap(dict(paths))
