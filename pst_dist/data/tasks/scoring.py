"""How answers are found in text, brought to one form and compared.

The rules for the 12 tasks are those of Fine-tune-CoT's evaluator, to the letter, because published numbers
depend on them; the generic rules, for rows of no named task, are a little stricter. Which task follows
which rule is `registry`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pst_dist.data.sample import AnswerType

Rule = Literal["numbers", "letters", "marked_letters", "yes_no", "joined_letters", "dates", "whole_text"]

_TOLERANCE = 1e-6
_KINDS: dict[str, str] = {
    "numbers": "a number",
    "letters": "a choice letter",
    "marked_letters": "a choice letter",
    "yes_no": "yes or no",
    "joined_letters": "letters",
    "dates": "a date",
    "whole_text": "text",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question: how its answers look and when two are the same."""

    name: str
    answer_type: AnswerType
    rule: Rule
    """How candidates for an answer are found in text."""
    choice_letters: str = ""
    """The letters that an answer may be, for multiple choice; empty otherwise."""
    numeric: bool = False
    """Compare as numbers within 1e-6 and write 43.0 as 43; otherwise the strings must be equal."""
    summary: str = ""
    """What is asked, in a few words."""

    def candidates(self, text: str) -> list[str]:
        """Everything in `text` that looks like an answer, in order, in canonical form."""
        return _candidates(self, text)

    def cleanse(self, text: str) -> str | None:
        """The first candidate in a piece of answer text; None where there is none: a parse failure."""
        found = self.candidates(text)
        return found[0] if found else None

    def extract(self, completion: str, marker: str | None) -> str | None:
        """The answer in a whole completion: the first candidate after `marker`.

        When the marker is not in the text, the last candidate: a rationale that ran into its answer without
        one. With marker None, the first candidate. The rule is Fine-tune-CoT's.
        """
        if marker is None:
            return self.cleanse(completion)
        before, found, after = completion.partition(marker)
        if found:
            return self.cleanse(after)
        candidates = self.candidates(before)
        return candidates[-1] if candidates else None

    def is_correct(self, prediction: str | None, gold: str) -> bool:
        """Whether a cleansed prediction equals a gold answer; None, a parse failure, never does."""
        if prediction is None:
            return False
        if prediction == gold:
            return True
        if self.numeric:
            return _close(prediction, gold)
        if self.rule == "whole_text":
            return _folded(prediction) == _folded(gold)
        return False

    def gold(self, value: object, choices: Sequence[str] = ()) -> str:
        """The canonical form of a gold answer; raises ValueError, with the reason, when it is not one.

        Stricter than `cleanse`: a gold answer with two numbers in it is a fault in the data, and is not
        settled by taking the first. Numbers of JSON are answers of number tasks, true and false of yes/no
        tasks, a position in `choices` (from 0) or the text of a choice those of multiple choice.
        """
        return _gold(self, value, choices)


def _candidates(task: Task, text: str) -> list[str]:
    rule = task.rule
    if rule == "numbers":
        found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return [_shortest(number) for number in found] if task.numeric else found
    if rule == "letters":
        return re.findall(f"[{task.choice_letters}]", text)
    if rule == "marked_letters":
        letters = task.choice_letters
        # A bracketed letter is meant as one; a bare A or I may be a word, so it counts only without those.
        bracketed = re.findall(rf"\(([{letters}{letters.lower()}])\)", text)
        return [letter.upper() for letter in bracketed] or re.findall(rf"\b([{letters}])\b", text)
    if rule == "yes_no":
        # Only these marks part words. "yes!" and "yes-" are no candidates: with them StrategyQA's teacher
        # would score 53.76 instead of the published 53.45.
        return [word for word in re.split(r"[\"'.:,\s]", text.lower()) if word in ("yes", "no")]
    if rule == "joined_letters":
        joined = re.sub(r"[\"'.\s]", "", text)
        return [joined] if joined else []
    if rule == "dates":
        return _dates(text)
    whole = " ".join(text.split())
    return [whole] if whole else []


