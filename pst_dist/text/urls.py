"""What a URL is, what it names, and requests that carry a token.

After a redirect, a token is sent to its original origin only.
"""

from __future__ import annotations

import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any


def has_scheme(value: str) -> bool:
    """Whether a text is a URL, such as s3://bucket/runs, also after `pathlib` has made s3:/bucket/runs of it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", value) is not None


def is_whole_url(value: str) -> bool:
    """Whether a text is a URL, such as s3://bucket/rows.jsonl; not a setting or a path in which one occurs."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value) is not None


def url_name(url: str) -> str:
    """The name of the file or folder at a URL: the last part of its path, for http without the query."""
    if url.lower().startswith(("http://", "https://")):
        parts = urllib.parse.urlsplit(url)
        return urllib.parse.unquote(parts.path.rstrip("/")).rpartition("/")[2]
    return url.partition("://")[2].rstrip("/").rpartition("/")[2]


def place_name(place: str) -> str:
    """The name of the file or folder at a path or URL."""
    return url_name(place) if is_whole_url(place) else Path(place).name


class SameOriginToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects; keeps `Authorization` only for the same scheme, host and port."""

    def redirect_request(self, request: Any, *details: Any) -> urllib.request.Request | None:
        """The request to the new address; urllib's own handler would send it every header of the old request."""
        new = super().redirect_request(request, *details)
        if new is not None and origin(new.full_url) != origin(request.full_url):
            new.remove_header("Authorization")
        return new


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname or "", parts.port or usual
