"""Reads the reply in an answer of an OpenAI-compatible server, live or from the output file of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pst_dist.teacher.messages import Reply, Request, Usage
from pst_dist.teacher.wire import failure_of, text_and_thought

_THOUGHT_FIELDS = ("reasoning_content", "reasoning")


class Again(Exception):
    """A failure that may pass; `seconds` is the wait that the server asked for."""

    def __init__(self, reason: str, what: str, seconds: float | None = None, *, reached: bool = True) -> None:
        super().__init__(what)
        self.reason, self.what, self.seconds, self.reached = reason, what, seconds, reached


def read_answer(
    request: Request,
    answer: Any,
    *,
    chat: bool,
    estimated: Callable[[Request, str], Usage],
    shown: Callable[[object], str],
) -> Reply:
    """The reply in an answer, an object with the attributes of the official client's; raises Again for another form.

    `estimated` gives the tokens of a request and its reply where the server counts none, `shown` the start of a text
    of the server, for messages.
    """
    choices = getattr(answer, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    thought = None
    if not chat:
        text = getattr(first, "text", None)
    else:
        message = getattr(first, "message", None)
        text, thought = text_and_thought(getattr(message, "content", None))
        found = [getattr(message, name, None) for name in _THOUGHT_FIELDS]
        thought = next((one for one in found if isinstance(one, str) and one.strip()), thought)
        refusal = getattr(message, "refusal", None)
        if text is None and isinstance(refusal, str) and refusal.strip():
            return Reply(text=refusal, finish="refused", usage=_usage(request, answer, refusal, estimated))
        if text is None and message is not None:
            text = ""  # cut while it thought, filtered, or nothing to say
    finish = getattr(first, "finish_reason", None) or "stop"
    if not isinstance(text, str) or not isinstance(finish, str):
        said = failure_of(getattr(answer, "error", None))
        what = f"an error: {shown(said)}" if said else f"no text: {shown(answer)}"
        raise Again("malformed", f"the reply has {what}")
    if not text.strip() and not thought and finish not in ("length", "content_filter"):
        raise Again("empty", "the reply is empty")
    return Reply(text=text, finish=finish, usage=_usage(request, answer, text, estimated), thought=thought)


def _usage(request: Request, answer: Any, text: str, estimated: Callable[[Request, str], Usage]) -> Usage:
    usage = getattr(answer, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if all(isinstance(count, int) and 0 <= count < 10**9 for count in counts):
        return Usage(prompt=counts[0] or 0, completion=counts[1] or 0)
    return estimated(request, text)
