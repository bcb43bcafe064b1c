"""Progress bars, log lines, and switches that silence other libraries.

`with progress("embed", total=n, unit="texts") as bar: bar.advance(k)` draws a bar on a terminal, or logs a line every
ten seconds. Only rank 0 should show progress (`show=False` on the others).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0
_OURS = "pst_dist"


class Progress:
    """Counts completed units and derives speed and time left; `emit` gets each log line when it is due."""

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        emit: Callable[[str], None] | None = None,
        every_seconds: float = LOG_EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.unit, self.done, self.note = name, total, unit, 0, ""
        self._passing = False
        self._emit, self._every, self._clock = emit, every_seconds, clock
        self._start = self._last = clock()
        self._done_before = 0

    def restart(self) -> None:
        """Measure time and speed from now on; earlier units were set-up, or were done by an earlier run."""
        self._start = self._last = self._clock()
        self._done_before = self.done

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` units; `note` replaces the text at the end of the line ("loss 1.83").

        A note without a unit says what goes on within one, and disappears with the next unit.
        """
        self.done += count
        if note or (count and self._passing):
            self.note, self._passing = note, count == 0
        if self._emit is not None and self._clock() - self._last >= self._every:
            self._last = self._clock()
            self._emit(self.line())

    def skip(self, count: int) -> None:
        """Add units that an earlier run completed; they do not count towards this run's speed."""
        self._done_before += count
        self.advance(count)

    @property
    def rate(self) -> float:
        """Units per second since the start or restart; 0 before the first."""
        seconds = self._clock() - self._start
        return (self.done - self._done_before) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time left at the current speed; None when the total or the speed is unknown."""
        if self.total is None or self.rate == 0:
            return None
        return max(0, self.total - self.done) / self.rate

    def line(self, *, final: bool = False) -> str:
        """`embed 1,200/3,000 texts  412.0 texts/s  4 s left`; the final line gives the total time instead."""
        of = f"/{self.total:,}" if self.total is not None else ""
        rate = self.rate
        speed = f"{rate:,.1f}" if rate >= 1 or rate == 0 else f"{rate:.2g}"  # a slow step is not 0.0 steps/s
        parts = [f"{self.name} {self.done:,}{of} {self.unit}", f"{speed} {self.unit}/s"]
        left = self.seconds_left
        if final:
            parts.append(f"in {duration(self._clock() - self._start)}")
        elif left is not None:
            parts.append(f"{duration(left)} left")
        if self.note and not (final and self._passing):
            parts.append(self.note)
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextlib.contextmanager
def progress(
    name: str,
    total: int | None = None,
    unit: str = "items",
    *,
    every_seconds: float = LOG_EVERY_SECONDS,
    show: bool = True,
) -> Iterator[Progress]:
    """A `Progress` that displays itself: a rich bar on a terminal (stderr) or in a notebook, otherwise log lines.

    Log lines appear at most every `every_seconds`. Both end with a line that gives the total time, even if the body
    raises. A level above INFO on the logger `pst_dist` silences both.
    """
    if show and logging.getLogger(_OURS).level <= logging.INFO and (sys.stderr.isatty() or _in_notebook()):
        with _rich_bar(name, total, unit) as bar:
            yield bar
    else:
        bar = Progress(name, total, unit, emit=log.info if show else None, every_seconds=every_seconds)
        try:
            yield bar
        finally:
            if show:
                log.info(bar.line(final=True))


def _in_notebook() -> bool:
    """Whether this is a notebook in which rich can draw; without ipywidgets it would show nothing."""
    shell = sys.modules.get("IPython")
    if shell is None or type(shell.get_ipython()).__name__ not in ("ZMQInteractiveShell", "Shell"):
        return False
    return importlib.util.find_spec("ipywidgets") is not None


class _Shown:
    """The number of active `shown_by_default` blocks in all threads, and the handler that they share."""

    lock = threading.Lock()
    count = 0
    handler: logging.Handler | None = None
    level = logging.NOTSET


@contextlib.contextmanager
def shown_by_default() -> Iterator[None]:
    """Write our log lines to standard error while the body runs, unless the application has configured logging.

    If the root logger or ours has a handler, nothing is changed. A level set on our logger is respected; otherwise it
    is INFO while the body runs.
    """
    ours = logging.getLogger(_OURS)
    with _Shown.lock:
        joins = _Shown.count > 0 or not (ours.handlers or logging.getLogger().handlers)
        if joins and _Shown.count == 0:
            _Shown.handler, _Shown.level = logging.StreamHandler(), ours.level
            _Shown.handler.setFormatter(logging.Formatter("%(message)s"))
            ours.addHandler(_Shown.handler)
            if ours.level == logging.NOTSET:
                ours.setLevel(logging.INFO)
        _Shown.count += joins
    try:
        yield
    finally:
        with _Shown.lock:
            _Shown.count -= joins
            if joins and _Shown.count == 0 and _Shown.handler is not None:
                ours.removeHandler(_Shown.handler)
                ours.setLevel(_Shown.level)
                _Shown.handler = None


@contextlib.contextmanager
def _rich_bar(name: str, total: int | None, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task(name, total=total, speed=unit)

        class Bar(Progress):
            def advance(self, count: int = 1, note: str = "") -> None:
                super().advance(count, note)
                # The bar shows name and count; we add the rest of the line.
                display.update(task, completed=self.done, speed="  ".join(self.line().split("  ")[1:]))

        bar = Bar(name, total, unit)
        try:
            yield bar
        finally:
            log.info(bar.line(final=True))


_NOISE = re.compile(
    # Checked by this package, which refuses or reports them in its own words: weights that are missing from the files
    # (`models.weight_checks`), generation settings (`student.saved`), texts over the length limit (`student.layout`).
    r"LOAD REPORT|seem corrupted|generation flags|longer than the specified maximum"
    # Which of two checkpoints is older, when both were written within a second (`embedding.train_encoder`).
    r"|mtime may not be reliable"
    # Only relevant to the callers of a library.
    r"|deprecat|will be removed|use_cache=(True|False)|loss_type"
    r"|new (embeddings|lm_head weights) will be|special tokens have been added",
    re.IGNORECASE,
)
"""Warnings of transformers that a user of this package cannot act on. All others are shown: a wrong tokenizer class or
pattern, a setting without effect, padding on the wrong side."""


class _WithoutNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not _NOISE.search(record.getMessage())


def drop_noise() -> None:
    """Show the warnings of transformers that matter and hide the others; may be called repeatedly."""
    import transformers  # noqa: F401  its import makes the handler

    for handler in logging.getLogger("transformers").handlers:
        if not any(isinstance(found, _WithoutNoise) for found in handler.filters):
            handler.addFilter(_WithoutNoise())
    # On CPUs with AVX-512 its import asks for a package of 4-bit kernels; here 4-bit students need a GPU anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silence the progress bars of transformers (one per file) and DeepSpeed's messages about the accelerator.

    Warnings of transformers stay, but for those in `_NOISE`. Call before sentence_transformers or deepspeed are
    imported: importing the one may import the other.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    drop_noise()
    for name in ("DeepSpeed", "deepspeed", "sentence_transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Keep other libraries' progress bars, info lines and noise out of the output while the body runs."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging as transformers_logging

    drop_noise()
    was_on = transformers_logging.is_progress_bar_enabled()
    hub_was_off = hub.are_progress_bars_disabled()
    chatter = logging.getLogger("sentence_transformers")
    level = chatter.level
    chatter.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        chatter.setLevel(level)
        if was_on:
            transformers_logging.enable_progress_bar()
        if not hub_was_off:
            hub.enable_progress_bars()
