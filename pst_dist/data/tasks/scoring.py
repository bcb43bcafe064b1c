"""How answers are found in text, normalised and compared.

The rules named `fine_tune_cot_*`, `yes_no` and `joined_letters` are exactly those of Fine-tune-CoT's evaluator for its
12 tasks, because published accuracies depend on them: they take the first thing that looks like an answer. The other
rules are for rows without a named task. They read an answer correctly or count it as unparsed. Gold answers are parsed
strictly for every task. `registry` assigns rules to tasks; `numbers` parses numbers.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pst_dist.data.sample import AnswerType
from pst_dist.data.tasks.number_answers import find_number, numbers_in
from pst_dist.data.tasks.number_markup import NotANumber
from pst_dist.data.tasks.numbers import number_of_json, read_number, write_number

Rule = Literal[
    "fine_tune_cot_numbers",
    "fine_tune_cot_letters",
    "number",
    "marked_letters",
    "yes_no",
    "joined_letters",
    "dates",
    "whole_text",
    "math",
]

_TOLERANCE = 1e-6
_KINDS: dict[str, str] = {
    "fine_tune_cot_numbers": "a number",
    "fine_tune_cot_letters": "a choice letter",
    "number": "a number",
    "marked_letters": "a choice letter",
    "yes_no": "yes or no",
    "joined_letters": "letters",
    "dates": "a date",
    "whole_text": "text",
    "math": "a number, a time or a mathematical expression",
}
_NEVER_GUESSED = ("number", "marked_letters", "dates", "math")
"""Rules that find no answer in an output without its answer marker: its last number may be an intermediate result."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question: what its answers look like and when two of them are equal."""

    name: str
    answer_type: AnswerType
    rule: Rule
    """How candidate answers are found in text."""
    choice_letters: str = ""
    """The possible letters of a multiple-choice answer; empty for other tasks."""
    numeric: bool = False
    """For `fine_tune_cot_numbers`: compare as floats within 1e-6 and write 43.0 as 43. Otherwise compare as strings."""
    percent_is_hundredths: bool = False
    """For `number`: 50 % is 0.5. Otherwise the percent sign is treated as a unit, and 50 % is 50."""
    summary: str = ""
    """A short description of the task."""

    def candidates(self, text: str) -> list[str]:
        """Everything in `text` that looks like an answer, in order, in canonical form."""
        return _candidates(self, text)

    def cleanse(self, text: str) -> str | None:
        """The answer in a piece of answer text; None (unparsed) where there is no certain answer.

        This is the first candidate, except for `number`, `math` and `marked_letters`, which never choose among several.
        """
        if self.rule == "number":
            value = find_number(text, percent_is_hundredths=self.percent_is_hundredths)
            return None if value is None else write_number(value)
        if self.rule == "math":
            from pst_dist.data.tasks.math_answers import math_answer

            return math_answer(text)
        if self.rule == "marked_letters":
            return _only_letter(text, self.choice_letters)
        found = self.candidates(text)
        return found[0] if found else None

    def extract(self, completion: str, marker: str | None) -> str | None:
        """The answer in a whole completion: what `cleanse` finds after `marker`, or in all of it if marker is None.

        When the text lacks the marker, Fine-tune-CoT's rules take the last candidate, because the rationale may have
        led to its answer without a marker. The rules for numbers, letters and dates without a named task find nothing.
        """
        if marker is None:
            return self.cleanse(completion)
        before, found, after = completion.partition(marker)
        if found:
            return self.cleanse(after)
        if self.rule in _NEVER_GUESSED:
            return None
        candidates = self.candidates(before)
        return candidates[-1] if candidates else None

    def is_correct(self, prediction: str | None, gold: str) -> bool:
        """Whether a normalised prediction equals a gold answer. False for None, which means unparsed."""
        if prediction is None:
            return False
        if prediction == gold:
            return True
        if self.rule == "number":
            return _equal(prediction, gold, self.percent_is_hundredths)
        if self.rule == "math":
            from pst_dist.data.tasks.math_answers import same_math

            return same_math(prediction, gold)
        if self.numeric:
            return _close(prediction, gold)
        if self.rule == "whole_text":
            return _folded(prediction) == _folded(gold)
        return False

    def gold(self, value: object) -> str:
        """The canonical form of a gold answer; raises ValueError with the reason when it is not valid.

        Stricter than `cleanse`: a gold answer that cannot be parsed completely is an error in the data. JSON numbers
        are valid for number tasks, true and false for yes/no tasks. `sources.choices` resolves an index or the text of
        an option, which need the options.
        """
        return _gold(self, value)


