"""The table of a benchmark while it grows: rows with goals, failures kept in their row, a budget of time, a stopwatch.

Whatever happens while one row is measured stays in that row: a library that is absent, memory that does not suffice,
a kernel that raises. Rows that come after the budget is spent say so.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from contenders import NotHere

GPU_LEAD_CYCLES = 4_000_000
"""The GPU sleeps this long (about two milliseconds) before each timed run, so that it never waits for the launches."""


@dataclass(frozen=True)
class Goal:
    """What a figure should be, in the row's own unit."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether a figure is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Found:
    """One figure."""

    value: float
    unit: str
    low: float | None = None
    """20th percentile."""
    high: float | None = None
    """80th percentile."""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    metric: str
    shape: str
    who: str
    found: Found | None
    goal: Goal | None = None
    problem: str = ""
    """Why there is no figure."""

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing where there is no goal."""
        if self.goal is None:
            return ""
        return "no figure" if self.found is None else "met" if self.goal.met(self.found.value) else "MISSED"

    def __str__(self) -> str:
        cells = f"{self.metric:42} {self.shape:3}{self.who:14}"
        if self.found is None:
            return f"{cells}  {self.problem}"
        spread = "" if self.found.low is None else f"({self.found.low:.4g} - {self.found.high:.4g})"
        figure = f"{self.found.value:>10.4g} {self.found.unit:11}{spread:22}"
        return f"{cells}{figure}{'' if self.goal is None else f'goal {self.goal}':16}{self.verdict:8}{self.found.note}"


@dataclass
class Ledger:
    """All rows so far. `judge` is False where figures mean nothing, and goals are then not compared."""

    budget_seconds: float
    judge: bool = True
    rows: list[Row] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def measure(
        self, metric: str, shape: str, who: str, run: Callable[[], Found], goal: Goal | None = None
    ) -> float | None:
        """Add a row and print it; gives its figure, or None when there is none."""
        found, problem = None, ""
        if time.monotonic() - self.begun > self.budget_seconds:
            problem = f"not run: the budget of {self.budget_seconds:g} s is spent"
        else:
            try:
                found = run()
            except NotHere as reason:
                problem = f"not run: {reason}"
            except torch.cuda.OutOfMemoryError as error:
                problem = f"out of memory: {_first_line(error)}"
            except Exception as error:  # a row that fails must not take the rest with it
                problem = f"failed: {type(error).__name__}: {_first_line(error)}"
        row = Row(metric, shape, who, found, goal if self.judge else None, problem)
        self.rows.append(row)
        print(row, flush=True)
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        return found.value if found else None

    def figure(self, metric: str, shape: str, who: str) -> float:
        """A figure that an earlier row gave; raises NotHere when it gave none."""
        for row in self.rows:
            if (row.metric, row.shape, row.who) == (metric, shape, who) and row.found:
                return row.found.value
        raise NotHere(f"{metric} of {who} was not measured")

    def gain(self, metric: str, shape: str, who: str, ours: str, goal: Goal | None = None) -> None:
        """Add the row that says how many times our figure theirs is."""

        def ratio() -> Found:
            return Found(self.figure(metric, shape, who) / self.figure(metric, shape, ours), "times")

        self.measure(f"{metric}, over ours", shape, who, ratio, goal)

    def to_json(self) -> list[dict[str, Any]]:
        """Rows as plain values."""
        return [
            {
                "metric": row.metric,
                "shape": row.shape,
                "who": row.who,
                **(vars(row.found) if row.found else {"problem": row.problem}),
                **({"goal": str(row.goal), "verdict": row.verdict} if row.goal else {}),
            }
            for row in self.rows
        ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:160]


@dataclass(frozen=True)
class Stopwatch:
    """Times a function of the number of its call, by which it can take its inputs in turn.

    On a GPU by events around each call, the GPU kept busy before so that launches are not what is timed.
    """

    device: torch.device
    seconds: float = 0.4
    """About how long one measurement may take."""
    most: int = 100
    """Calls of one measurement, at most."""

    def __call__(self, run: Callable[[int], object]) -> tuple[float, float, float]:
        """(median, 20th, 80th percentile) in milliseconds."""
        for index in range(3 if self.device.type == "cuda" else 1):
            run(index)
        self._wait()
        begin = time.perf_counter()
        run(0)
        self._wait()
        once = time.perf_counter() - begin
        count = max(3, min(self.most, int(self.seconds / max(once, 1e-4))))
        times = sorted(self._gpu(run, count, once) if self.device.type == "cuda" else self._cpu(run, count))
        return statistics.median(times), times[int(0.2 * (count - 1))], times[round(0.8 * (count - 1))]

    def found(self, run: Callable[[int], object], note: str = "") -> Found:
        """As a figure in ms."""
        median, low, high = self(run)
        return Found(median, "ms", low, high, note)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _gpu(self, run: Callable[[int], object], count: int, once: float) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for index, (start, stop) in enumerate(events):
            if once < 0.01:
                torch.cuda._sleep(GPU_LEAD_CYCLES)
            start.record()
            run(index)
            stop.record()
        self._wait()
        return [start.elapsed_time(stop) for start, stop in events]

    def _cpu(self, run: Callable[[int], object], count: int) -> list[float]:
        times = []
        for index in range(count):
            begin = time.perf_counter()
            run(index)
            times.append(1000 * (time.perf_counter() - begin))
        return times


def peak_megabytes(
    run: Callable[[int], object], device: torch.device, forget: Callable[[], object] = lambda: None
) -> float:
    """Most GPU memory that a call takes beyond what was allocated before it, in MiB; raises NotHere off CUDA.

    `forget` drops what an earlier call left behind, gradients above all.
    """
    if device.type != "cuda":
        raise NotHere(f"torch counts no memory on {device.type}")
    run(0)
    forget()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(1)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
