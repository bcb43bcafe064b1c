"""Multiple choice: resolve an answer (a letter, an index or the text of an option) to the gold letter.

Whether indices count from 0 or from 1 is inferred from the whole file (`Convention`). If the file does not determine
it, the row is refused, never guessed. `options` reads the options themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pst_dist.data.sources.options import LETTER_MARK, LETTERS, Options, listed_options
from pst_dist.data.sources.rows import RowError
from pst_dist.data.tasks.number_markup import NotANumber
from pst_dist.data.tasks.numbers import number_of_json, read_number
from pst_dist.data.tasks.scoring import Task, kind_of, snippet

Reading = Literal["letter", "text", "index from 0", "index from 1"]
"""The ways in which an answer can name its option. A label from the row itself counts as a letter."""

_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_INDEX = re.compile(r"\d{1,3}", re.ASCII)
_REMEDY = "use answer_from_0 or answer_from_1 instead of answer in data.columns, or use letters"


@dataclass(frozen=True)
class Convention:
    """How the unambiguous rows of a file name their options; resolves the ambiguous ones."""

    letters: frozenset[Reading] = frozenset()
    """Readings of the single-letter answers that can only be read in one way."""
    numbers: frozenset[Reading] = frozenset()
    """Readings of the numeric answers that can only be read in one way: 0 is an index from 0."""
    shared: frozenset[Reading] | None = None
    """The readings that are possible for every numeric answer; None when there are no numbers."""

    def __or__(self, other: Convention) -> Convention:
        if self.shared is None or other.shared is None:
            shared = other.shared if self.shared is None else self.shared
        else:
            shared = self.shared & other.shared
        return Convention(self.letters | other.letters, self.numbers | other.numbers, shared)

    @property
    def counts_from(self) -> frozenset[Reading]:
        """The kinds of index that certainly occur."""
        return self.numbers - {"text"}


def convention_of(rows: Iterable[tuple[object, Options]]) -> Convention:
    """The convention that the rows (answer, options) of a file follow."""
    letters: set[Reading] = set()
    numbers: set[Reading] = set()
    shared: frozenset[Reading] | None = None
    for answer, options in rows:
        try:
            found = readings(answer, options)
        except RowError:
            continue
        into = numbers if _is_number(answer) else letters if _ALONE.fullmatch(str(answer).strip()) else None
        if into is not None and len(found) == 1:
            into.update(found)
        if into is numbers and found:
            shared = frozenset(found) if shared is None else shared & frozenset(found)
    return Convention(frozenset(letters), frozenset(numbers), shared)


def readings(answer: object, options: Options) -> dict[Reading, int]:
    """Every way to read an answer as an option, with the position of that option from 0. A label counts as a letter.

    Raises RowError for a wrong type, for a text that two options share, and for `B. dog` if option B is not "dog".
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError("answer", f"answer is {kind_of(answer)}, expected an option's letter, index or text")
    text = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer).strip()
    found: dict[Reading, int] = {}
    if text in options.labels:
        return {"letter": options.labels.index(text)}
    same = _same_text(answer, options.texts)
    if len(same) > 1:
        shared = " and ".join(LETTERS[place] for place in same)
        raise RowError("answer", f"answer {snippet(text)} matches the text of options {shared}")
    if same:
        found["text"] = same[0]
    alone = _ALONE.fullmatch(text)
    if alone and LETTERS.index(alone.group(1).upper()) < len(options.texts):
        found["letter"] = LETTERS.index(alone.group(1).upper())
    marked = LETTER_MARK.match(text)
    if marked and not alone and not same:
        place = LETTERS.index(marked.group(1).upper())
        if place not in _same_text(text[marked.end() :], options.texts):
            raise RowError("answer", f"answer {snippet(text)} is not option {LETTERS[place]}")
        found["letter"] = place
    index = _index(answer)
    if index is not None and not all(label.isdigit() for label in options.labels or ("no",)):
        if index < len(options.texts):
            found["index from 0"] = index
        if 1 <= index <= len(options.texts):
            found["index from 1"] = index - 1
    return found


