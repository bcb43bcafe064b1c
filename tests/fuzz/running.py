"""Feeding inputs to parsers and counting what comes out: results, refusals, tracebacks and calls that take too long."""

from __future__ import annotations

import logging
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pst_dist.errors import PstError

from .mutations import mutated
from .parsers import PARSERS, Parser

MOST_SECONDS = 5.0
"""CPU seconds that one call may take; those of today take a hundredth."""


class TooLong(BaseException):
    """A call was ended because it took too long; no parser catches it."""


@dataclass
class Count:
    """What came of one parser's inputs."""

    parser: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    """One line for each input that ended in anything else."""
    hangs: int = 0
    """How many of the failures took too long; the others are tracebacks."""
    slowest: float = 0.0
    """CPU seconds of the longest call."""


def run(
    total: int, *, seed: int = 0, only: Sequence[str] = (), on_count: Callable[[Count], None] = lambda count: None
) -> list[Count]:
    """Share `total` inputs out among the parsers by their weights; equal arguments give equal inputs.

    `on_count` is called with the count of each parser as it ends.
    """
    chosen = [parser for parser in PARSERS if not only or parser.name in only]
    weights = sum(parser.weight for parser in chosen)
    counts = []
    logging.disable(logging.CRITICAL)
    previous = signal.signal(signal.SIGPROF, _end)
    try:
        for parser in chosen:
            counts.append(_count(parser, max(1, round(total * parser.weight / weights)), seed))
            on_count(counts[-1])
    finally:
        signal.signal(signal.SIGPROF, previous)
        logging.disable(logging.NOTSET)
    return counts


def _end(number: int, frame: FrameType | None) -> None:
    raise TooLong


def _count(parser: Parser, inputs: int, seed: int) -> Count:
    count = Count(parser.name)
    with tempfile.TemporaryDirectory(prefix="pst-fuzz-") as name:
        folder = Path(name)
        for valid in parser.seeds:  # a parser that refuses these is not tested by what is made of them
            try:
                parser.read(valid, folder)
            except PstError as error:
                count.failures.append(f"{parser.name}: refused a valid input: {error}")
        for number in range(inputs):
            rng = random.Random(f"{seed}/{parser.name}/{number}")
            content = mutated(rng, rng.choice(parser.seeds))
            began = time.process_time()
            count.inputs += 1
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            try:
                parser.read(content, folder)
                count.accepted += 1
            except PstError as error:
                str(error)
                count.refused += 1
            except TooLong:
                count.hangs += 1
                count.failures.append(f"{parser.name} {number}: over {MOST_SECONDS:.0f} CPU s on {content[:60]!r}")
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                said = str(error)[:80].encode("ascii", "backslashreplace").decode()
                line = f"{parser.name} {number}: {type(error).__name__} at {where}: {said} on {content[:60]!r}"
                count.failures.append(line)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            count.slowest = max(count.slowest, time.process_time() - began)
    return count


def table(counts: Sequence[Count]) -> str:
    """A line for each parser and their sum."""
    total = Count("all")
    for count in counts:
        total.inputs += count.inputs
        total.accepted += count.accepted
        total.refused += count.refused
        total.failures += count.failures
        total.hangs += count.hangs
        total.slowest = max(total.slowest, count.slowest)
    rows = [("parser", "inputs", "accepted", "refused", "tracebacks", "hangs", "slowest, s")]
    rows += [
        (
            *(c.parser, f"{c.inputs:,}", f"{c.accepted:,}", f"{c.refused:,}"),
            *(str(len(c.failures) - c.hangs), str(c.hangs), f"{c.slowest:.2f}"),
        )
        for c in (*counts, total)
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
