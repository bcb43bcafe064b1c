"""Read the options of a multiple-choice row from their common layouts, and append them to the question in one format.

Options are lettered A, B, C… in the order of the row. `choices` finds out which one an answer means.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.tasks.scoring import kind_of, snippet

LETTERS = string.ascii_uppercase
"""The letters of the options, in order; also the maximum number of options."""
LETTER_MARK = re.compile(r"\(?([A-Za-z])(?:[).:]\s*| \)\s+)")
"""A letter in front of an option's text; MathQA writes `a ) 38`."""

_HEADING = re.compile(r"(?:answer )?(?:choices|options):", re.IGNORECASE)
_NUMBER_MARK = re.compile(r"\(?(\d{1,2})[).:]\s+")
_LABEL_KEYS = ("label", "key", "letter", "id")
_TEXT_KEYS = ("text", "value", "content", "option", "choice")


@dataclass(frozen=True)
class Options:
    """The options of one row, in order A, B, C…"""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """The labels in the row, such as `1` or `option1`. Empty if they are A, B, C… or missing."""


def read_options(value: Any) -> Options:
    """Options from a list of texts, {"A": …, "B": …}, {"label": […], "text": […]}, a list of {"label", "text"}, or one
    text that lists them (see `options_in_text`).

    Leading marks such as `A)` are removed if all options have them. Raises RowError for a missing option, fewer than
    two or more than 26 options, and labels that are neither A, B, C… nor consecutive numbers.
    """
    if value is None:
        raise RowError("missing", "choices is missing")
    names, values = _named_options(value)
    while names and values and _is_missing(values[-1]):
        names, values = names[:-1], values[:-1]
    texts = [_option_text(item, LETTERS[min(place, 25)]) for place, item in enumerate(values)]
    if not 2 <= len(texts) <= len(LETTERS):
        raise RowError("choices", f"choices has {len(texts)} options, expected 2 to {len(LETTERS)}")
    if names:
        return _by_label([str(name).strip() for name in names], texts)
    for pattern, expected in ((LETTER_MARK, list(LETTERS)), (_NUMBER_MARK, [str(k + 1) for k in range(26)])):
        marks = [pattern.match(text) for text in texts]
        if all(mark and mark.group(1).upper() == name for mark, name in zip(marks, expected, strict=False)):
            bare = tuple(text[mark.end() :] or text for text, mark in zip(texts, marks, strict=True) if mark)
            return Options(bare, tuple(expected[: len(bare)]) if pattern is _NUMBER_MARK else ())
    return Options(tuple(texts))


def _named_options(value: Any) -> tuple[list[Any], list[Any]]:
    """(names, values) of the options. A plain list has no names."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _object_in(value)
    if isinstance(value, str) and (listed := options_in_text(value)):
        return [], listed
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels, texts = value.get("label"), value["text"]
        if labels is None:
            return [], texts
        if not isinstance(labels, list) or len(labels) != len(texts):
            raise RowError("choices", "choices does not have one label for each text")
        return labels, texts
    if isinstance(value, Mapping):
        return list(value), list(value.values())
    if isinstance(value, str):
        what = f"choices is a text in which no options are recognised: {snippet(value)}"
        raise RowError("choices", f"{what}; if it is something else, set data.columns without it")
    if not isinstance(value, list):
        raise RowError("type", f"choices is {kind_of(value)}, expected a list or an object")
    if value and all(isinstance(item, Mapping) for item in value):
        label = next((key for key in _LABEL_KEYS if all(key in item for item in value)), None)
        text = next((key for key in _TEXT_KEYS if all(key in item for item in value)), None)
        if text is None:
            raise RowError("choices", "choices is a list of objects without a text")
        return [item[label] for item in value] if label else [], [item[text] for item in value]
    return [], value


def _object_in(text: str) -> Any:
    """The object in a JSON text; the text itself if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _option_text(value: Any, letter: str) -> str:
    if _is_missing(value):
        raise RowError("missing", f"choice {letter} is missing or empty")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("type", f"choice {letter} is {kind_of(value)}, expected text")
    if "\x00" in str(value):
        raise RowError("nul", f"choice {letter} contains a NUL character")
    return str(value).strip()


def _by_label(names: list[str], texts: list[str]) -> Options:
    """Options in the order of their labels, so that "option B" in a rationale is the option written as (B)."""
    letters = [option_name(name)[1].upper() for name in names]
    if sorted(letters) == list(LETTERS[: len(letters)]):
        return Options(tuple(text for _, text in sorted(zip(letters, texts, strict=True))))
    if all(letter.isdigit() for letter in letters):
        order = sorted(range(len(names)), key=lambda k: int(letters[k]))
        counted = [int(letters[k]) for k in order]
        if counted in (list(range(len(names))), list(range(1, len(names) + 1))):
            return Options(tuple(texts[k] for k in order), tuple(names[k] for k in order))
    raise RowError("choices", f"choices has labels {', '.join(map(snippet, names[:6]))}; expected A, B, C… or 1, 2, 3…")


