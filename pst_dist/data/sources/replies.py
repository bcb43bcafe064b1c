"""Split a reply that contains both reasoning and answer.

`split_reply` first removes the thought (`thoughts`), and then looks for the last explicit mark in the rest (`marks`);
docs/data.md lists them. A reply with no certain answer is refused with a RowError: an intermediate result must never
become a gold answer.

Replies are untrusted text of up to several megabytes, so every pattern has bounded repetitions and every search scans
the text a fixed number of times.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pst_dist.data.sources.marks import BOX, HEADING, LABEL, PHRASE, Mark, closing_brace, last_mark, last_match
from pst_dist.data.sources.rows import RowError
from pst_dist.data.sources.thoughts import has_thought_tag, split_thought, without_wrappers
from pst_dist.data.tasks.scoring import snippet

_DOUBTS = re.compile(
    r"\b(?:wait|hmm+|actually|scratch that|on second thought|correction|hold on|i made (?:a|an) (?:mistake|error)|"
    r"let me (?:re|double|check|count|try|verify)|that (?:is|was|cannot be|can't be) (?:wrong|not right|right\?)|"
    r"that's (?:wrong|not right)|that cannot be|that can't be)",
    re.IGNORECASE,
)
_ABBREVIATION = re.compile(r"(?:^|[\s.(])(?:[A-Z]|St|Mr|Mrs|Ms|Dr|Jr|Sr|No|Mt|vs|approx)$")
_CONNECTIVE = re.compile(
    r"(?:^|(?<=[.!?\n])|(?<=[.!?,]\s))[ \t]{0,4}(?:therefore|so|thus|hence|and so),?\s{0,4}$", re.IGNORECASE
)
# Between two boxes of one answer: part labels, names of variables, "and".
_BETWEEN_BOXES = re.compile(r"[\W\d_]{0,60}(?:(?:and|or|part|[a-z]{1,3})[\W\d_]{1,40}){0,4}", re.IGNORECASE)
_NEXT_QUESTION = re.compile(
    r"\n[ \t#*]{0,8}(?:Q|Question|Problem|Human|User|Instruction|Input)[ \t]{0,2}\d{0,3}[*]{0,2}:"
)
_SENTENCE_START = re.compile(
    r"(?:^|[.!?:;\n])[\s\"'*_()]{0,8}(?:(?:so|thus|hence|therefore|and|finally)\b,?[\s*]{0,4}){0,3}$", re.IGNORECASE
)
_MARK_ALONE = re.compile(r"#{3,}|-{2,}>")
_CONTROL = re.compile(r"<\|(?:im_end|im_start|endoftext|end_of_text|eot_id|eom_id)\|>")
_BARE_WORDS = 4
"""A reply without any mark counts as an answer only if it is one line of at most this many words."""


class Split(NamedTuple):
    """The result of `split_reply`; unpacks as (rationale, answer)."""

    rationale: str | None
    """Thought and working, joined by a blank line; None if the reply contains only the answer."""
    answer: str


def split_reply(reply: str, thought: str | None = None) -> Split:
    """Rationale and answer of a reply; `thought` is reasoning from a separate field.

    The last mark wins, because a teacher may correct itself. Raises RowError with code `cut` for a thought or box that
    is not closed, and with code `answer` if the reply doubts its last mark afterwards, marks several answers, or has
    more than four words and no mark at all.
    """
    inner, visible = map(without_wrappers, split_thought(reply))
    thoughts = [text for text in ((thought or "").strip(), inner) if text]
    if not visible:
        raise RowError("empty", "answer is empty: nothing follows the reasoning")
    found = _marked(visible)
    if found is None:
        _refuse_unmarked(visible, bool(thoughts))
        working, answer = "", "" if _MARK_ALONE.fullmatch(visible.strip()) else _bare(visible)
    else:
        working, answer = found
    if not answer:
        raise RowError("cut", "answer is empty: the reply ends at its answer mark")
    rationale = "\n\n".join(text for text in (*thoughts, working.strip()) if text)
    return Split(rationale or None, answer)


def has_mark(text: str) -> bool:
    """Whether a text contains a thought or an explicit answer mark; used for guessing columns."""
    return has_thought_tag(text) or last_mark(text) is not None


def begins_with_mark(text: str) -> bool:
    """Whether a text has a thought, or a last mark that is no phrase in the middle of a sentence."""
    last = last_mark(text)
    if has_thought_tag(text) or last is None or last.kind != "phrase":
        return has_mark(text)
    before = text[max(0, last.start - 40) : last.start]
    return _SENTENCE_START.search(before) is not None


def _marked(text: str) -> tuple[str, str] | None:
    """(working, answer) at the last mark of a text; None if it has no mark."""
    last = last_mark(text)
    if last is None:
        return None
    if last.kind == "open box":
        raise RowError("cut", "the reply is cut off inside \\boxed{")
    if last.kind == "open answer":
        raise RowError("cut", "the reply is cut off: <answer> without </answer>")
    if last.end is None:
        content, end = _line_content(text, last)
    else:
        content, end = text[last.content : last.end], last.end
    if _DOUBTS.search(text, end):
        raise RowError("answer", f"the reply doubts its last answer {snippet(content.strip())} afterwards")
    _refuse_next_question(text, last)
    if last.kind == "box":
        _refuse_two_boxes(text, last)
    inner = _marked(content) if last.kind == "tag" else None
    if last.kind == "tag" and inner is None:
        lines = content.strip().count("\n") + 1
        if lines > 1:  # AM-DeepSeek-R1-Distilled has the whole reply in the tag
            what = f"<answer> has {lines} lines, and none marks the answer"
            raise RowError("answer", f"{what}; end it with `The answer is …`, or set data.columns.answer")
    answer = _bare(content) if inner is None else inner[1]
    if token := _CONTROL.search(answer):
        raise RowError("answer", f"the reply goes on after {token.group()}")
    if re.match(r"not\b", answer, re.IGNORECASE):
        raise RowError("answer", f"the last mark says what the answer is not: {snippet(answer)}")
    working = _working(text, last, answer)
    return "\n\n".join(part for part in (working.strip(), inner[0].strip() if inner else "") if part), answer


def _refuse_next_question(text: str, last: Mark) -> None:
    """Refuse a reply that answers and goes on with another question, as base models do; raises RowError."""
    asked = last_match(_NEXT_QUESTION, text[: last.start])
    if asked is not None and last_mark(text[: asked.start()]) is not None:
        raise RowError("answer", "the reply goes on with another question after its answer")


def _line_content(text: str, mark: Mark) -> tuple[str, int]:
    """The text that a phrase or label marks: the rest of the sentence on its line, or on the next non-empty line."""
    start = mark.content
    if not (line := _line_at(text, start)).strip(" \t*_:$"):
        start = min(start + len(line), len(text))
        start += len(text[start:]) - len(text[start:].lstrip())
        line = _line_at(text, start)
    end = _sentence_end(line)
    content = line[:end].split(" because ")[0].rstrip(" ,;\u2013\u2014-(")
    return content, start + end


def _line_at(text: str, start: int) -> str:
    end = text.find("\n", start)
    return text[start : end if end >= 0 else len(text)]


def _sentence_end(line: str) -> int:
    """End of the first sentence: a full stop before a capital letter, except after abbreviations and initials."""
    for match in re.finditer(r"[.!?][\"')*$]{0,4}[ \t]{1,8}(?=[\"'(*\\]{0,4}[A-Z])", line):
        before, after = line[max(0, match.start() - 12) : match.start()], line[match.end() : match.end() + 3]
        abbreviated = _ABBREVIATION.search(before) is not None
        option = match.start() < 40 and re.fullmatch(r"[A-J]", line[: match.start()].strip(" (*$:")) is not None
        if match.group()[0] != "." or not abbreviated or (option and not re.match(r"[A-Z]\.", after)):
            return match.start()
    return len(line)


def _working(text: str, last: Mark, answer: str) -> str:
    """The text before the mark and its introduction. A box inside a sentence or formula is replaced by its content."""
    if last.kind == "line":
        return text[: last.start]
    before, introduced = _without_introduction(text[: last.start])
    line = text[text.rfind("\n", 0, last.start) + 1 : last.start]
    if last.kind == "box" and not introduced and before and line.strip(" \t$*_\\([{:"):
        working = f"{before} {answer}"
        assert last.end is not None
        return working + _closing_math(working, text[last.end :].removeprefix("}"))
    return before


_CLOSES = re.compile(r"[\s.,;]{0,8}(\\\]|\\\)|\$\$|\$|\\end\{([A-Za-z]{1,16}\*?)\})")


def _closing_math(working: str, after: str) -> str:
    """What closes the formulas that are open at the end of a working, where it follows at once."""
    closed = ""
    for _ in range(4):
        found = _CLOSES.match(after, len(closed))
        if found is None:
            break
        text, mark = working + closed, found.group(1)
        if mark.startswith("$"):
            is_open = text.replace("\\$", "").count(mark) % 2 == 1
        else:
            opening = f"\\begin{{{found.group(2)}}}" if found.group(2) else {"\\]": "\\[", "\\)": "\\("}[mark]
            is_open = text.count(opening) > text.count(mark)
        if not is_open:
            break
        closed += found.group()
    return closed


def _without_introduction(text: str) -> tuple[str, bool]:
    """A text without an answer phrase, label or heading at its end, and whether there was one.

    Also removes "Therefore," before a phrase, and opening brackets and Markdown at the start of the mark's line.
    """
    introduced = False
    for _ in range(4):
        text = _without_opening(text)
        tail = max(0, len(text) - 120)
        found = [
            match
            for pattern in (PHRASE, LABEL, HEADING)
            for match in pattern.finditer(text[tail:])
            if tail + match.end() == len(text)
        ]
        if not found:
            break
        text, introduced = text[: tail + min(match.start() for match in found)], True
    cut = max(0, len(text) - 40)
    return text[:cut] + _CONNECTIVE.sub("", text[cut:]), introduced


def _without_opening(text: str) -> str:
    """A text without unclosed opening brackets, dollar signs and asterisks at its end."""
    text = text.rstrip()
    for _ in range(6):
        before = text
        line = text[text.rfind("\n") + 1 :]
        for mark in ("\\[", "\\(", "[", "("):
            text = text.removesuffix(mark).rstrip()
        for mark in ("$$", "$", "**", "*"):
            if line.endswith(mark) and line.count(mark) % 2:
                text = text.removesuffix(mark).rstrip()
                break
        if text == before:
            break
    return text


def _refuse_two_boxes(text: str, last: Mark) -> None:
    """Refuse "x = \\boxed{3} or x = \\boxed{5}", also on two lines, which has no single answer; raises RowError."""
    contents, end = [], None
    before = text[: last.start]
    start = before.rfind("\n") + 1
    # Boxes on the lines above belong to it if no sentence separates them: "(a) \\boxed{3}", "(b) \\boxed{5}".
    boxes = list(BOX.finditer(before))[-8:]
    for match in reversed(boxes):
        close = closing_brace(text, match.end()) if text[match.end() : match.end() + 1] == "{" else None
        if close is None or close >= last.start:
            continue
        if close < start and not _BETWEEN_BOXES.fullmatch(text[close + 1 : last.start if end is None else end]):
            break
        contents.append(text[match.end() + 1 : close].strip())
        end = match.start()
    assert last.end is not None
    answer = text[last.content : last.end].strip()
    other = next((content for content in contents if content != answer), None)
    if other is not None:
        raise RowError("answer", f"the reply ends with several boxed answers: {snippet(other)} and {snippet(answer)}")


def _refuse_unmarked(text: str, thought: bool) -> None:
    """Raise RowError for a reply without a mark, unless it is one line after a thought or too short for a working."""
    if thought and "\n" not in text:
        return
    if not thought and "\n" not in text and len(text.split()) <= _BARE_WORDS:
        return
    if thought:
        what = f"{text.count(chr(10)) + 1} lines follow the thought, and none marks the answer"
    else:
        what = "no mark separates the answer from the reasoning"
    column = "data.columns.answer" + (" to a column with the answer alone" if thought else "")
    raise RowError("answer", f"{what}; end it with `The answer is …`, or set {column}")


def _bare(content: str) -> str:
    """An answer without surrounding Markdown, dollar signs, TeX text commands and a final full stop."""
    text = re.sub(r"^actually,?[ \t]{1,4}", "", content.strip())
    for _ in range(6):
        before = text
        text = text.rstrip(".").strip() if not re.search(r"\b[A-Z]\.[A-Z]\.$", text) else text
        text = text.removeprefix(":").strip()
        for left, right in (("**", "**"), ("__", "__"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)].strip()
        for mark in ("*", "`"):
            if len(text) > 2 and text[0] == text[-1] == mark and mark not in text[1:-1]:
                text = text[1:-1].strip()
        if text.endswith("**") and "**" not in text[:-2]:
            text = text.removesuffix("**").strip()
        wrapped = re.match(r"\\(?:text|textbf|mathrm|mathbf|boxed|fbox)\{", text)
        if wrapped is not None and closing_brace(text, wrapped.end() - 1) == len(text) - 1:
            text = text[wrapped.end() : -1].strip()
        if text == before:
            break
    return text
