"""Waiting for something to come true, for as long as a slow machine may need."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


def wait_until(true: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Look ten times a second; fails the test, naming `what`, when it does not come true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)