def _candidates(task: Task, text: str) -> list[str]:
    rule = task.rule
    if rule == "number":
        return [write_number(value) for value in numbers_in(text, percent_is_hundredths=task.percent_is_hundredths)]
    if rule == "math":
        only = task.cleanse(text)
        return [] if only is None else [only]
    if rule == "fine_tune_cot_numbers":
        found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return [_shortest(number) for number in found] if task.numeric else found
    if rule == "fine_tune_cot_letters":
        return re.findall(f"[{task.choice_letters}]", text)
    if rule == "marked_letters":
        letters = task.choice_letters
        # A bracketed letter is unambiguous. A bare A or I may be a word, so it counts only if none is bracketed.
        bracketed = re.findall(rf"\(([{letters}{letters.lower()}])\)", text)
        return [letter.upper() for letter in bracketed] or re.findall(rf"\b([{letters}])\b", text)
    if rule == "yes_no":
        # Only these marks separate words, so "yes!" and "yes-" are not candidates. With them StrategyQA's teacher would
        # score 53.76 instead of the published 53.45.
        return [word for word in re.split(r"[\"'.:,\s]", text.lower()) if word in ("yes", "no")]
    if rule == "joined_letters":
        joined = re.sub(r"[\"'.\s]", "", text)
        return [joined] if joined else []
    if rule == "dates":
        return _dates(text)
    whole = " ".join(text.split())
    return [whole] if whole else []


def _shortest(number: str) -> str:
    """043.50 -> 43.5, -0.0 -> 0. Works on the digits, so no number is too large."""
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    whole, _, fraction = digits.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    if whole == "0" and not fraction:
        return "0"
    return f"{sign}{whole}.{fraction}" if fraction else sign + whole


def _close(left: str, right: str) -> bool:
    try:
        a, b = float(left), float(right)
    except ValueError:
        return False
    # Numbers beyond the range of a float are equal only if their digits are, which was checked before.
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= _TOLERANCE


def _equal(prediction: str, gold: str, percent_is_hundredths: bool) -> bool:
    """Whether two texts are numbers with the same value."""
    try:
        left, right = (read_number(text, percent_is_hundredths=percent_is_hundredths) for text in (prediction, gold))
    except NotANumber:
        return False
    return left == right


def _only_letter(text: str, letters: str) -> str | None:
    """The one choice letter in a text: at its start with a mark, in brackets, or on its own."""
    leading = re.match(r"[\s\"'*]*\(?([A-Za-z])(?:[).:,;\"'*]|\s*$)", text)
    if leading and leading.group(1).upper() in letters:
        # "C, as A is wrong" means C; "(B) or (C)" and "B, C" are ambiguous.
        another = re.match(r"\s*(?:(?:or\b|and\b|[/,&])\s*)?\(?[A-Z](?![\w'])", text[leading.end() :])
        return None if another else leading.group(1).upper()
    # A bracketed letter is unambiguous; a bare A or I before a word may be a word.
    found = {letter.upper() for letter in re.findall(rf"\(([{letters}{letters.lower()}])\)", text)}
    found = found or set(re.findall(rf"(?<![\w'])(?![AI]\s+[a-z])([{letters}])(?![\w'])", text))
    return found.pop() if len(found) == 1 else None


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".")


# "No, because ..." says no; "No one knows" and "not yes" do not say either.
_YES_NO = re.compile(r"\W*(?:yes|no)(?:\W*$|\s?[^\w\s])", re.IGNORECASE)
_DATE = re.compile(r"(?<!\d)(?:(\d{4}-\d{1,2}-\d{1,2})|(\d{1,2}/\d{1,2}/\d{4}))(?!\d)")


