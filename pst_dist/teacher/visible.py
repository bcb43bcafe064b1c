"""Splits a reply into its thought (`reasoning_content`, `<think>` and similar tags) and its visible text."""

from __future__ import annotations

from typing import NamedTuple

from pst_dist.data.sources.rows import RowError
from pst_dist.data.sources.thoughts import split_thought
from pst_dist.teacher.messages import Reply


class Visible(NamedTuple):
    """Both parts of a reply; each may be empty."""

    thought: str
    text: str


def visible(reply: Reply) -> Visible | None:
    """The parts of a reply; None if a thought in its text is not closed, so that nobody knows where it ends."""
    try:
        tagged, text = split_thought(reply.text)
    except RowError:
        return None
    thought = "\n\n".join(part for part in ((reply.thought or "").strip(), tagged) if part)
    return Visible(thought, text.strip())
