"""Find the number that a student's output gives as its answer, or nothing where that is not certain.

A student may put its number in a sentence ("So 12 pens."). This module finds the text that must be a number; `numbers`
parses it. Everything runs in time linear in the text. Like `numbers`, this source is shipped with the
lm-evaluation-harness task.
"""

from __future__ import annotations

import re
from fractions import Fraction

from pst_dist.data.tasks.number_markup import NotANumber
from pst_dist.data.tasks.numbers import NOT_UNITS, SCALES, read_number

_BOXED = "\\boxed{"
# Not before more digits: "1, 234" and "3 . 5" may be one number with stray spaces. Not after a digit: 5! is 120.
_CLAUSE_END = re.compile(
    r"(?<!\s)[,;](?=\s+[^\s\d]|\s*$)|(?<!\s)[.?](?=\s|$)|(?<![\s\d])!(?=\s|$)|[;\n]|\b(?:because|since|which)\b",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d|[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_NUMBER_BEGINS = re.compile(r"\\|" + _DIGIT.pattern)
_WORD = re.compile(r"[^\W\d_]+")
# Characters allowed directly before the digits of a number: signs, currencies, brackets, the point of `.5`.
_DASHES = "-+\u2212\u2013"
_BEFORE_DIGITS = frozenset(_DASHES + "$€£¥₹.*`\"'([ \u00a0")
_PLAIN_LEAD = re.compile(r"[\w\s:,.'\"*()\[\]#-]*")
# Words before a number that negate it, change its sign or leave it open. The words removed here are harmless there.
_NO_LEAD = (NOT_UNITS | {"no", "never", "without", "cannot", "because", "since"}) - {"by", "to", "and", "from", "but"}
_PUNCTUATION = ".,;:!?()[]\"'*`"


def find_number(text: str, *, percent_is_hundredths: bool = False) -> Fraction | None:
    """The number that a student's output gives; None if there is none, several, or one that cannot be parsed.

    If the text has a `\\boxed{}`, its content is the number; otherwise the whole text, if it is a number. Otherwise the
    first clause that contains a digit counts. It may contain words, one number and its unit; in an equation, the part
    after the last `=` counts. Nothing is guessed: "3 or 4" gives None.
    """
    text = text.strip()
    boxed = boxed_contents(text)
    if boxed:
        found = {_read(group, percent_is_hundredths) for group in boxed}
        return found.pop() if len(found) == 1 else None
    whole = _read(text, percent_is_hundredths)
    return whole if whole is not None else _read(_clause(text), percent_is_hundredths)


def numbers_in(text: str, *, percent_is_hundredths: bool = False) -> list[Fraction]:
    """Every number in a text that can be parsed on its own, in order."""
    words, found, place = text.split(), [], 0
    while place < len(words):
        width = 1
        if words[place] in ("-", "+", "$", "€", "£", "\u2212", "\u2013") and place + 1 < len(words):
            width = 2
        following = words[place + width].rstrip(_PUNCTUATION) if place + width < len(words) else ""
        if following.lower() in SCALES or following == "%" or re.fullmatch(r"\d{1,9}/\d{1,9}", following):
            width += 1
        value = None
        while value is None and width:
            piece = " ".join(words[place : place + width])
            if _DIGIT.search(piece):
                # ".5" begins with a point, "5." ends with one.
                value = _read(piece.lstrip(_PUNCTUATION[1:]).rstrip(_PUNCTUATION), percent_is_hundredths)
            width -= value is None
        if value is not None:
            found.append(value)
        place += max(width, 1)
    return found


def _read(text: str | None, percent_is_hundredths: bool) -> Fraction | None:
    try:
        return None if text is None else read_number(text, percent_is_hundredths=percent_is_hundredths)
    except NotANumber:
        return None


def boxed_contents(text: str) -> list[str | None]:
    """The content of each `\\boxed{...}`; None for one that is not closed."""
    groups: list[str | None] = []
    for piece in text.split(_BOXED)[1:]:
        depth = 1
        for place, char in enumerate(piece):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                groups.append(piece[:place])
                break
        else:
            groups.append(None)
    return groups


def _clause(text: str) -> str | None:
    """The number in the first clause with a digit, from its sign to the clause's end; None where words exclude it."""
    first = _DIGIT.search(text)
    if first is None:
        return None
    begin, end = 0, len(text)
    for cut in _CLAUSE_END.finditer(text):
        if cut.start() > first.start():
            end = cut.start()
            break
        if not cut.group().isalpha():
            begin = cut.end()
    clause = text[begin:end].rpartition("=")[2]
    begins = _NUMBER_BEGINS.search(clause)
    if begins is None:
        return None
    start = begins.start()
    while start and clause[start - 1] in _BEFORE_DIGITS:
        start -= 1
    lead, number = clause[:start], clause[start:].strip()
    if lead:
        # x5 and x-5 are not numbers, and the dash in "Answer - 5" may not be a sign.
        apart = clause[start].isspace() or lead[-1] in ":(["
        if not apart or (number[0] in _DASHES and number[1:2].isspace()):
            return None
    if not _PLAIN_LEAD.fullmatch(lead) or any(word.lower() in _NO_LEAD for word in _WORD.findall(lead)):
        return None
    return number
