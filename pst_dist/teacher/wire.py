"""The key, the client, the body of a request, and how servers word a failure."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from pst_dist.errors import ConfigError, first_line
from pst_dist.teacher.messages import Request, as_text
from pst_dist.teacher.settings import KEY_ENV, TeachSettings
from pst_dist.text.characters import hidden_character
from pst_dist.text.redaction import redact
from pst_dist.text.urls import origin

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

_NO_KEY = "none"
"""What the client sends where there is no key; it insists on some."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
NOT_ACCEPTED = (400, 413, 422)
"""Status codes that say that the request itself is at fault; asking again would not help."""
_SHOWN = 200


def key_of(settings: TeachSettings) -> str | None:
    """The key from the environment; None if the variable is unset. Raises ConfigError for one that no header takes."""
    key = os.environ.get(settings.key_env, "").strip()
    if not key:
        if settings.key_env != KEY_ENV:
            raise ConfigError(f"--key-env {settings.key_env}: this environment variable is not set", "export the key")
        return None
    if not key.isascii() or hidden_character(key) or " " in key:
        raise ConfigError(
            f"${settings.key_env} is not a key: it has characters that no header may have", "set it again"
        )
    return key


def make_client(settings: TeachSettings, key: str | None) -> AsyncOpenAI:
    import openai

    timeout = openai.Timeout(settings.timeout_seconds, connect=min(10.0, settings.timeout_seconds))
    scheme, host, _ = origin(str(settings.endpoint))
    here = host in _LOOPBACK
    if key and scheme == "http" and not here:
        log.warning("the key in $%s is sent to %s unencrypted (http)", settings.key_env, host)
    return openai.AsyncOpenAI(
        api_key=key or _NO_KEY,
        base_url=settings.endpoint,
        timeout=timeout,
        max_retries=0,
        # A proxy of the environment cannot reach this machine's loopback, and would be given the key.
        http_client=openai.DefaultAsyncHttpxClient(timeout=timeout, follow_redirects=False, trust_env=not here),
    )


def body_of(settings: TeachSettings, request: Request) -> dict[str, Any]:
    """The body of a request, without the fields of --extra."""
    body: dict[str, Any] = {
        "model": settings.model,
        "temperature": request.temperature,
        "max_tokens": request.most_tokens,
        "seed": request.seed,
    }
    if settings.api == "completions":
        body["stop"] = ["\nQ:"]
    body = {name: value for name, value in body.items() if value is not None and name not in settings.omit}
    if settings.api == "completions":
        return {**body, "prompt": as_text(request.turns)}
    return {**body, "messages": [{"role": role, "content": text} for role, text in request.turns]}


def retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After header, in either of its forms, or of OpenAI's retry-after-ms."""
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(headers.get("retry-after-ms")) / 1000)
    given = headers.get("retry-after")
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(given)
        return max(0.0, seconds) if seconds == seconds else None
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return None


def message_of(error: Any) -> str:
    """What the server says about a failure: the message in its JSON, or the start of its text."""
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    return failure_of(inner) or (str(body) if isinstance(body, str) and body.strip() else first_line(error))


def failure_of(said: Any) -> str:
    """The message in an error object: OpenAI's `message`, or FastAPI's `detail`; "" if there is none."""
    if isinstance(said, str):
        return said.strip()
    if not isinstance(said, dict):
        return ""
    detail = said.get("message") or said.get("detail")
    if isinstance(detail, list):
        named = [one for one in detail if isinstance(one, dict)]
        detail = "; ".join(f"{'.'.join(map(str, one.get('loc') or ()))}: {one.get('msg')}" for one in named)
    return detail.strip() if isinstance(detail, str) else ""


def text_and_thought(content: Any) -> tuple[Any, str | None]:
    """The text and the thought of a message, whose content may be a list of typed parts; other content as it is."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content, None
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type")
        value = part.get(kind) if isinstance(kind, str) else None
        if kind == "thinking" and isinstance(value, list):
            value = text_and_thought(value)[0]
        if kind not in ("text", "thinking", "reasoning") or not isinstance(value, str):
            return content, None
        (texts if kind == "text" else thoughts).append(value)
    return "\n".join(texts), "\n".join(thoughts) or None


def cause_of(error: BaseException) -> str:
    """The innermost reason of a connection error: `Connection refused`, `Name or service not known`."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return first_line(error, _SHOWN)


def shown(value: object) -> str:
    """The start of a text of the server, on one line and without secrets."""
    text = " ".join(str(value).split())
    return redact(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
