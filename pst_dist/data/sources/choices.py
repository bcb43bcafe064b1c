"""Multiple choice: a row's options in their common layouts, and the one gold letter that its answer means.

Options are lettered A, B, C… in the order of the row and written behind the question in one way. An answer may be a
letter, an index or the text of an option. What an index counts from is told from the whole file (`Convention`); where
the file does not tell, the row is refused, never guessed.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pst_dist.data.sources.rows import RowError
from pst_dist.data.tasks.numbers import NotANumber, number_of_json, read_number
from pst_dist.data.tasks.scoring import Task, kind_of, snippet

LETTERS = string.ascii_uppercase
"""What options are called, in order; a row may have as many."""

Reading = Literal["letter", "text", "index from 0", "index from 1"]
"""How an answer may name its option."""

_LETTER_MARK = re.compile(r"\(?([A-Za-z])[).:]\s*")
_NUMBER_MARK = re.compile(r"\(?(\d{1,2})[).:]\s+")
_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_INDEX = re.compile(r"\d{1,3}", re.ASCII)
_REMEDY = "name its column answer_from_0 or answer_from_1 in data.columns, or give letters"
_LABEL_KEYS = ("label", "key", "letter", "id")
_TEXT_KEYS = ("text", "value", "content", "option", "choice")


@dataclass(frozen=True)
class Options:
    """The options of one row, in order A, B, C…"""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """What the row itself calls them, `1` or `option1`; empty where that is A, B, C… or nothing."""


def read_options(value: Any) -> Options:
    """Options from a list of texts, {"A": …, "B": …}, {"label": […], "text": […]} or a list of {"label", "text"}; also
    from one text that lists them, see `options_in_text`.

    Leading marks such as `A)` are taken off when all options have them. Raises RowError for a missing option, fewer
    than two, more than 26, and labels that are neither A, B, C… nor consecutive numbers.
    """
    if value is None:
        raise RowError("missing", "choices is missing")
    names, values = _named_options(value)
    while names and values and _is_missing(values[-1]):
        names, values = names[:-1], values[:-1]
    texts = [_option_text(item, LETTERS[min(place, 25)]) for place, item in enumerate(values)]
    if not 2 <= len(texts) <= len(LETTERS):
        raise RowError("choices", f"choices has {len(texts)} options, wanted 2 to {len(LETTERS)}")
    if names:
        return _by_label([str(name).strip() for name in names], texts)
    for pattern, expected in ((_LETTER_MARK, list(LETTERS)), (_NUMBER_MARK, [str(k + 1) for k in range(26)])):
        marks = [pattern.match(text) for text in texts]
        if all(mark and mark.group(1).upper() == name for mark, name in zip(marks, expected, strict=False)):
            bare = tuple(text[mark.end() :] or text for text, mark in zip(texts, marks, strict=True) if mark)
            return Options(bare, tuple(expected[: len(bare)]) if pattern is _NUMBER_MARK else ())
    return Options(tuple(texts))


def _named_options(value: Any) -> tuple[list[Any], list[Any]]:
    """(names, values); no names for a plain list."""
    if isinstance(value, str) and (listed := options_in_text(value)):
        return [], listed
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels, texts = value.get("label"), value["text"]
        if labels is None:
            return [], texts
        if not isinstance(labels, list) or len(labels) != len(texts):
            raise RowError("choices", "choices has not one label for each text")
        return labels, texts
    if isinstance(value, Mapping):
        return list(value), list(value.values())
    if not isinstance(value, list):
        raise RowError("type", f"choices is {kind_of(value)}, wanted a list or an object")
    if value and all(isinstance(item, Mapping) for item in value):
        label = next((key for key in _LABEL_KEYS if all(key in item for item in value)), None)
        text = next((key for key in _TEXT_KEYS if all(key in item for item in value)), None)
        if text is None:
            raise RowError("choices", "choices are objects without a text")
        return [item[label] for item in value] if label else [], [item[text] for item in value]
    return [], value


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _option_text(value: Any, letter: str) -> str:
    if _is_missing(value):
        raise RowError("missing", f"choice {letter} is missing or empty")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("type", f"choice {letter} is {kind_of(value)}, wanted text")
    if "\x00" in str(value):
        raise RowError("nul", f"choice {letter} holds a NUL character")
    return str(value).strip()


def _by_label(names: list[str], texts: list[str]) -> Options:
    """Options in the order of their labels, so that a rationale's "option B" is the one that is written as (B)."""
    letters = [option_name(name)[1].upper() for name in names]
    if sorted(letters) == list(LETTERS[: len(letters)]):
        return Options(tuple(text for _, text in sorted(zip(letters, texts, strict=True))))
    if all(letter.isdigit() for letter in letters):
        order = sorted(range(len(names)), key=lambda k: int(letters[k]))
        counted = [int(letters[k]) for k in order]
        if counted in (list(range(len(names))), list(range(1, len(names) + 1))):
            return Options(tuple(texts[k] for k in order), tuple(names[k] for k in order))
    raise RowError("choices", f"choices are called {', '.join(map(snippet, names[:6]))}; wanted A, B, C… or 1, 2, 3…")


