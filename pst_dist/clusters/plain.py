"""The check for values that go into a script, a URL, a header or a listing: each must be one visible line.

A newline in a name would become a separate command in a batch script and a separate header in a request; other control
characters and changes of writing direction hide from people what a machine reads.
"""

from __future__ import annotations

from pst_dist.errors import ConfigError
from pst_dist.text.characters import hidden_character


def plain(value: str, what: str) -> str:
    """The value itself; raises ConfigError, saying `what` it is, when it contains a hidden character."""
    found = hidden_character(value)
    if found is not None:
        raise ConfigError(f"{what} contains the control character {found}", "remove it: the value must be one line")
    return value
