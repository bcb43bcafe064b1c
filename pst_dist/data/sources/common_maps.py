"""The layouts that everybody uses: chat messages, prompt and completion, alpaca, sharegpt, GSM8K's ####, <think>.

Each is a function from a row to `Fields`. A reply that holds both reasoning and answer is split by
`split_reply`, at the first mark that it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pst_dist.data.sources.columns import Fields, Layout, RowError, as_id, as_rationales, as_text
from pst_dist.data.tasks.scoring import kind_of

_THINK = re.compile(r"^\s*(?:<think>)?(.*?)</think>(.*)$", re.DOTALL)
_ENDING = re.compile(
    r"(?:^|[.!?\n]\s*|,\s*)(?:therefore|so|thus|hence)?,?\s*the (?:final |correct )?answer is:?\s*(.+?)\s*$",
    re.IGNORECASE | re.DOTALL,
)
_PROMPTS = ("question", "prompt", "problem", "instruction", "query", "input")
_REPLIES = ("response", "completion", "output", "answer", "generation", "reply", "solution")


def split_reply(reply: str) -> tuple[str | None, str]:
    """Rationale and answer of a reply, cut at `</think>`, `####`, `-->` or a closing "the answer is …".

    Without any of these the whole reply is the answer and the rationale None.
    """
    thought = _THINK.match(reply)
    if thought:
        rest = thought.group(2).strip()
        ending = split_reply(rest)[1] if rest else ""
        return thought.group(1).strip() or None, ending
    for mark in ("####", "-->"):
        before, found, after = reply.rpartition(mark)
        if found:
            return before.strip() or None, re.sub(r"\s+END$", "", after.strip())
    ending_match = _ENDING.search(reply)
    if ending_match:
        start = ending_match.start() + (1 if reply[ending_match.start() : ending_match.start() + 1] in ".!?" else 0)
        return reply[:start].strip() or None, ending_match.group(1).rstrip(".").strip()
    return None, reply.strip()


def _from_reply(question: Any, reply: Any, *, row: Mapping[str, Any], thought: Any = None) -> Fields:
    text = as_text(reply, "answer")
    rationale, answer = split_reply(text)
    if isinstance(thought, str) and thought.strip():
        rationale, answer = thought.strip(), answer if rationale is None else split_reply(text)[1]
    if not answer:
        raise RowError("empty", "nothing stands after the reasoning: answer is empty")
    return Fields(
        question=as_text(question, "question"),
        answer=as_text(answer, "answer"),
        rationales=as_rationales(rationale),
        id=as_id(row.get("id")),
    )


def _content(message: Any) -> Any:
    """A message's text; a list of typed parts is joined."""
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content


def _conversation(messages: Any, name: str, row: Mapping[str, Any]) -> Fields:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RowError("type", f"{name} is {kind_of(messages)}, wanted a list of objects")
    roles = [str(message.get("role", message.get("from"))) for message in messages]
    asked = [message for message, role in zip(messages, roles, strict=True) if role in ("user", "human")]
    replied = [message for message, role in zip(messages, roles, strict=True) if role in ("assistant", "gpt")]
    if len(asked) != 1 or len(replied) != 1:
        what = f"{name} has {len(asked)} user and {len(replied)} assistant turns, wanted one question and one reply"
        raise RowError("type", what)
    thought = replied[0].get("reasoning_content", replied[0].get("thinking"))
    return _from_reply(_content(asked[0]), _content(replied[0]), row=row, thought=thought)


def _messages(row: Mapping[str, Any]) -> Fields:
    return _conversation(row.get("messages"), "messages", row)


def _sharegpt(row: Mapping[str, Any]) -> Fields:
    return _conversation(row.get("conversations"), "conversations", row)


def _prompt_completion(row: Mapping[str, Any]) -> Fields:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], "prompt and completion", row)
    return _from_reply(re.sub(r"\s*###\s*$", "", as_text(prompt, "question")), completion, row=row)


def _alpaca(row: Mapping[str, Any]) -> Fields:
    instruction = as_text(row.get("instruction"), "question")
    extra = row.get("input")
    question = f"{instruction}\n{extra.strip()}" if isinstance(extra, str) and extra.strip() else instruction
    return _from_reply(question, row.get("output"), row=row)


def _gsm8k(row: Mapping[str, Any]) -> Fields:
    text = as_text(row.get("answer"), "answer")
    steps, found, answer = text.rpartition("####")
    if not found:
        raise RowError("answer", "answer has no ####")
    # <<48/2=24>> are marks for a calculator; without them the steps read as a person wrote them.
    rationale = re.sub(r"<<[^<>]*>>", "", steps)
    return Fields(
        question=as_text(row.get("question"), "question"),
        answer=as_text(answer, "answer"),
        rationales=as_rationales(rationale),
        id=as_id(row.get("id")),
    )


def _think_columns(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    reply = next((name for name in _REPLIES if isinstance(row.get(name), str) and "</think>" in row[name]), None)
    prompt = next((name for name in _PROMPTS if name != reply and isinstance(row.get(name), str)), None)
    return prompt, reply


def _think(row: Mapping[str, Any]) -> Fields:
    prompt, reply = _think_columns(row)
    if prompt is None:
        raise RowError("missing", f"question is missing: none of {', '.join(_PROMPTS)} holds text")
    if reply is None:
        raise RowError("missing", f"no </think> in any of {', '.join(_REPLIES)}")
    return _from_reply(row[prompt], row[reply], row=row)


def _texts(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(isinstance(row.get(name), str) for name in names)


def _marked_answer(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("question"), str) and isinstance(row.get("answer"), str) and "####" in row["answer"]


def _has_think(row: Mapping[str, Any]) -> bool:
    return None not in _think_columns(row)


def _fits_prompt_completion(row: Mapping[str, Any]) -> bool:
    return _texts("prompt", "completion")(row) or all(isinstance(row.get(n), list) for n in ("prompt", "completion"))


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("gsm8k", _gsm8k, ("question", "answer"), _marked_answer),
        Layout("think", _think, (), _has_think),
        Layout("messages", _messages, ("messages",), lambda row: isinstance(row.get("messages"), list)),
        Layout("sharegpt", _sharegpt, ("conversations",), lambda row: isinstance(row.get("conversations"), list)),
        Layout("prompt_completion", _prompt_completion, ("prompt", "completion"), _fits_prompt_completion),
        Layout("alpaca", _alpaca, ("instruction", "output"), _texts("instruction", "output")),
    )
}
"""By name, in the order in which guessing tries them."""
