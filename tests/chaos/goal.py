"""What a goal gives back, and the table that all of them make together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Result:
    """One row of the table: a promise, how often it was put to the test, and each time it was broken."""

    goal: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    """A line each."""
    seconds: float = 0.0
    note: str = ""
    """What else was counted, or why nothing could be tried here."""

    def trial(self, *trouble: str) -> None:
        """Count a trial and what went wrong in it."""
        self.trials += 1
        if trouble:
            self.failures.append("; ".join(trouble))

    def row(self) -> str:
        """Of a markdown table."""
        return f"| {self.goal} | {self.trials:,} | {len(self.failures):,} | {self.seconds:,.0f} | {self.note} |"


HEAD = "| goal | trials | failures | seconds | also |\n|---|---:|---:|---:|---|"


@contextlib.contextmanager
def measured(goal: str) -> Iterator[Result]:
    """A result whose seconds are those of the block."""
    result, started = Result(goal), time.monotonic()
    yield result
    result.seconds = time.monotonic() - started


def table(results: list[Result]) -> str:
    """All rows, in markdown."""
    return "\n".join([HEAD, *(result.row() for result in results)]) + "\n"
