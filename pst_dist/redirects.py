"""Requests that carry a token and follow redirects: the token is sent only to its original origin."""

from __future__ import annotations

import urllib.parse
import urllib.request
from typing import Any


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
