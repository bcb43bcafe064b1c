"""The parts of a page: cells, tables and figures, which `templates/parts.html` turns into HTML.

A page module collects the values and its template lays them out. Every page is one self-contained file: all text is
escaped, images are embedded, nothing is fetched.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 600


@dataclass(frozen=True)
class Cell:
    """A table cell: its text and appearance."""

    text: str
    look: str = ""
    """`right`, `mono`, `yes` or `no`; several are separated by spaces."""
    colour: str = ""
    """Colour of a dot before the text; no dot when empty."""


Row = list[str | Cell]
"""Cells from left to right; a plain string is a left-aligned cell."""


@dataclass(frozen=True)
class Table:
    """A table; without a header row when `head` is empty."""

    head: Row
    rows: Sequence[Row]


@dataclass(frozen=True)
class Figure:
    """A PNG embedded in the page, with its caption."""

    png: bytes
    caption: str

    @property
    def width(self) -> int:
        """Display width: half the image's width in pixels, from the PNG header."""
        return int.from_bytes(self.png[16:20], "big") // 2

    @property
    def base64(self) -> str:
        """The image for a `data:` URL."""
        return base64.b64encode(self.png).decode()


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
    """The answer as scored, or the start of the text if it is unparsed."""
    text = row["prediction"] if row["prediction"] is not None else f"unparsed: {row['answer_text'].strip()[:80]!r}"
    return Cell(shortened(text), "yes" if row["correct"] else "no")


def shortened(text: str) -> str:
    """The text, cut if it is too long for a table cell."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