def option_name(name: str) -> tuple[str, str]:
    """Stem and letter or number of a column or key that names an option: `option_a` is (option, a); else ("", "")."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    found = re.fullmatch(r"(|option|opt|op|choice|answer|ans|ending|sol|solution|candidate)([a-z]|\d{1,2})", plain)
    return (found.group(1), found.group(2)) if found else ("", "")


def option_columns(columns: Sequence[str]) -> str:
    """The columns that hold one option each, as a path for data.columns.choices: `A, B, C, D`; "" where there are none.

    They share a stem, such as option_a and option_b, and run from A, 0 or 1 without a gap.
    """
    by_stem: dict[str, dict[str, str]] = {}
    for column in columns:
        stem, end = option_name(column)
        if end and not (stem == "" and end.isdigit()):
            by_stem.setdefault(stem, {})[end] = column
    for found in by_stem.values():
        for ends in (list(string.ascii_lowercase), [str(k) for k in range(26)], [str(k) for k in range(1, 27)]):
            run = [found[end] for end in ends[: len(found)] if end in found]
            if len(run) == len(found) > 1:
                return ", ".join(run)
    return ""


def with_choices(question: str, choices: Iterable[str]) -> str:
    """The question with its options behind it, `Answer choices: (A) x, (B) y.`, unless it lists them already.

    They are listed where each text follows its own letter, in order: "(A) x (B) y", "A. x". That the texts occur
    somewhere in the question is not enough: "How many of the 12 are left?" does not list the options 1 and 2.
    """
    choices = list(choices)
    place = 0
    for letter, choice in zip(LETTERS, choices, strict=False):
        found = re.compile(rf"(?<!\w)\(?{letter}[).:]\s{{0,3}}{re.escape(choice)}(?!\w)").search(question, place)
        if found is None:
            listed = ", ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
            return f"{question} Answer choices: {listed}."
        place = found.end()
    return question


def listed_options(question: str) -> int:
    """How many options a question lists as (A) …, (B) … or A) …, B) …; 0 where it lists none."""
    text = question[max(question.lower().rfind("answer choices"), 0) :]
    # "Vitamin A. Or plan B: ..." lists nothing: these marks count at the beginning of a line only.
    count = max(len(_marks(text, mark)) for mark in (r"\({}\)", r"(?<![\w(]){}\)", r"^[ \t]*{}[.:] "))
    return count if count > 1 else 0


def _marks(text: str, mark: str) -> list[re.Match[str]]:
    """Where the marks of A, B, C… are, in this order, until one is missing."""
    found: list[re.Match[str]] = []
    for letter in LETTERS:
        match = re.compile(mark.format(letter), re.MULTILINE).search(text, found[-1].end() if found else 0)
        if match is None:
            break
        found.append(match)
    return found


def options_in_text(text: str) -> list[str]:
    """Options that one text lists, as a JSON list or as `a ) 38 , b ) 27`; empty where it lists none for certain."""
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        return value if isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value) else []
    marks = _marks(text.upper(), r"(?:^|(?<=[\s,;(])){} ?\)") if len(text.upper()) == len(text) else []
    if len(marks) < 2 or text[: marks[0].start()].strip(" ("):
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end() : end].strip(" ,;(\n\t") for mark, end in zip(marks, ends, strict=True)]


@dataclass(frozen=True)
class Convention:
    """What the rows of a file tell about the answers that could be read in several ways."""

    letters: frozenset[Reading] = frozenset()
    """How those answers of one letter are meant that can be read in one way only: 0 is an index from 0."""
    numbers: frozenset[Reading] = frozenset()
    """The same of numbers."""
    shared: frozenset[Reading] | None = None
    """The readings that all numbers have in common; None when there are no numbers."""

    def __or__(self, other: Convention) -> Convention:
        if self.shared is None or other.shared is None:
            shared = other.shared if self.shared is None else self.shared
        else:
            shared = self.shared & other.shared
        return Convention(self.letters | other.letters, self.numbers | other.numbers, shared)

    @property
    def counts_from(self) -> frozenset[Reading]:
        """Which kinds of index there are for certain."""
        return self.numbers - {"text"}


def convention_of(rows: Iterable[tuple[object, Options]]) -> Convention:
    """What the rows (answer, options) of a file tell together."""
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
    """Every way in which an answer names an option, with the option's place from 0; a label counts as a letter.

    Raises RowError for a wrong type, a text that two options share, and `B. dog` where option B is something else.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RowError("answer", f"answer is {kind_of(answer)}, wanted an option's letter, index or text")
    text = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer).strip()
    found: dict[Reading, int] = {}
    if text in options.labels:
        return {"letter": options.labels.index(text)}
    same = _same_text(answer, options.texts)
    if len(same) > 1:
        shared = " and ".join(LETTERS[place] for place in same)
        raise RowError("answer", f"answer {snippet(text)} is the text of options {shared}")
    if same:
        found["text"] = same[0]
    alone = _ALONE.fullmatch(text)
    if alone and LETTERS.index(alone.group(1).upper()) < len(options.texts):
        found["letter"] = LETTERS.index(alone.group(1).upper())
    marked = _LETTER_MARK.match(text)
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
    """Places of the options with the answer's text: as it is, or else without case, or else with its value."""
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
    """How an answer names its option, and the option's place from 0.

    `counts_from` says outright what a number counts from; otherwise what the file tells decides between several
    readings. Raises RowError for an answer that is none of the options and for one that stays open.
    """
    found = readings(answer, options)
    shown = snippet(str(answer))
    if counts_from is not None and _is_number(answer):
        wanted: Reading = "index from 0" if counts_from == 0 else "index from 1"
        if wanted not in found:
            raise RowError("answer", f"answer {shown} is no index of {len(options.texts)} options from {counts_from}")
        return wanted, found[wanted]
    if not found:
        raise RowError("answer", f"answer {shown} is none of the {len(options.texts)} options")
    known = told.numbers if _is_number(answer) else told.letters
    if _is_number(answer) and _is_contradicted(found, told):
        ways = " and ".join(sorted(told.numbers))
        raise RowError("answer", f"answer {shown} is open: in this file answers are {ways}; {_REMEDY}")
    if _is_number(answer) and told.shared:
        found = {reading: place for reading, place in found.items() if reading in told.shared} or found
    if len(found) > 1 and len(known & set(found)) == 1:
        (reading,) = known & set(found)
        return reading, found[reading]
    if len(set(found.values())) > 1:
        ways = " or ".join(f"{LETTERS[place]} as {reading}" for reading, place in found.items())
        raise RowError("answer", f"answer {shown} may be {ways}, and no row of the file tells; {_REMEDY}")
    return next(iter(found.items()))


