"""`ReasoningSample`, the in-memory form of one row, with its answer types and id rules.

`sources` reads files and `tasks` decides which answers are right. This module only defines what a valid sample is.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pst_dist.errors import DataError

AnswerType = Literal["number", "choice", "bool", "text", "date", "math"]
ANSWER_TYPES: tuple[str, ...] = get_args(AnswerType)
SPLITS = ("train", "validation", "test")
SCHEMA_VERSION = 1

Turns = tuple[tuple[str, str], ...]
"""A conversation as (role, text): perhaps a system turn, then user and assistant turns, the question last."""
_ID = re.compile(r"[A-Za-z0-9_\-]{1,120}")


@dataclass(frozen=True, kw_only=True)
class ReasoningSample:
    """A question, its gold answer and zero or more teacher rationales for it; valid once constructed."""

    id: str
    """Stable name, `[A-Za-z0-9_-]{1,120}`. webdataset cuts a key at its first dot; in tar a slash is a folder."""
    question: str
    answer: str
    """The gold answer in the canonical form of its type."""
    rationales: tuple[str, ...] = ()
    """Teacher rationales, all different. May be empty if no arm needs them."""
    answer_type: AnswerType = "text"
    choices: tuple[str, ...] = ()
    """The options of a multiple-choice question, in order A, B, C…. `question` already lists them."""
    source: str = ""
    """Where the row came from: `file:line` or `file#index`."""
    part: str = ""
    """In a mixture, the name of the source that the row belongs to."""
    task: str = ""
    """In a mixture, the name of the task by which the row is scored."""
    turns: Turns = ()
    """The conversation that ends with the question, where the row has more than a question. `question` has all of it as
    one text."""
    synthetic: str = ""
    """The model that made the question up; empty for a question from elsewhere."""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise DataError(f"id {self.id!r} is not [A-Za-z0-9_-]{{1,120}}", path=self.source or None)
        if self.answer_type not in ANSWER_TYPES:
            raise DataError(
                f"answer_type {self.answer_type!r} is not one of {', '.join(ANSWER_TYPES)}", path=self.source or None
            )
        for name in ("question", "answer"):
            if not getattr(self, name).strip():
                raise DataError(f"{name} is empty", path=self.source or None)
        known = all(role in ("system", "user", "assistant") and text.strip() for role, text in self.turns)
        if self.turns and not (known and self.turns[-1][0] == "user"):
            raise DataError("turns are not a conversation that ends with a question", path=self.source or None)
        if any(not rationale.strip() for rationale in self.rationales):
            raise DataError("a rationale is empty", path=self.source or None)

    def to_json(self) -> dict[str, Any]:
        """A plain dict with lists instead of tuples, as stored in a shard."""
        # Later fields are left out where they are empty, so that the bytes of earlier shards stay what they were.
        later = ("part", "task", "turns", "synthetic")
        named = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        row = {name: value for name, value in named if value or name not in later}
        turns = {"turns": [list(turn) for turn in self.turns]} if self.turns else {}
        return {**row, "rationales": list(self.rationales), "choices": list(self.choices), **turns}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ReasoningSample:
        """Inverse of `to_json`; raises DataError when a field is missing or of the wrong type."""
        try:
            turns = tuple((role, text) for role, text in row.get("turns", ()))
            lists = {"rationales": tuple(row["rationales"]), "choices": tuple(row["choices"]), "turns": turns}
            return cls(**{**row, **lists})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not a valid sample: {error}") from error


def normalise_question(question: str) -> str:
    """The key by which two questions count as the same: NFKC, lower case, letters and digits only."""
    folded = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(re.findall(r"\w+", folded))


def sample_id(prefix: str, question: str, ordinal: int) -> str:
    """An id for a row that has none: dataset prefix, position in the file, and a digest of the question."""
    digest = hashlib.sha256(question.encode()).hexdigest()[:8]
    clean = re.sub(r"[^A-Za-z0-9_-]+", "-", prefix).strip("-")[:80] or "row"
    return f"{clean}-{ordinal:06d}-{digest}"


def question_group(question: str) -> int:
    """A 63-bit number that is the same for equal questions, regardless of spacing and capitalisation."""
    return int.from_bytes(hashlib.sha256(normalise_question(question).encode()).digest()[:8], "big") >> 1