def _dates(text: str) -> list[str]:
    """Dates written 2021-04-30 or 4/30/2021, as MM/DD/YYYY."""
    found = []
    for iso, slashed in _DATE.findall(text):
        if iso:
            year, month, day = iso.split("-")
        else:
            month, day, year = slashed.split("/")
        with contextlib.suppress(ValueError):  # 30 February is no date
            found.append(datetime.date(int(year), int(month), int(day)).strftime("%m/%d/") + year)
    return found


def _gold(task: Task, value: object) -> str:
    wanted = _KINDS[task.rule]
    if isinstance(value, bool):
        if task.rule != "yes_no":
            raise ValueError(f"is true or false, expected {wanted}" + _unless_said(task, "bool"))
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if task.answer_type not in ("number", "math"):
            hint = "; name the column of its options data.columns.choices" if task.choice_letters else ""
            raise ValueError(f"is a number, expected {wanted}{hint}" + _unless_said(task, "number"))
        number = number_of_json(value)
        return _gold_number(task, number, write_number(number))
    if not isinstance(value, str):
        raise ValueError(f"is {kind_of(value)}, expected {wanted}")
    if task.answer_type == "number":
        try:
            number = read_number(value, percent_is_hundredths=task.percent_is_hundredths)
        except NotANumber as error:
            raise ValueError(f"{snippet(value)} is not a number: it {error}") from error
        return _gold_number(task, number, value)
    if task.choice_letters:
        return _gold_letter(task, value)
    if task.rule == "yes_no" and value.strip().lower() in ("true", "false"):
        return "yes" if value.strip().lower() == "true" else "no"
    found = list(dict.fromkeys(task.candidates(value)))
    if not found:
        raise ValueError(f"{snippet(value)} is not {wanted}")
    if len(found) > 1:
        raise ValueError(f"{snippet(value)} contains several: {', '.join(found[:3])}; expected {wanted}")
    if task.rule == "yes_no" and not _YES_NO.match(value):
        raise ValueError(f"{snippet(value)} contains more than {wanted}")
    if task.rule == "dates" and re.search(r"[1-9]", _DATE.sub("", value)):
        raise ValueError(f"{snippet(value)} contains more than {wanted}")
    return found[0]


def _gold_number(task: Task, value: Fraction, text: str) -> str:
    """The value as text, in a form that the task's own rule parses back.

    Fine-tune-CoT's evaluator compares the numbers of some tasks as strings. Where it can parse the gold answer
    unchanged, such as 51.0, that form is kept.
    """
    if task.rule in ("number", "math"):
        return write_number(value)
    as_it_stands = task.candidates(text)
    if len(as_it_stands) == 1 and read_number(as_it_stands[0]) == value:
        return as_it_stands[0]
    written = write_number(value)
    if task.candidates(written) != [written]:
        raise ValueError(f"{snippet(text)} is not a decimal number, which task {task.name} requires")
    return written


def _unless_said(task: Task, kind: str) -> str:
    """A hint for the case that text is expected only because no answer type was given."""
    return f" (set data.answer_type={kind} if all answers are)" if task.rule == "whole_text" else ""


def _gold_letter(task: Task, value: str) -> str:
    """A letter on its own, in brackets, or with a mark before the text of its option: B, (B), `B) x`, `B. x`."""
    text, letters = value.strip(), task.choice_letters
    alone = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", text) or re.match(r"\(?([A-Z])[).:]", text)
    if alone and alone.group(1).upper() in letters:
        return alone.group(1).upper()
    raise ValueError(f"{snippet(value)} is not a choice letter from {letters[0]} to {letters[-1]}")


def kind_of(value: object) -> str:
    """The JSON type of a value in words, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def snippet(text: str, width: int = 40) -> str:
    """The start of a text, quoted, with control characters escaped."""
    cut = text if len(text) <= width else text[: width - 1] + "…"
    return ascii(cut) if not cut.isprintable() else repr(cut)
