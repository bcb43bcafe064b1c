"""What is sent to a teacher and what comes back, and the interface that every kind of teacher has."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

Turn = tuple[str, str]
"""Role (`system`, `user` or `assistant`) and text."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation."""

    key: str
    """Unique in a journal: which question, prompt, sample and step."""
    turns: tuple[Turn, ...]
    """The conversation. Where a model continues plain text, the turns joined by `as_text`."""
    most_tokens: int
    """Length limit of the reply, in tokens."""
    temperature: float
    seed: int | None
    """Different for each sample, so that equal requests differ; None if none is sent."""

    @property
    def prompt_bytes(self) -> int:
        """Size of its text."""
        return sum(len(text.encode("utf-8", "surrogatepass")) for _, text in self.turns)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request, as the server counted them, or estimated where it does not say."""

    prompt: int
    completion: int
    estimated: bool = False
    prompt_bytes: int = 0
    """Size of the prompt's text, from which the tokens of further prompts are estimated."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the teacher wrote."""

    text: str
    finish: str
    """`stop`, `length` (cut at the limit), or what else the server says; `refused` for a request it does not accept."""
    usage: Usage
    thought: str | None = None
    """Reasoning that the server returned in a field of its own (`reasoning_content`, `reasoning`)."""

    def storable(self) -> Reply:
        """The same with what no row may contain, halves of surrogate pairs and NUL, replaced by U+FFFD."""
        thought = None if self.thought is None else _storable(self.thought)
        return replace(self, text=_storable(self.text), finish=_storable(self.finish), thought=thought)

    @property
    def is_cut(self) -> bool:
        """Whether the length limit ended it."""
        return self.finish == "length"

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as in the journal."""
        return asdict(self)


def _storable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


class Teacher(Protocol):
    """A model that can be asked. `ask` may be called for several requests at once."""

    name: str
    """For messages and the report."""
    chat: bool
    """Whether it takes a conversation; otherwise it continues text."""

    async def ask(self, request: Request) -> Reply:
        """The reply to one request; raises a PstError if there can be none, and then none for later requests either."""

    async def close(self) -> None:
        """Release connections and memory."""


def as_text(turns: tuple[Turn, ...], open_end: str = "") -> str:
    """The turns as one text to continue, in Fine-tune-CoT's form: questions after `Q:`, answers after `A:`.

    An assistant's last turn is left open: the model continues it.
    """
    parts = []
    for role, text in turns:
        parts.append({"system": "", "user": "Q: ", "assistant": "A: "}[role] + text)
    if turns[-1][0] != "assistant":
        parts.append("A:" + open_end)
    return "\n".join(parts)
