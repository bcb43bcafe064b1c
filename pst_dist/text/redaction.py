"""Removes passwords and tokens from everything that is written or printed: every writer uses `redact`.

Writers are the command record, the resolved config, log lines, error messages, trackers and job listings; reports and
model cards show only what those have written. `redact` lists what counts as a secret; nothing is guessed from a value,
so a secret in another form is not recognised. The best place for a secret is the environment.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from typing import Any

MARK = "***"
_NAME = r"(?:token|secret|password|passwd|pwd|api[_-]?key|access[_-]?key|secret[_-]?key|signature|sig|credentials?)"
_MOST = 2048
"""Length limit of a secret, so that every pattern runs in linear time."""
_USER_INFO = re.compile(
    # `://` USER:PASSWORD `@`, up to the last @ before the path. A password may contain / and @ although it should not;
    # digits and a / after the colon are a port, not a password.
    rf"(?<=://)(?:(?!\w[\w.-]{{0,253}}:\d{{1,5}}/)[^\s/?#@:'\"<>]{{0,{_MOST}}}:[^\s'\"<>]{{0,{_MOST}}}@"
    # For http and https, `TOKEN@` alone is a secret; in other schemes it is a user name, which is needed and harmless.
    rf"|(?<=https://)[^\s/?#'\"<>]{{1,{_MOST}}}@|(?<=http://)[^\s/?#'\"<>]{{1,{_MOST}}}@)"
)
_NAMED = re.compile(rf"(?i)({_NAME}=)[^\s&;,'\"<>]{{1,{_MOST}}}")
"""`?X-Amz-Signature=…`, `env.WANDB_API_KEY=…`: recognised by the last word of the name."""
_BEARER = re.compile(rf"(?i)\b((?:bearer|basic)\s)[\w.~+/=-]{{8,{_MOST}}}")
_KNOWN = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_)[A-Za-z0-9_]{16,255}")


def redact(text: str) -> str:
    """The text with every password and token replaced by `***`.

    It recognises `USER:PASSWORD@` (and for http `TOKEN@`) in a URL; `NAME=VALUE` where the name ends in token, secret,
    password, key and the like, as in a URL's query or an environment variable; `Bearer …` and `Basic …`; and tokens of
    the Hugging Face hub and GitHub.
    """
    if "@" in text:
        text = _USER_INFO.sub(f"{MARK}@", text)
    if "=" in text:
        text = _NAMED.sub(rf"\1{MARK}", text)
    return _KNOWN.sub(MARK, _BEARER.sub(rf"\1{MARK}", text))


def redact_values(value: Any) -> Any:
    """`redact` for every string inside dicts, lists and tuples."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_values(inner) for inner in value)
    return value


class RedactingFormatter(logging.Formatter):
    """A log formatter that redacts secrets, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record without secrets."""
        return redact(super().format(record))


def redacted_command(words: Sequence[str]) -> str:
    """A command line quoted for a shell, without its secrets."""
    return shlex.join(redact(_whole(word)) for word in words)


def _whole(word: str) -> str:
    """A word with its value replaced when it is a `NAME=VALUE` secret, even if the value has blanks or quotes."""
    name, given, _ = word.partition("=")
    return f"{name}={MARK}" if given and re.search(rf"(?i){_NAME}$", name) else word


def has_secret(text: str) -> bool:
    """Whether `redact` would change the text."""
    return redact(text) != text


def is_redacted(text: str) -> bool:
    """Whether a secret was removed from this text, so that it cannot be used as it is."""
    return bool(_REDACTED.search(text))


_REDACTED = re.compile(rf"(?i)://{re.escape(MARK)}@|{_NAME}={re.escape(MARK)}(?![*\w])")
