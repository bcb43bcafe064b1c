"""Findings of checks, and running many checks in parallel without waiting for one that hangs.

A check is a function that returns findings. It may block on a dead file server or on a cluster that accepts a
connection and never answers, so each check runs in its own thread, which is abandoned at its time limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pst_dist.errors import PstError
from pst_dist.text.redaction import redact

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    """`problem`: the run would fail or hang. `warning`: it may be slower, or fail for a reason doctor cannot check."""
    subject: str
    what: str
    remedy: str = ""

    def line(self) -> str:
        """Level, subject, what was found and how to fix it, without passwords."""
        text = f"{self.what}; {self.remedy}" if self.remedy else self.what
        return redact(f"{self.level.upper() if self.level == 'problem' else self.level:<8} {self.subject:<12} {text}")


def ok(subject: str, what: str) -> Finding:
    """Something that is in order."""
    return Finding("ok", subject, what)


def warning(subject: str, what: str, remedy: str = "") -> Finding:
    """Something that may cause trouble."""
    return Finding("warning", subject, what, remedy)


def problem(subject: str, what: str, remedy: str = "") -> Finding:
    """Something that must be fixed before the run."""
    return Finding("problem", subject, what, remedy)


@dataclass(frozen=True)
class Check:
    """One check."""

    subject: str
    look: Callable[[], list[Finding]]
    seconds: float = 10.0
    """How long it may take."""
    silence: str = "check it by hand"
    """The remedy if it does not answer."""


def look_at(checks: Sequence[Check]) -> list[Finding]:
    """The findings of all checks, in order; they run in parallel, so this takes as long as the slowest one.

    A check that exceeds its time limit is a problem and is abandoned; a PstError that it raises is also a problem.
    """
    started = [(check, *_start(check)) for check in checks]
    findings: list[Finding] = []
    for check, found, thread, begin in started:
        thread.join(max(0.0, begin + check.seconds - time.monotonic()))
        if thread.is_alive():
            found = [problem(check.subject, f"no answer within {check.seconds:.0f} s", check.silence)]
        findings.extend(found)
    return findings


def _start(check: Check) -> tuple[list[Finding], threading.Thread, float]:
    found: list[Finding] = []

    def look() -> None:
        try:
            found.extend(check.look())
        except PstError as error:
            found.append(problem(check.subject, f"{error.where}: {error.what}".removeprefix(": "), error.remedy))
        except Exception as error:  # report a check that fails, and continue with the others
            found.append(warning(check.subject, f"could not be checked ({type(error).__name__}: {error})"))

    # A daemon thread, so that a hanging check does not keep this process alive.
    thread = threading.Thread(target=look, daemon=True, name=f"doctor {check.subject}")
    thread.start()
    return found, thread, time.monotonic()


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit, each in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= each:
            return f"{count / each:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"