def _is_contradicted(found: Mapping[Reading, int], told: Convention) -> bool:
    """Whether a number is an index in a file with indices from 0 and from 1, or a text in a file with indices."""
    return set(found) == {"text"} if len(told.counts_from) == 1 else bool(told.counts_from)


def gold_answer(
    task: Task, question: str, answer: object, options: Options | None, told: Convention, base: int | None
) -> str:
    """The canonical gold answer of a row; the letter of the right option for a task of multiple choice.

    `base` is what an index counts from, where the column map says so. Raises RowError or ValueError with the reason.
    """
    if options is None:
        gold = task.gold(answer)
        listed = listed_options(question) if task.choice_letters else 0
        if listed and LETTERS.index(gold) >= listed:
            raise RowError("answer", f"answer {gold} is none of the {listed} options in the question")
        return gold
    if task.answer_type == "bool" and isinstance(answer, bool):
        return task.gold(answer)
    reading, place = chosen(answer, options, told, base)
    if task.choice_letters:
        if LETTERS[place] not in task.choice_letters:
            raise RowError("answer", f"answer is option {LETTERS[place]}, task {task.name} has {task.choice_letters}")
        return LETTERS[place]
    if reading != "text":
        what = f"answer {snippet(str(answer))} names option {LETTERS[place]} by {reading.split()[0]}"
        raise RowError("answer", f"{what}, wanted {task.answer_type} (say data.answer_type=choice if all do)")
    return task.gold(answer)
