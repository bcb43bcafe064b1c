"""Pages from the templates beside this file: each one self-contained file, all text escaped, nothing fetched.

A page module collects the values, its template in `templates/` lays them out, and `parts.html` has the pieces that
pages share.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST = 600
_NOT_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that no HTML file may hold, or that UTF-8 cannot encode; text of rows and file names may hold them."""


@dataclass(frozen=True)
class Cell:
    """A table cell: its text and how it looks."""

    text: str
    look: str = ""
    """`right`, `mono`, `yes` or `no`; several with a space between."""
    colour: str = ""
    """A dot of this colour before the text."""


Row = list[str | Cell]
"""Cells from left to right; a plain string is a left-aligned one."""


@dataclass(frozen=True)
class Table:
    """A table; no head line when `head` is empty."""

    head: Row
    rows: Sequence[Row]


@dataclass(frozen=True)
class Figure:
    """A PNG that becomes part of the page, with a sentence that says what it shows."""

    png: bytes
    caption: str

    @property
    def width(self) -> int:
        """Half the picture's pixels, from the PNG header."""
        return int.from_bytes(self.png[16:20], "big") // 2

    @property
    def base64(self) -> str:
        """The picture for a `data:` URL."""
        return base64.b64encode(self.png).decode()


def render(template: str, **values: Any) -> str:
    """The page that a template of `templates/` makes of the values.

    All values are escaped. A character that HTML does not allow becomes U+FFFD. Raises jinja2.UndefinedError for a
    value that the template uses and that is not given.
    """
    return _NOT_HTML.sub("\ufffd", _environment().get_template(template).render(values))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("pst_dist.publish"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def pairs_table(values: dict[str, Any]) -> Table:
    """Names and values, the values in a fixed-width font."""
    return Table([], [[name, Cell(str(value), "mono")] for name, value in values.items()])


def percent(share: float | None) -> str:
    """`87.5 %`; nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`95 s` or `12.3 min`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def answer_cell(row: dict[str, Any]) -> Cell:
    """The answer as scored, or the start of the text when no answer could be parsed."""
    text = row["prediction"] if row["prediction"] is not None else f"unparsed: {row['answer_text'].strip()[:80]!r}"
    return Cell(shortened(text), "yes" if row["correct"] else "no")


def shortened(text: str) -> str:
    """A text that is not too long for a table cell."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
