"""Turn a conversation into a question and a reply, keeping everything that the question depends on.

A sample's question is one text, so its context is written into it: first the system text, then earlier turns as `User:`
and `Assistant:` lines. The turns are kept too, for prompts that can represent a conversation. Content that text cannot
represent (tool calls and results, images, unknown roles) is refused with a RowError that names it, because without it
the same question could have different answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pst_dist.data.sample import Turns
from pst_dist.data.sources.context import ATTACHED_COLUMNS, HISTORY_COLUMNS, SYSTEM_COLUMNS, columns_named, is_blank
from pst_dist.data.sources.rows import RowError
from pst_dist.data.sources.thoughts import has_thought_tag, split_thought
from pst_dist.data.sources.verdicts import is_cut, is_setting
from pst_dist.data.tasks.scoring import kind_of

TURN_COLUMNS = ("messages", "conversations", "conversation", "contents")
"""Columns with a conversation that mostly ends with a reply."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn with its reasoning, separate from its content."""
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_call", "function_response", "tool_call", "tool_response"), "tool"
    ),
}


@dataclass(frozen=True)
class Question:
    """A question with its context."""

    text: object
    """All of it as one text. Not validated yet; `values.as_text` checks that it is text."""
    turns: Turns = ()
    """The conversation that ends with the question; empty where there is no context."""


@dataclass(frozen=True)
class Exchange:
    """A question that includes its context, and the reply to it."""

    question: Question
    reply: object
    thought: str | None = None
    """Reasoning from a separate field of the reply's turn."""


@dataclass(frozen=True)
class _Turn:
    role: str
    text: Any
    thought: str | None = None
    is_learned: bool = True
    """Whether a model should learn it; OpenAI's `weight: 0` and axolotl's `train: false` say no."""


def read_conversation(turns: object, name: str, row: Mapping[str, Any]) -> Exchange:
    """The last reply in a list of turns and the question that it answers; `name` is the column, for error messages.

    The row's own system and history columns are part of the context. Raises RowError for turns that are not objects, a
    role that is unknown or cannot be kept, and a conversation that does not end with a reply to a user.
    """
    systems, read = _read_turns(turns, name)
    if len(read) < 2 or [turn.role for turn in read[-2:]] != ["user", "assistant"]:
        raise RowError("type", f"{name} has {_counts(read)}, expected a question and its reply at the end")
    if not read[-1].is_learned:
        raise RowError("answer", f"the last turn of {name} is marked as one that no model should learn")
    earlier = [(turn.role, turn.text) for turn in read[:-2]]
    question = with_context(read[-2].text, row, systems, earlier)
    return Exchange(question, read[-1].text, read[-1].thought)


def read_question(turns: object, name: str, row: Mapping[str, Any]) -> Question:
    """The last question in a list of turns, with or without a reply after it, which is left out.

    Otherwise like `read_conversation`.
    """
    systems, read = _read_turns(turns, name)
    if read and read[-1].role == "assistant":
        read.pop()
    if not read or read[-1].role != "user":
        raise RowError("type", f"{name} has {_counts(read)}, expected a question at the end")
    return with_context(read[-1].text, row, systems, [(turn.role, turn.text) for turn in read[:-1]])


def is_turns(value: object) -> bool:
    """Whether a value is a list of turns with roles; what is in them is not looked at."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def ends_with_reply(turns: object) -> bool:
    """Whether a list of turns ends with one of an assistant."""
    if not is_turns(turns):
        return False
    assert isinstance(turns, list)
    return _ROLES.get(str(turns[-1].get("role", turns[-1].get("from"))).strip().lower()) == "assistant"


def as_messages(turns: Turns) -> list[dict[str, str]]:
    """Turns in the form that chat templates and servers take, and that this module reads."""
    return [{"role": role, "content": text} for role, text in turns]


def _read_turns(turns: object, name: str) -> tuple[list[Any], list[_Turn]]:
    """(system texts, the turns after them); raises RowError."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError("type", f"{name} is {kind_of(turns)}, expected a list of objects")
    read = [_turn(turn, f"{name}[{place}]") for place, turn in enumerate(turns)]
    systems = []
    while read and read[0].role == "system":
        systems.append(read.pop(0).text)
    if any(turn.role == "system" for turn in read):
        raise RowError("context", f"{name}: a system turn after the first user turn cannot be kept in a question")
    return systems, read


def _counts(read: Sequence[_Turn]) -> str:
    asked = sum(turn.role == "user" for turn in read)
    return f"{asked} user and {len(read) - asked} assistant turns"


