"""Characters that people do not see: line ends inside a value, other control characters, changes of direction."""

from __future__ import annotations

import unicodedata

_REFUSED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, lone surrogates (undecodable bytes), line and paragraph separators."""
_DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def hidden_character(value: str) -> str | None:
    """The first such character of a value, as `U+000A`; None when there is none."""
    for character in value:
        if unicodedata.category(character) in _REFUSED or character in _DIRECTION:
            return f"U+{ord(character):04X}"
    return None
