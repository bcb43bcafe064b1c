"""What a look at something found, and looking at many things at once without ever waiting for one that hangs.

A check is a function that returns findings. What it looks at may be a dead file server or a cluster that accepts a
connection and then says nothing, so each runs in a thread of its own and is left behind when its time is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pst_dist.errors import PstError
from pst_dist.redaction import redact

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    """`problem`: the run would fail or hang. `warning`: it would be slower, or fail where doctor cannot see."""
    subject: str
    what: str
    remedy: str = ""

    def line(self) -> str:
        """Level, subject, what was found and how to fix it, without passwords."""
        text = f"{self.what}; {self.remedy}" if self.remedy else self.what
        return redact(f"{self.level.upper() if self.level == 'problem' else self.level:<8} {self.subject:<12} {text}")


def ok(subject: str, what: str) -> Finding:
    """Something that is as it should be."""
    return Finding("ok", subject, what)


def warning(subject: str, what: str, remedy: str = "") -> Finding:
    """Something that may hurt."""
    return Finding("warning", subject, what, remedy)


def problem(subject: str, what: str, remedy: str = "") -> Finding:
    """Something that must be mended first."""
    return Finding("problem", subject, what, remedy)


@dataclass(frozen=True)
class Check:
    """Something to look at."""

    subject: str
    look: Callable[[], list[Finding]]
    seconds: float = 10.0
    """How long it may take."""
    silence: str = "look at it by hand"
    """What to do about something that does not answer."""


def look_at(checks: Sequence[Check]) -> list[Finding]:
    """The findings of all checks, in their order; they run side by side, so this lasts as long as the slowest.

    A check that takes longer than its seconds is a problem and is left behind; a PstError that it raises is one too.
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
        except Exception as error:  # a check that breaks says so, and the others go on
            found.append(warning(check.subject, f"could not be looked at ({type(error).__name__}: {error})"))

    # A daemon, so that one that hangs does not keep this process from ending.
    thread = threading.Thread(target=look, daemon=True, name=f"doctor {check.subject}")
    thread.start()
    return found, thread, time.monotonic()


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, each in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= each:
            return f"{count / each:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"
