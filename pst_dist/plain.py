"""Values that reach a script, a URL, a header or a listing must be one visible line: one check for all of them.

A newline in a name becomes a command of its own in a batch script and a header of its own in a request; other control
characters and changes of writing direction hide from a person what a machine reads.
"""

from __future__ import annotations

import re
import unicodedata

from pst_dist.errors import ConfigError

_REFUSED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories: control characters, lone surrogates (bytes that are no text), line and paragraph separators."""
_DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def hidden_character(value: str) -> str | None:
    """The first character that may not be in such a value, as `U+000A`; None when all of it is plain."""
    for character in value:
        if unicodedata.category(character) in _REFUSED or character in _DIRECTION:
            return f"U+{ord(character):04X}"
    return None


def has_scheme(value: str) -> bool:
    """Whether a text is a URL, such as s3://bucket/runs, also after `pathlib` has made s3:/bucket/runs of it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", value) is not None


def plain(value: str, what: str) -> str:
    """The value itself; raises ConfigError, naming `what` it is, when it holds such a character."""
    found = hidden_character(value)
    if found is not None:
        raise ConfigError(f"{what} contains the control character {found}", "remove it: the value must be one line")
    return value
