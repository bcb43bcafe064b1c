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


_DEADLINE = [float("inf")]


def stop_after(minutes: float) -> None:
    """Let every goal end after so much time from now, with the trials that it has."""
    _DEADLINE[0] = time.monotonic() + 60 * minutes


def seconds_left() -> float:
    """Until the goals are to end."""
    return max(0.0, _DEADLINE[0] - time.monotonic())


def out_of_time(result: Result, left: int) -> bool:
    """Whether a goal is to end now; the result then says how many trials were left."""
    if seconds_left() > 0:
        return False
    result.note = f"**out of time, {left:,} trials left**; {result.note}"
    return True


def spread(count: int) -> list[int]:
    """0 … count - 1 in an order whose every beginning lies all over the range."""
    return sorted(range(count), key=lambda number: number * 0.6180339887 % 1)


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