def _same_text(answer: object, texts: Sequence[str]) -> list[int]:
    """Positions of the options that equal the answer: exactly, otherwise ignoring case, otherwise by numeric value."""
    text = str(answer).strip()
    if exact := [place for place, option in enumerate(texts) if option == text]:
        return exact
    if alike := [place for place, option in enumerate(texts) if _folded(option) == _folded(text)]:
        return alike
    value = _value(answer)
    return [] if value is None else [place for place, option in enumerate(texts) if _value(option) == value]


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".")


def _value(answer: object) -> object:
    try:
        return read_number(answer) if isinstance(answer, str) else number_of_json(answer)  # type: ignore[arg-type]
    except NotANumber:
        return None


def _index(answer: object) -> int | None:
    if isinstance(answer, float):
        return int(answer) if answer.is_integer() and answer >= 0 else None
    if isinstance(answer, int):
        return answer if answer >= 0 else None
    return int(str(answer)) if _INDEX.fullmatch(str(answer).strip()) else None


def _is_number(answer: object) -> bool:
    return isinstance(answer, int | float) or _index(answer) is not None


def chosen(answer: object, options: Options, told: Convention, counts_from: int | None = None) -> tuple[Reading, int]:
    """How an answer names its option, and the position of that option from 0.

    `counts_from` fixes what an index counts from; without it the convention of the file (`told`) decides between
    several readings. Raises RowError for an answer that matches no option or remains ambiguous.
    """
    found = readings(answer, options)
    shown = snippet(str(answer))
    if counts_from is not None and _is_number(answer):
        wanted: Reading = "index from 0" if counts_from == 0 else "index from 1"
        if wanted not in found:
            raise RowError(
                "answer", f"answer {shown} is not an index of {len(options.texts)} options counted from {counts_from}"
            )
        return wanted, found[wanted]
    if not found:
        raise RowError("answer", f"answer {shown} is not one of the {len(options.texts)} options")
    known = told.numbers if _is_number(answer) else told.letters
    if _is_number(answer) and _is_contradicted(found, told):
        ways = " and ".join(sorted(told.numbers))
        raise RowError("answer", f"answer {shown} is ambiguous: this file has answers by {ways}; {_REMEDY}")
    if _is_number(answer) and told.shared:
        found = {reading: place for reading, place in found.items() if reading in told.shared} or found
    if len(found) > 1 and len(known & set(found)) == 1:
        (reading,) = known & set(found)
        return reading, found[reading]
    if len(set(found.values())) > 1:
        ways = " or ".join(f"{LETTERS[place]} as {reading}" for reading, place in found.items())
        raise RowError("answer", f"answer {shown} may be {ways}, and no row of the file decides it; {_REMEDY}")
    return next(iter(found.items()))


def _is_contradicted(found: Mapping[Reading, int], told: Convention) -> bool:
    """Whether a number is an index in a file that counts from both 0 and 1, or a text in a file that uses indices."""
    return set(found) == {"text"} if len(told.counts_from) == 1 else bool(told.counts_from)


def gold_answer(
    task: Task, question: str, answer: object, options: Options | None, told: Convention, base: int | None
) -> str:
    """The canonical gold answer of a row; for a multiple-choice task, the letter of the right option.

    `base` is what an index counts from, if the column map defines it. Raises RowError or ValueError with the reason.
    """
    if options is None:
        gold = task.gold(answer)
        listed = listed_options(question) if task.choice_letters else 0
        if listed and LETTERS.index(gold) >= listed:
            raise RowError("answer", f"answer {gold} is not one of the {listed} options in the question")
        return gold
    if task.answer_type == "bool" and isinstance(answer, bool):
        return task.gold(answer)
    reading, place = chosen(answer, options, told, base)
    if task.choice_letters:
        if LETTERS[place] not in task.choice_letters:
            raise RowError(
                "answer", f"answer is option {LETTERS[place]}, but task {task.name} has only {task.choice_letters}"
            )
        return LETTERS[place]
    if task.answer_type == "bool":
        return task.gold(options.texts[place])
    if reading != "text":
        what = f"answer {snippet(str(answer))} names option {LETTERS[place]} by {reading.split()[0]}"
        raise RowError("answer", f"{what}, expected {task.answer_type} (set data.answer_type=choice if all answers do)")
    return task.gold(answer)
