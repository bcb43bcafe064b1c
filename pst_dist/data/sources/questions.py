"""Find the question in rows that need no answer, by the column rules of training rows.

`specs` reads the rows, `column_guess` and `options` know columns and choices. A row whose question cannot be read is a
`Reject`, as in `pst check`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.data.sample import Turns
from pst_dist.data.sources.column_guess import guess_paths
from pst_dist.data.sources.column_names import no_column
from pst_dist.data.sources.columns import TURNS, Layout, asked_at
from pst_dist.data.sources.conversations import Question as Asked
from pst_dist.data.sources.conversations import read_question
from pst_dist.data.sources.in_memory import plain_value
from pst_dist.data.sources.paths import is_anywhere
from pst_dist.data.sources.rows import Entry, RawRow, Reject, RowError
from pst_dist.data.sources.values import as_text
from pst_dist.errors import DataError

_LOOK_AT = 50
"""Number of rows from which the column is guessed."""
_CONVERSATIONS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "conversation": "conversation",
    "contents": "contents",
}
"""Known layouts of turns, and their column: here a conversation may end with its question."""


@dataclass(frozen=True)
class Question:
    """One row that asks something."""

    text: str
    """The question with its context and options, as one text."""
    turns: Turns
    """The conversation that ends with the question; empty where the row has no more than a question."""
    row: dict[str, Any]
    """The row's own columns as plain JSON values, in their order."""
    path: str
    line: int

    def reject(self, code: str, what: str) -> Reject:
        """This row as a reject."""
        return Reject(self.path, self.line, code, what, self.text[:80])


@dataclass(frozen=True)
class QuestionMap:
    """Where the question is: a path or template, or a known layout of rows that have a reply."""

    found: Layout | Mapping[str, str]
    guessed: bool = True

    def describe(self) -> Any:
        """Plain data for a fingerprint."""
        return self.found.name if isinstance(self.found, Layout) else dict(self.found)

    def question(self, row: Mapping[str, Any]) -> Asked:
        """The question with its context and options; raises RowError."""
        if isinstance(self.found, Layout):
            column = _CONVERSATIONS.get(self.found.name)
            if column is not None:
                return read_question(row.get(column), column, row)
            fields = self.found.fields(row)
            return Asked(fields.question, fields.turns)
        remedy = "name both: --question '{COLUMN} {QUESTION}'"
        return asked_at(row, self.found, guessed=self.guessed, remedy=remedy)[0]


def question_map(setting: str | None, rows: Sequence[Mapping[str, Any]], path: str | Path) -> QuestionMap:
    """The map for rows like these; `setting` is a column, a path or a template, None to guess.

    Raises DataError, listing the columns, when there is no such column or none that can be the question.
    """
    if setting is not None:
        if rows and not is_anywhere(rows, setting):
            raise no_column("question", setting, rows, path, "--question")
        return QuestionMap({"question": setting}, guessed=False)
    found = guess_paths(rows)
    if not isinstance(found, Layout):
        found = {name: place for name, place in found.items() if name in ("question", "choices", TURNS)}
        if "question" not in found:
            raise no_column("question", "question", rows, path, "--question")
    elif not _reads_any(found, rows):
        raise no_column("question", "question", rows, path, "--question")
    return QuestionMap(found)


def _reads_any(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> bool:
    for row in rows:
        try:
            QuestionMap(layout).question(row)
        except RowError:
            continue
        return True
    return False


def read_questions(
    entries: Iterator[Entry], setting: str | None, path: str | Path
) -> tuple[QuestionMap, Iterator[Question | Reject]]:
    """(the map, a question or a reject for each entry, in order); reads no further than it must."""
    first = list(itertools.islice(entries, _LOOK_AT))
    sampled = [entry.value for entry in first if isinstance(entry, RawRow)]
    if not sampled and first:
        raise DataError(f"none of the first {len(first)} rows can be read: {first[0]}", "fix the file", path=path)
    found = question_map(setting, sampled, path)
    return found, (_question(entry, found) for entry in itertools.chain(first, entries))


def _question(entry: Entry, found: QuestionMap) -> Question | Reject:
    if isinstance(entry, Reject):
        return entry
    try:
        asked = found.question(entry.value)
        text = as_text(asked.text, "question")
        row = {str(name): plain_value(value, entry.label, str(name)) for name, value in entry.value.items()}
    except RowError as error:
        return entry.reject(error.code, error.what)
    except DataError as error:
        return entry.reject("type", error.what)
    return Question(text, asked.turns, row, entry.path, entry.line)