def _shortest(number: str) -> str:
    """043.50 -> 43.5, -0.0 -> 0; on the digits themselves, so no number is too large."""
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
    # Beyond the range of a float only equal digits are equal, and those were compared before.
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= _TOLERANCE


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".")


def _dates(text: str) -> list[str]:
    """Dates written 2021-04-30 or 4/30/2021, as MM/DD/YYYY."""
    found = []
    for iso, slashed in re.findall(r"(?<!\d)(?:(\d{4}-\d{1,2}-\d{1,2})|(\d{1,2}/\d{1,2}/\d{4}))(?!\d)", text):
        if iso:
            year, month, day = iso.split("-")
        else:
            month, day, year = slashed.split("/")
        if 1 <= int(month) <= 12 and 1 <= int(day) <= 31:
            found.append(f"{int(month):02d}/{int(day):02d}/{year}")
    return found


def _gold(task: Task, value: object, choices: Sequence[str]) -> str:
    wanted = _KINDS[task.rule]
    if isinstance(value, bool):
        if task.rule != "yes_no":
            raise ValueError(f"is true or false, wanted {wanted}" + _unless_said(task, "bool"))
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _gold_number(task, value, choices)
    if not isinstance(value, str):
        raise ValueError(f"is {kind_of(value)}, wanted {wanted}")
    if task.choice_letters:
        return _gold_letter(task, value, choices)
    if task.rule == "yes_no" and value.strip().lower() in ("true", "false"):
        return "yes" if value.strip().lower() == "true" else "no"
    found = list(dict.fromkeys(task.candidates(value)))
    if not found:
        raise ValueError(f"{snippet(value)} is not {wanted}")
    if len(found) > 1:
        raise ValueError(f"{snippet(value)} holds several: {', '.join(found[:3])}; wanted {wanted}")
    return found[0]


def _gold_number(task: Task, value: int | float, choices: Sequence[str]) -> str:
    if task.rule == "numbers":
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("is not a finite number")
        # 1e20 and 1e-7 are written out: an exponent would read as two numbers.
        digits = str(int(value)) if value == int(value) else f"{value:.12f}"
        return _shortest(digits)
    if task.choice_letters and isinstance(value, int) and choices:
        if not 0 <= value < min(len(choices), len(task.choice_letters)):
            raise ValueError(f"{value} is no position in {len(choices)} choices")
        return task.choice_letters[value]
    raise ValueError(f"is a number, wanted {_KINDS[task.rule]}" + _unless_said(task, "number"))


def _unless_said(task: Task, kind: str) -> str:
    """A hint where text is wanted only because nothing else was asked for."""
    return f" (say data.answer_type={kind} if all are)" if task.rule == "whole_text" else ""


def _gold_letter(task: Task, value: str, choices: Sequence[str]) -> str:
    """A lone letter, (B), `B)` or `B.` before a text, or the text of a choice."""
    text, letters = value.strip(), task.choice_letters
    alone = re.fullmatch(r"\(?([A-Za-z])[).:]*", text)
    if alone and alone.group(1).upper() in letters:
        return alone.group(1).upper()
    for letter, choice in zip(letters, choices, strict=False):
        if _folded(choice) == _folded(text):
            return letter
    led = re.match(rf"\(([{letters}])\)|([{letters}])[).:]", text)
    if led:
        return led.group(1) or led.group(2)
    raise ValueError(f"{snippet(value)} is no choice letter of {letters[0]} to {letters[-1]}")


def kind_of(value: object) -> str:
    """A value's JSON type in words, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def snippet(text: str, width: int = 40) -> str:
    """The beginning of a text, quoted and with control characters escaped."""
    cut = text if len(text) <= width else text[: width - 1] + "…"
    return ascii(cut) if not cut.isprintable() else repr(cut)
