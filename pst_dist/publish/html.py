"""The HTML around a report: one self-contained page, all text escaped, pictures inlined, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_LONGEST = 600
_STYLE = """
:root { --ink: #1f2733; --soft: #5b6472; --line: #e4e8ee; --wash: #f6f8fa; --good: #18794e; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 44px 28px 72px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; font-weight: 650; }
h2 { font-size: 18px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); font-weight: 650; }
p { margin: 8px 0; max-width: 78ch; }
.lead, figcaption, .note { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0 4px; }
.tile { flex: 1 1 150px; background: var(--wash); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 23px; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.right, th.right { text-align: right; white-space: nowrap; }
td.mono { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; word-break: break-all; }
td.yes { color: var(--good); } td.no { color: var(--bad); }
table.narrow { width: auto; min-width: 520px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.figures { display: flex; flex-wrap: wrap; gap: 8px 28px; }
figure { margin: 14px 0; max-width: 100%; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: 13.5px; margin-top: 4px; }
pre { background: var(--wash); border-radius: 8px; padding: 14px 16px; white-space: pre-wrap; word-break: break-word;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
"""


@dataclass(frozen=True)
class Cell:
    """A table cell: text that is escaped, and how it looks."""

    text: str
    look: str = ""
    """`right`, `mono`, `yes` or `no`; several with a space between."""
    colour: str = ""
    """A dot of this colour before the text."""


Row = list[str | Cell]
"""Cells from left to right; a plain string is a left-aligned one."""


def document(title: str, lead: str, body: Iterable[str]) -> str:
    """The whole page; `body` is HTML from the functions below, title and lead are text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section's title."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph of plain text; a note is softer."""
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def tiles(pairs: Sequence[tuple[str, str]]) -> str:
    """Large values with what they mean below: (value, meaning)."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in pairs
    )
    return f'<div class="tiles">{inner}</div>'


def figure(png: bytes, caption: str) -> str:
    """A picture, inlined, at half its pixels so that it stays crisp, with a sentence that says what it shows."""
    data = base64.b64encode(png).decode()
    width = int.from_bytes(png[16:20], "big") / 2  # the PNG header's own word for it
    return (
        f'<figure style="width:{width:.0f}px"><img src="data:image/png;base64,{data}" width="{width:.0f}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def figures(parts: Iterable[str]) -> str:
    """Pictures beside one another where there is room."""
    return f'<div class="figures">{"".join(parts)}</div>'


def table(head: Iterable[str | Cell], rows: Iterable[Iterable[str | Cell]], *, narrow: bool = False) -> str:
    """A table, scrolled sideways where it is wider than the page; a narrow one takes only the room it needs."""
    top = "".join(_cell(cell, "th") for cell in head)
    body = "".join(f"<tr>{''.join(_cell(cell, 'td') for cell in row)}</tr>" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if top else ""
    kind = ' class="narrow"' if narrow else ""
    return f'<div class="wide"><table{kind}>{header}<tbody>{body}</tbody></table></div>'


def _cell(cell: str | Cell, tag: str) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    look = f' class="{cell.look}"' if cell.look else ""
    dot = f'<span class="dot" style="background:{cell.colour}"></span>' if cell.colour else ""
    return f"<{tag}{look}>{dot}{escape(cell.text)}</{tag}>"


def pairs_table(values: dict[str, Any]) -> str:
    """Names and values, the values in a fixed-width face."""
    return table((), [(name, Cell(str(value), "mono")) for name, value in values.items()])


def fold(title: str, text: str) -> str:
    """Text that is shown when asked for."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def code(text: str) -> str:
    """Commands or other text in a fixed-width face."""
    return f"<pre>{escape(text)}</pre>"


def percent(share: float | None) -> str:
    """`87.5 %`; nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`95 s` or `12.3 min`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def answer_cell(row: dict[str, Any]) -> Cell:
    """The answer as scored, or what stood there when none could be read."""
    text = row["prediction"] if row["prediction"] is not None else f"unread: {row['answer_text'].strip()[:80]!r}"
    return Cell(shortened(text), "yes" if row["correct"] else "no")


def shortened(text: str) -> str:
    """A text that is not too long for a table cell."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
