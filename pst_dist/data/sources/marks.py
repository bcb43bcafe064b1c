"""The last explicit answer mark in a text: `\\boxed{}`, `####`, "the answer is", `Answer:`, `<answer>`, `-->`.

Texts are untrusted and may have megabytes, so every pattern has bounded repetitions and every search scans the text
once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PHRASE = re.compile(
    r"\b(?:the|my|our)[ \t]{1,4}(?:(?:final|correct|right|best|numerical)[ \t]{1,4})?answer[ \t]{1,4}"
    r"(?:is|are|will be|would be|must be|should be)(?=[\s:*$\\(]|$)(?:[ \t]{0,4}:)?|"
    r"(?<=[\d\w.!?)])The[ ](?:final[ ]|correct[ ])?answer[ ]is(?=[\s:*$\\(]|$):?",
    re.IGNORECASE,
)
LABEL = re.compile(
    r"(?:(?:^|(?<=[\n.!?;]))[ \t>*_#-]{0,12}(?:\d{1,2}[.)][ \t])?[ \t*_]{0,4}(?:the[ ])?(?:correct[ ])?answer|"
    r"(?:the[ ])?\bfinal[ \t](?:answer|result)|(?<=\d)final[ ]answer)"
    r"[ \t]{0,4}[*_]{0,3}[ \t]{0,4}[:\uff1a][*_]{0,3}",
    re.IGNORECASE,
)
HEADING = re.compile(
    r"(?:^|(?<=\n))[ \t]{0,4}(?:#{1,6}[ \t]{1,4}[*_]{0,3}|[*_]{2,3})(?:the[ ])?(?:final[ ]|correct[ ])?answer"
    r"[*_]{0,3}:?[*_]{0,3}[ \t]{0,4}(?=\n|$)",
    re.IGNORECASE,
)
BOX = re.compile(r"\\(?:boxed|fbox)[ \t]{0,4}")
_NO_GSM8K_ANSWER = re.compile(
    r"(?:step|part|case|stage|phase|section|example|problem|question|solution|explanation|conclusion|summary|note|"
    r"approach|method|analysis|verification|check|answer|final|result|given|reasoning|calculation)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Mark:
    """An explicit mark: its start, and the start and (for bracketed marks) the end of the marked text."""

    start: int
    content: int
    end: int | None
    kind: str


_OPEN_TAG = re.compile(r"<(final[_ ]?)?answer>", re.IGNORECASE)
_CLOSE_TAG = re.compile(r"</(final[_ ]?)?answer>", re.IGNORECASE)


def last_mark(text: str) -> Mark | None:
    """The mark that starts last; a tag around it counts instead. Scans the text once per kind of mark."""
    marks: list[Mark] = []
    for pattern in (PHRASE, LABEL, HEADING):
        match = last_match(pattern, text)
        if match is not None:
            marks.append(Mark(match.start(), match.end(), None, "phrase"))
    tag = _answer_tag(text)
    marks += [mark for mark in (_last_box(text), tag, _closing_line(text)) if mark is not None]
    last = max(marks, key=lambda mark: mark.start, default=None)
    within = last is not None and tag is not None and tag.end is not None and last.start < tag.end
    return tag if within else last


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match of a pattern; None if there is none."""
    found = None
    for match in pattern.finditer(text):
        found = match
    return found


def _last_box(text: str) -> Mark | None:
    match = last_match(BOX, text)
    if match is None:
        return None
    start = match.end()
    if text[start : start + 1] != "{":
        # Without braces, TeX takes one token as the argument.
        token = re.compile(r"[^\s$*{}\\]{1,80}").match(text, start)
        return Mark(match.start(), start, token.end(), "box") if token else None
    end = closing_brace(text, start)
    if end is None:
        return Mark(match.start(), start, None, "open box")
    return Mark(match.start(), start + 1, end, "box")


def closing_brace(text: str, opening: int) -> int | None:
    """The brace that closes the one at `opening`; escaped braces (`\\{`) do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _answer_tag(text: str) -> Mark | None:
    opening = last_match(_OPEN_TAG, text)
    if opening is None:
        return None
    closing = _CLOSE_TAG.search(text, opening.end())
    if closing is None:
        return Mark(opening.start(), opening.end(), None, "open answer")
    return Mark(opening.start(), opening.end(), closing.start(), "tag")


def _closing_line(text: str) -> Mark | None:
    """GSM8K's `#### 18` or Fine-tune-CoT's `--> 18 END` on the last line; elsewhere they are headings and arrows."""
    end = len(text.rstrip())
    line = text.rfind("\n", 0, end) + 1
    start = text.rfind("####", line, end)
    if start >= 0 and text[start - 1 : start] != "#":
        content = text[start + 4 : end].strip()
        if content and not content.endswith(":") and not _NO_GSM8K_ANSWER.match(content.lstrip("*_ ")):
            return Mark(start, start + 4, end, "line")
    if text[end - 4 : end] not in (" END", "\nEND"):
        return None  # an arrow as in `2 H2 + O2 --> 2 H2O`
    start = text.rfind("-->", line, end)
    if start < 0 and line and text[:line].rstrip().endswith("-->"):
        start = text.rfind("-->", 0, line)
    return Mark(start, start + 3, end - 3, "line") if start >= 0 else None
