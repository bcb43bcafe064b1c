"""The check for values that go into a script, a URL, a header or a listing: each must be one visible line.

A newline in a name would become a separate command in a batch script and a separate header in a request; other control
characters and changes of writing direction hide from people what a machine reads.
"""

from __future__ import annotations

import re
import unicodedata

from pst_dist.errors import ConfigError

_REFUSED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, lone surrogates (undecodable bytes), line and paragraph separators."""
_DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def hidden_character(value: str) -> str | None:
    """The first forbidden character of a value, as `U+000A`; None when there is none."""
    for character in value:
        if unicodedata.category(character) in _REFUSED or character in _DIRECTION:
            return f"U+{ord(character):04X}"
    return None


def has_scheme(value: str) -> bool:
    """Whether a text is a URL, such as s3://bucket/runs, also after `pathlib` has made s3:/bucket/runs of it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", value) is not None


def plain(value: str, what: str) -> str:
    """The value itself; raises ConfigError, saying `what` it is, when it contains a forbidden character."""
    found = hidden_character(value)
    if found is not None:
        raise ConfigError(f"{what} contains the control character {found}", "remove it: the value must be one line")
    return value