def option_name(name: str) -> tuple[str, str]:
    """Stem and letter or number of a column or key that names an option: `option_a` -> (option, a); else ("", "")."""
    found = re.fullmatch(
        r"(|option|opt|op|qop|choice|answer|ans|ending|sol|solution|candidate)([a-z]|\d{1,2})", plain_name(name)
    )
    return (found.group(1), found.group(2)) if found else ("", "")


@functools.lru_cache(maxsize=64)
def option_columns(columns: tuple[str, ...]) -> str:
    """Columns with one option each, as a path for data.columns.choices: `A, B, C, D`; "" if there are none.

    They share a stem, as option_a and option_b do, and run from A, 0 or 1 without a gap.
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
    """The question followed by its options, `Answer choices: (A) x, (B) y.`, unless it lists them already.

    A question lists its options if each text follows its letter, in order: "(A) x (B) y", "A. x". It is not enough that
    the texts occur somewhere: "How many of the 12 are left?" does not list the options 1 and 2. Raises RowError for a
    question that lists them with other letters.
    """
    choices = list(choices)
    place = 0
    for letter, choice in zip(LETTERS, choices, strict=False):
        found = re.compile(rf"(?<!\w)\(?{letter}[).:]\s{{0,3}}{re.escape(choice)}(?!\w)").search(question, place)
        if found is None:
            _refuse_other_letters(question, choices)
            listed = ", ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
            return f"{question} Answer choices: {listed}."
        place = found.end()
    return question


def _refuse_other_letters(question: str, choices: Sequence[str]) -> None:
    letters = ""
    for choice in choices:
        found = re.search(rf"(?<!\w)\(?([A-Z])[).:]\s{{0,3}}{re.escape(choice)}(?!\w)", question)
        if found is None:
            return
        letters += found.group(1)
    if letters != LETTERS[: len(letters)] and sorted(letters) == list(LETTERS[: len(letters)]):
        raise RowError("choices", f"the question lists the options in another order than choices: {', '.join(letters)}")


def listed_options(question: str) -> int:
    """Number of options that a question lists as (A) …, (B) … or A) …, B) …; 0 if it lists none."""
    text = question[max(question.lower().rfind("answer choices"), 0) :]
    # "Vitamin A. Or plan B: ..." lists nothing: these marks count only at the start of a line.
    count = max(len(_marks(text, mark)) for mark in (r"\({}\)", r"(?<![\w(]){}\)", r"^[ \t]*{}[.:] "))
    return count if count > 1 else 0


def _marks(text: str, mark: str) -> list[re.Match[str]]:
    """The matches of the marks of A, B, C…, in this order, until one is missing."""
    found: list[re.Match[str]] = []
    for letter in LETTERS:
        match = re.compile(mark.format(letter), re.MULTILINE).search(text, found[-1].end() if found else 0)
        if match is None:
            break
        found.append(match)
    return found


def options_in_text(text: str) -> list[str]:
    """Options listed in one text, as a JSON list, as a list that Python printed (`['a', 'b']`, numpy's `['a' 'b']`),
    as lines `A. cat` or `1. cat`, perhaps below "Options:", or as `a ) 38 , b ) 27`; empty if that is not certain."""
    if text.lstrip().startswith("["):
        found = printed_texts(text)
        return found if len(found) > 1 else []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 2 and _HEADING.fullmatch(lines[0]):
        lines = lines[1:]
    if len(lines) > 1:
        numbers = [_NUMBER_MARK.match(line) for line in lines]
        if [mark and mark[1] for mark in numbers] == [str(k + 1) for k in range(len(lines))]:
            return lines  # with their numbers, which an answer may name
        marked = [(LETTER_MARK.match(line), line) for line in lines]
        if [mark and mark[1].upper() for mark, _ in marked] == list(LETTERS[: len(lines)]):
            return [line[mark.end() :] for mark, line in marked if mark]
    marks = _marks(text.upper(), r"(?:^|(?<=[\s,;(])){} ?\)") if len(text.upper()) == len(text) else []
    if len(marks) < 2 or text[: marks[0].start()].strip(" ("):
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end() : end].strip(" ,;(\n\t") for mark, end in zip(marks, ends, strict=True)]


def printed_texts(text: str) -> list[str]:
    """The texts of a list in JSON or as Python or numpy prints it; empty if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _printed_list(text.strip())
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []


_PRINTED = re.compile(r"""[\s,]*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"(?=[\s,\]]))""", re.DOTALL)


def _printed_list(text: str) -> list[str]:
    """The texts of a list as Python or numpy prints it, as CSV files written by pandas have it; empty if it is none."""
    inner = text.strip()
    if not inner.endswith("]"):
        return []
    found: list[str] = []
    place, end = 1, len(inner) - 1
    while inner[place:end].strip(" \n\r\t,"):
        match = _PRINTED.match(inner, place)
        if match is None or match.end() > end or len(found) > len(LETTERS):
            return []
        raw = match.group(1) if match.group(1) is not None else match.group(2)
        found.append(re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), raw))
        place = match.end()
    return found
