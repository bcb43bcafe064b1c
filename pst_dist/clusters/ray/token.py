"""The token of a Ray cluster: finds it where Ray looks for it, and makes Ray send it."""

from __future__ import annotations

import os
from pathlib import Path

from pst_dist.clusters.plain import plain
from pst_dist.errors import InputError


def find_token() -> str | None:
    """The token that Ray would send, looked up where Ray looks for it.

    Raises InputError for a missing file, ConfigError for a token that would become more than one header.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return plain(token.strip(), "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if path.is_file():
        return plain(path.read_text("utf-8", errors="surrogateescape").strip(), f"the token in {path}")
    if named:
        raise InputError("no such file, but RAY_AUTH_TOKEN_PATH names it", path=path)
    return None


def prepare_token() -> str | None:
    """The token, if there is one, and Ray told to send it; call before anything imports ray.

    Ray reads RAY_AUTH_MODE once, when it is imported. A cluster that requires no token ignores one.
    """
    token = find_token()
    if token is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return token