def with_context(
    question: Any, row: Mapping[str, Any], systems: Sequence[Any] = (), earlier: Sequence[tuple[str, Any]] = ()
) -> Question:
    """The question preceded by the system text and the earlier turns, those from the row's own columns first.

    Raises RowError for a part of the row that text cannot represent.
    """
    for column in columns_named(row, ATTACHED_COLUMNS):
        raise RowError("context", f"{column} is not empty, but a text prompt cannot contain it")
    texts = [_system_text(row[column], column) for column in columns_named(row, SYSTEM_COLUMNS)]
    texts += [text for text in systems if not is_blank(text)]
    past = [turn for column in columns_named(row, HISTORY_COLUMNS) for turn in _history(row[column], column)]
    turns = [*past, *earlier]
    if not texts and not turns:
        return Question(question)
    if not isinstance(question, str) or not question.strip():
        return Question(question)  # as_text reports the error
    for text in texts:
        if not isinstance(text, str):
            raise RowError("context", f"the system text is {kind_of(text)}, expected text")
    system = "\n\n".join(text.strip() for text in texts)
    read = [(role, _text(text, role)) for role, text in turns]
    lines = [f"{role.capitalize()}: {text}" for role, text in read]
    last = f"User: {question.strip()}" if turns else question.strip()
    text = "\n\n".join([*([system] if texts else []), "\n".join([*lines, last])])
    told = [("system", system)] if texts else []
    return Question(text, (*told, *read, ("user", question.strip())))


def _system_text(value: Any, column: str) -> Any:
    """The text of a system column, which may also be a turn: Gemini's `{"parts": [{"text": …}]}`."""
    return _turn({"role": "system", **value}, column).text if isinstance(value, Mapping) else value


def _turn(turn: Mapping[str, Any], where: str) -> _Turn:
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(named).strip().lower())
    if role is None:
        raise RowError("role", f"{where} has the unknown role {str(named)[:40]!r}; use system, user or assistant")
    if role == "tool":
        raise RowError("context", f"{where} is a {named} turn: tool calls and results cannot be kept in a question")
    for key in ("tool_calls", "function_call", *ATTACHED_COLUMNS):
        if not is_blank(turn.get(key)):
            raise RowError("context", f"{where} has {key}, which a text prompt cannot contain")
    if is_cut(turn.get("finish_reason")):
        raise RowError("cut", f"{where} is cut off: its finish_reason is {turn['finish_reason']!r}")
    content = turn.get("content", turn.get("value", turn.get("parts")))
    told = [turn[key] for key in THOUGHT_KEYS if isinstance(turn.get(key), str)]
    thought = next((text for text in told if text.strip() and not is_setting(text)), None)
    if isinstance(content, list):
        content, inner = _joined(content, where)
        thought = thought or inner
    return _Turn(role, content, thought, all(turn.get(key) not in (0, False) for key in ("weight", "train", "loss")))


def _joined(parts: Sequence[Any], where: str) -> tuple[str, str | None]:
    """The text and the thought of a list of typed parts; raises RowError for any other kind of part."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            (thoughts if part.get("thought") is True else texts).append(part["text"])
        elif kind in ("thinking", "reasoning"):
            thoughts += [part[key] for key in (kind, "text") if isinstance(part.get(key), str)][:1]
        else:
            raise RowError(
                "context", f"{where} has a part of type {str(kind)[:40]!r}, which a text prompt cannot contain"
            )
    return "\n".join(texts), "\n".join(thoughts) or None


def _history(value: Any, column: str) -> list[tuple[str, Any]]:
    """Earlier turns as (role, text), from pairs as in alpaca files or from objects with roles."""
    if is_blank(value):
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [turn for question, reply in value for turn in (("user", question), ("assistant", reply))]
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        turns = [_turn(turn, f"{column}[{place}]") for place, turn in enumerate(value)]
        return [(turn.role, turn.text) for turn in turns]
    raise RowError("context", f"{column} is neither question-reply pairs nor turns with roles")


def _text(value: Any, role: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError("context", f"an earlier {role} turn is {kind_of(value)} or empty, expected text")
    text = value.strip()
    if role != "assistant" or not has_thought_tag(text):
        return text
    # The student's own history has no thoughts, and chat templates leave them out too.
    visible = split_thought(text)[1]
    if not visible:
        raise RowError("context", "an earlier assistant turn has a thought and no reply after it")
    return visible
