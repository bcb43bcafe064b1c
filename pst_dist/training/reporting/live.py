"""The training's progress for other programs: `live.json`, which rank zero replaces at most every few seconds.

`pst watch` shows it. It contains the last row of metrics.jsonl, the last validation, the speed and time left of this
start, each rank's share of the last steps, the latest warnings and some sample answers. A training never reads it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pst_dist.distributed.ranks import Ranks, gathered
from pst_dist.errors import PstError
from pst_dist.storage.json_files import write_json
from pst_dist.storage.outputs import refuse_link_out
from pst_dist.text.redaction import redact

LIVE = "live.json"
EVERY_SECONDS = 3.0
_MOST_WARNINGS, _LONGEST = 20, 500
_STEPS = 20
"""Steps whose mean time gives the time left."""


@dataclass(frozen=True)
class RankSigns:
    """One rank's share of the steps since the last log line."""

    rank: int
    host: str
    device: str
    busy: float
    """Share of the time spent in its own forward and backward passes, 0 … 1; a rank far above the others holds them up.
    With ZeRO, passes include the communication that overlaps with them."""
    memory_bytes: int
    """Most memory in use: of the GPU by torch, or of the process on a CPU."""


class BusyShare:
    """Measures the share of time that this rank spends in its own passes, from one call to the next."""

    def __init__(self) -> None:
        self._since, self._busy_seconds = time.monotonic(), 0.0

    def since_last(self, busy_seconds: float) -> float:
        """The share since the last call or the start, at most 1; `busy_seconds` is `Engine.busy_seconds`."""
        now = time.monotonic()
        share = (busy_seconds - self._busy_seconds) / max(now - self._since, 1e-9)
        self._since, self._busy_seconds = now, busy_seconds
        return min(1.0, share)


def gather_signs(ranks: Ranks, device: torch.device, busy: float) -> list[RankSigns]:
    """The signs of all ranks in rank order; collective."""
    return gathered(RankSigns(ranks.rank, os.uname().nodename, str(device), busy, _memory(device)))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


class Live:
    """Writes `live.json` of a run directory on rank zero; a context manager."""

    def __init__(self, folder: Path, arm: str, *, first_step: int, total: int) -> None:
        self._path = folder / LIVE
        refuse_link_out(self._path, folder)
        now = time.time()
        self._values: dict[str, Any] = {
            "state": "running",
            "arm": arm,
            "step": first_step,
            "total": total,
            "started": now,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "metrics": {},
            "validation": None,
            "ranks": [],
            "answers": [],
        }
        self._warnings: deque[dict[str, Any]] = deque(maxlen=_MOST_WARNINGS)
        self._ends: deque[float] = deque(maxlen=_STEPS + 1)
        self._written = -math.inf
        self._handler = _Warnings(self._warnings)

    def __enter__(self) -> Live:
        logging.getLogger("pst_dist").addHandler(self._handler)
        self._ends.append(time.monotonic())
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        logging.getLogger("pst_dist").removeHandler(self._handler)
        self._values |= {"state": "done" if kind is None else "failed", "seconds_left": None}
        if error is not None:
            self._values["error"] = str(error) if isinstance(error, PstError) else type(error).__name__
        self._write()

    def stepped(self, step: int) -> None:
        """Tell that a step is done; writes the file when the last time is some seconds ago."""
        self._ends.append(time.monotonic())
        seconds = (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        left = max(0, self._values["total"] - step) * seconds
        self._values |= {"step": step, "seconds_per_step": seconds, "seconds_left": left}
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self._write()

    def logged(self, row: Mapping[str, Any], signs: Sequence[RankSigns]) -> None:
        """Tell the row of metrics of a logged step, and the ranks' signs."""
        self._values |= {"metrics": dict(row), "ranks": [asdict(one) for one in signs]}

    def validated(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Tell the scores of a validation that took so many seconds; they do not count as a step's time."""
        self._values["validation"] = {"step": step, "seconds": seconds, **values}
        self._restart_clock()

    def answered(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Tell the latest sample answers."""
        self._values["answers"] = [dict(one) for one in answers]
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Measure steps from now on."""
        seconds = self._values.get("seconds_per_step")
        self._ends.clear()
        now = time.monotonic()
        self._ends.extend((now - seconds, now) if seconds else (now,))
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        values = self._values | {"updated": time.time(), "warnings": list(self._warnings)}
        with contextlib.suppress(PstError, OSError):  # only for people: a full disk is reported where it matters
            write_json(self._path, _finite(values))


class _Warnings(logging.Handler):
    """Keeps the latest warnings."""

    def __init__(self, kept: deque[dict[str, Any]]) -> None:
        super().__init__(logging.WARNING)
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append({"time": record.created, "text": redact(record.getMessage())[:_LONGEST]})


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
