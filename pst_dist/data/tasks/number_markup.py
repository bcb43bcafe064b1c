"""Reduce the text of a number to plain characters: remove LaTeX, Markdown and quotes, unify signs and spaces.

`numbers` parses the plain text. Like that module, this one is shipped with the lm-evaluation-harness task and imports
nothing from this package.
"""

from __future__ import annotations

import re
import unicodedata

_SPACES = dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u3000\t\r\n"), " ")
_MINUSES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_FULL_WIDTH = {0xFF10 + digit: str(digit) for digit in range(10)} | {0xFF05: "%", 0xFF04: "$", 0xFFE5: "¥", 0xFF0E: "."}
_QUOTES = {0x2019: "'", 0x2018: "'", 0x2044: "/", 0xFF0B: "+"}
_VULGAR = {ord(char): f" {unicodedata.normalize('NFKC', char)}".replace("\u2044", "/") for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_ONE_CHARACTER = {**_SPACES, **_MINUSES, **_FULL_WIDTH, **_QUOTES, **_VULGAR}

# LaTeX that only affects how a number looks. `\$` becomes ¤ so that it is not taken for a math delimiter.
_LATEX_WORDS = (
    *((r"\$", "¤"), (r"\%", "%"), (r"\!", ""), ("{,}", ","), ("{.}", ".")),
    *((r"\,", " "), (r"\;", " "), (r"\:", " "), ("\\ ", " "), (r"^{\circ}", "°"), (r"^\circ", "°")),
)
_LATEX_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])")
_LATEX_SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])")
# Elsewhere ~ means "about".
_LATEX_TIE = re.compile(r"(?<=[\d}])~(?=[A-Za-z\\])")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textrm|textbf|mathbf|mbox)\{([^{}\\]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\{([^{}\\]*)\}\{([^{}\\]*)\}")
_LATEX_SHORT_FRACTION = re.compile(r"\\[dtc]?frac ?(\d)(\d)(?!\d)")
_BRACED_POWER = re.compile(r"\^ ?\{ ?([-+]?\d+) ?\}")
_WRAPPERS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"), (r"\fbox{", "}")),
    *(("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"), ("{", "}")),
)


class NotANumber(ValueError):
    """The text is not exactly one number that can be parsed completely; the message gives the reason."""


def without_markup(text: str) -> str:
    """The text without LaTeX, Markdown and quotes around it, with one character for each kind of sign and space."""
    text = text.translate(_ONE_CHARACTER)
    for markup, plain in _LATEX_WORDS:
        text = text.replace(markup, plain)
    text = _LATEX_TIE.sub(" ", _LATEX_TIMES.sub("x", _LATEX_SIZE.sub("", text)))
    text = " ".join(text.split())
    for _ in range(4):
        text = _unwrapped(text)
    text = _LATEX_TEXT.sub(r" \1 ", text)
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text)
    text = _LATEX_SHORT_FRACTION.sub(r" \1/\2 ", text)
    text = _BRACED_POWER.sub(r"^\1", text)
    text = " ".join(text.split())
    if text[:2] in ("(-", "(+") and text.endswith(")"):
        text = text[1:-1].strip()
    if "\\" in text:
        raise NotANumber("contains LaTeX that is more than a number")
    return text


def _unwrapped(text: str) -> str:
    """The text without a final full stop and without delimiters around the whole of it."""
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for start, end in _WRAPPERS:
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
            inner = text[len(start) : len(text) - len(end)]
            # "{1}+{2}" and "$1$ or $2$" also start and end with the delimiters, but are not one group.
            if _balanced(inner) if end == "}" else start not in inner and end not in inner:
                text = inner.strip()
    return text


def _balanced(inner: str) -> bool:
    """Whether the braces in a text are balanced."""
    depth = 0
    for char in inner:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0
