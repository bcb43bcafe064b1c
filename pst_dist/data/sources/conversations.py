"""From the turns of a conversation to a question and a reply, with everything the question depends on kept.

A sample has one question, so what came before the last reply is written into it: the system text first, then earlier
turns as `User:` and `Assistant:` lines. What text cannot hold (tool calls and their results, images, unknown roles) is
refused with a RowError that names the part, because without it the same question would have several answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pst_dist.data.sources.rows import RowError
from pst_dist.data.tasks.scoring import kind_of

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Columns whose text is put before the question."""
PASSAGE_COLUMNS = ("context", "passage", "background", "article", "paragraph", "story", "document")
"""Columns with a text that a question is about."""
HISTORY_COLUMNS = ("history",)
"""Columns with earlier turns: pairs of question and reply, or turns with roles."""
ATTACHED_COLUMNS = ("image", "images", "audio", "audios", "video", "videos", "tools", "functions", "tool_calls")
"""Columns that a text prompt cannot hold; a row in which one is not empty is refused."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn that hold its reasoning apart from its content."""

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_call", "function_response", "tool_call", "tool_response"), "tool"
    ),
}


@dataclass(frozen=True)
class Exchange:
    """A question with its context written into it, and the reply to it."""

    question: object
    """Text once it is valid; `columns.as_text` checks it."""
    reply: object
    thought: str | None = None
    """Reasoning that the reply's turn held in a field of its own."""


@dataclass(frozen=True)
class _Turn:
    role: str
    text: Any
    thought: str | None = None


def read_conversation(turns: object, name: str, row: Mapping[str, Any]) -> Exchange:
    """The last reply of a list of turns and the question it answers; `name` is the column, for messages.

    The row's own `system`, `history` and `conversation`-wide columns count too. Raises RowError for turns that are not
    objects, a role that is unknown or cannot be kept, and a conversation that does not end in a reply to a user.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError("type", f"{name} is {kind_of(turns)}, wanted a list of objects")
    read = [_turn(turn, f"{name}[{place}]") for place, turn in enumerate(turns)]
    systems = []
    while read and read[0].role == "system":
        systems.append(read.pop(0).text)
    late = next((place for place, turn in enumerate(read) if turn.role == "system"), None)
    if late is not None:
        raise RowError("context", f"{name}: a system turn after the first user turn cannot be kept in a question")
    asked = sum(turn.role == "user" for turn in read)
    replied = len(read) - asked
    if len(read) < 2 or [turn.role for turn in read[-2:]] != ["user", "assistant"]:
        what = f"{name} has {asked} user and {replied} assistant turns, wanted a last question and its reply at the end"
        raise RowError("type", what)
    earlier = [(turn.role, turn.text) for turn in read[:-2]]
    question = with_context(read[-2].text, row, systems, earlier)
    return Exchange(question, read[-1].text, read[-1].thought)


def with_context(
    question: Any, row: Mapping[str, Any], systems: Sequence[Any] = (), earlier: Sequence[tuple[str, Any]] = ()
) -> Any:
    """A question behind the system text and the earlier turns, those of the row's own columns first.

    Raises RowError for a part of the row that text cannot hold.
    """
    for column in ATTACHED_COLUMNS:
        if not _is_blank(row.get(column)):
            raise RowError("context", f"{column} is not empty, and a text prompt cannot hold it")
    texts = [row[column] for column in SYSTEM_COLUMNS if not _is_blank(row.get(column))]
    texts += [text for text in systems if not _is_blank(text)]
    turns = [turn for column in HISTORY_COLUMNS for turn in _history(row.get(column), column)] + list(earlier)
    if not texts and not turns:
        return question
    if not isinstance(question, str) or not question.strip():
        return question  # as_text says what is wrong with it
    for text in texts:
        if not isinstance(text, str):
            raise RowError("context", f"the system text is {kind_of(text)}, wanted text")
    lines = [f"{role.capitalize()}: {_text(text, role)}" for role, text in turns]
    last = f"User: {question.strip()}" if turns else question.strip()
    return "\n\n".join([*(text.strip() for text in texts), "\n".join([*lines, last])])


def unread_parts(row: Mapping[str, Any], read: str) -> list[str]:
    """Columns of a row that change what its question means and that the paths `read` do not mention."""
    columns = (*SYSTEM_COLUMNS, *PASSAGE_COLUMNS, *HISTORY_COLUMNS, *ATTACHED_COLUMNS)
    return [column for column in columns if not _is_blank(row.get(column)) and column not in read]


def _turn(turn: Mapping[str, Any], where: str) -> _Turn:
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(named).strip().lower())
    if role is None:
        raise RowError("role", f"{where} has the unknown role {str(named)[:40]!r}; known are system, user, assistant")
    if role == "tool":
        raise RowError("context", f"{where} is a {named} turn: results of tools cannot be kept in a question")
    for key in ("tool_calls", "function_call", *ATTACHED_COLUMNS):
        if not _is_blank(turn.get(key)):
            raise RowError("context", f"{where} has {key}, which a text prompt cannot hold")
    content = turn.get("content", turn.get("value"))
    thought = next((turn[key] for key in THOUGHT_KEYS if isinstance(turn.get(key), str) and turn[key].strip()), None)
    if isinstance(content, list):
        content, inner = _joined(content, where)
        thought = thought or inner
    return _Turn(role, content, thought)


def _joined(parts: Sequence[Any], where: str) -> tuple[str, str | None]:
    """The text and the thought of a list of typed parts; raises RowError for any other kind of part."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning"):
            thoughts += [part[key] for key in (kind, "text") if isinstance(part.get(key), str)][:1]
        else:
            raise RowError(
                "context", f"{where} holds a part of type {str(kind)[:40]!r}, which a text prompt cannot hold"
            )
    return "\n".join(texts), "\n".join(thoughts) or None


def _history(value: Any, column: str) -> list[tuple[str, Any]]:
    """Earlier turns as (role, text): pairs as alpaca files have them, or objects with roles."""
    if _is_blank(value):
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [turn for question, reply in value for turn in (("user", question), ("assistant", reply))]
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        turns = [_turn(turn, f"{column}[{place}]") for place, turn in enumerate(value)]
        return [(turn.role, turn.text) for turn in turns]
    raise RowError("context", f"{column} is neither pairs of question and reply nor turns with roles")


def _text(value: Any, role: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError("context", f"an earlier {role} turn is {kind_of(value)} or empty, wanted text")
    return value.strip()


def _is_blank(value: Any) -> bool:
    return (
        value is None or value in ([], {}, (), False) or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))
    )
