"""The parts of a page as Markdown, for `report.md` and `compare.md`: the same tables without pictures in them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pst_dist.publish.html import Cell, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


def escaped(text: str) -> str:
    """A text on one line that Markdown shows as it is; HTML in it stays text."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.replace("&", "&amp;").split()))


def table(found: Table) -> str:
    """A table with right-aligned columns where the head's or the first row's cells are; right answers are bold."""
    width = max(len(row) for row in [found.head, *found.rows]) if found.rows or found.head else 0
    head = found.head or [""] * width
    first = found.head or (found.rows[0] if found.rows else [])
    rule = ["---:" if _look(cell) == "right" else "---" for cell in first]
    return "\n".join(
        _line(cells) for cells in ([_text(c) for c in head], rule, *([_text(c) for c in row] for row in found.rows))
    )


def tiles(pairs: Sequence[tuple[str, str]]) -> str:
    """The headline's numbers as a list."""
    return "\n".join(f"- **{escaped(value)}** {escaped(meaning)}" for value, meaning in pairs)


def fenced(text: str) -> str:
    """A block of text, fenced by more backticks than it contains in a row."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return escaped(cell)
    text = escaped(cell.text)
    if cell.look == "mono":
        return f"`{cell.text.replace('`', '').replace('|', '/')}`" if cell.text else ""
    return f"**{text}**" if "yes" in cell.look.split() and text else text


def _look(cell: str | Cell) -> str:
    return cell.look if isinstance(cell, Cell) else ""
