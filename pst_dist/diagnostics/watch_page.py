"""The screen of `pst watch`, and its plain lines if there is no terminal; `diagnostics.watch` reads the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pst_dist.config.stage import ENDED
from pst_dist.diagnostics.watch import SILENT_SECONDS, ArmView, Training, View
from pst_dist.errors import PeerLostError
from pst_dist.logs import duration
from pst_dist.text.characters import hidden_character

_TERMS = {"answer_nll": "answer", "rationale_nll": "rationale", "alignment": "alignment"}
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 32
_MOST_WARNINGS, _MOST_RANKS = 5, 16
_ENDS = {0: "done", 75: "stopped and saved; the same command resumes", 130: "interrupted; the same command resumes"}


def screen(view: View, now: float) -> RenderableType:
    """Everything on one screen; `now` in seconds since 1970."""
    parts: list[RenderableType] = [Text(headline(view, now), style="bold")]
    for arm in view.arms:
        is_current = arm.training is not None and (arm.training.state != "done" or len(view.arms) == 1)
        parts += [Text(), *_panel(arm, now)] if is_current else [Text(_summary(arm))]
    return Group(*parts)


def headline(view: View, now: float) -> str:
    """One line: directory, stage, for how long, where; or how it ended."""
    stage = view.stage
    if view.is_gone:
        return f"{view.folder}  {end_words(view)}"
    if stage is None:
        return f"{view.folder}  training"
    if stage.state == ENDED:
        return f"{view.folder}  {end_words(view)}"
    where = f"process {stage.pid} on {stage.host}"
    return f"{view.folder}  {_plain(stage.stage)}  for {duration(max(0.0, now - stage.since))}  ({_plain(where)})"


def end_words(view: View) -> str:
    """How a run ended, in a few words."""
    if view.is_gone:
        return "its process is gone; the same command resumes"
    code = view.exit_code
    words = _ENDS.get(code, f"ended with exit code {code}")
    error = view.stage.error if view.stage is not None and code not in _ENDS else None
    return words + (f": {_plain(error)}" if error else "")


class Told:
    """What plain lines have said already."""

    def __init__(self) -> None:
        self._stage = ""
        self._rows: dict[str, tuple[Any, Any]] = {}
        self._warned = 0.0

    def news(self, view: View) -> Iterator[str]:
        """A line for each new stage, logged step, validation and warning since the last call."""
        if view.stage is not None and view.stage.stage != self._stage:
            self._stage = view.stage.stage
            yield f"stage {_plain(self._stage)}"
        for arm in view.arms:
            training = arm.training
            if training is None:
                continue
            before = self._rows.get(arm.name, (None, None))
            row = training.metrics.get("step"), (training.validation or {}).get("step")
            self._rows[arm.name] = row
            if row[0] is not None and row[0] != before[0]:
                yield step_line(arm)
            if row[1] is not None and row[1] != before[1]:
                yield f"{_plain(arm.name)}  {validation_line(arm)}"
            fresh = [warned for warned in training.warnings if warned.time > self._warned]
            for warned in fresh:
                self._warned = warned.time
                yield f"warning: {_plain(warned.text)}"


def lost(view: View) -> PeerLostError:
    """The error for a process that is gone."""
    return PeerLostError("the process of this run is gone", "the same command resumes it", path=view.folder)


def step_line(arm: ArmView) -> str:
    """`pst step 120/2,000  loss 1.8342  …  412 tok/s  11 min left`: one line of a training."""
    training = arm.training
    if training is None:
        return f"{arm.name}  not begun"
    row = training.metrics
    parts = [f"{_plain(arm.name)}  step {training.step:,}/{training.total:,}", *_terms(row)]
    if (speed := _number(row, "tokens_per_second")) is not None:
        parts.append(f"{speed:,.0f} tok/s")
    if training.seconds_left is not None and training.state == "running":
        parts.append(f"{duration(training.seconds_left)} left")
    return "  ".join(parts)


def validation_line(arm: ArmView) -> str | None:
    """`validation at step 100: accuracy 71.0 %  answer_nll 0.5120`; None before the first."""
    found = arm.training.validation if arm.training is not None else None
    if not found:
        return None
    names = ("accuracy", "written_nll", "answer_nll", "rationale_nll", "alignment", "cosine", "loss")
    values = [(name, _number(found, name)) for name in names]
    shown = [
        f"{name} {100 * value:.1f} %" if name == "accuracy" else f"{name} {value:.4f}"
        for name, value in values
        if value is not None
    ]
    return f"validation at step {found.get('step')}: {'  '.join(shown)}"


def sparkline(values: Sequence[float], width: int = _SPARK) -> str:
    """The values as a row of bars from their least to their greatest; the mean of each of at most `width` parts."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    parts = min(width, len(finite))
    means = []
    for part in range(parts):
        chunk = finite[part * len(finite) // parts : (part + 1) * len(finite) // parts]
        means.append(sum(chunk) / len(chunk))
    low, high = min(means), max(means)
    return "".join(
        _BARS[round((len(_BARS) - 1) * (mean - low) / (high - low))] if high > low else _BARS[0] for mean in means
    )


def _panel(arm: ArmView, now: float) -> Iterator[RenderableType]:
    training = arm.training
    assert training is not None
    yield from _progress(arm, training, now)
    grid = Table.grid(padding=(0, 2))
    for name, words in [
        ("terms", "  ".join(_terms(training.metrics))),
        ("optimizer", "  ".join(_rates(training.metrics))),
    ]:
        if words:
            grid.add_row(Text(name, style="dim"), Text(words))
    if (validation := validation_line(arm)) is not None:
        grid.add_row(Text("validation", style="dim"), Text(validation.partition(" ")[2]))
    for name, values in _curves(arm):
        grid.add_row(Text(name, style="dim"), Text(f"{sparkline(values)}  {values[0]:.4g} -> {values[-1]:.4g}"))
    yield grid
    if len(training.ranks) > 1:
        yield _ranks(training)
    if training.answers:
        yield _answers(training)
    for warned in training.warnings[-_MOST_WARNINGS:]:
        yield Text(f"warning: {_plain(warned.text)}", style="yellow")
    if training.error:
        yield Text(_plain(training.error), style="red")


def _progress(arm: ArmView, training: Training, now: float) -> Iterator[RenderableType]:
    line = Table.grid(padding=(0, 1))
    share = f"{100 * training.step / max(1, training.total):.0f} %"
    left = f"{duration(training.seconds_left)} left" if training.seconds_left is not None else ""
    each = f"{training.seconds_per_step:.2f} s/step" if training.seconds_per_step else ""
    speed = _number(training.metrics, "tokens_per_second")
    line.add_row(
        Text(_plain(arm.name), style="bold cyan"),
        f"step {training.step:,}/{training.total:,}",
        ProgressBar(total=max(1, training.total), completed=training.step, width=24),
        share,
        f"{speed:,.0f} tok/s" if speed is not None else "",
        each,
        left,
    )
    yield line
    silent = now - training.updated
    if training.state == "running" and silent > max(SILENT_SECONDS, 5 * (training.seconds_per_step or 0)):
        yield Text(f"no sign for {duration(silent)}", style="yellow")


def _terms(row: dict[str, Any]) -> list[str]:
    values = [("loss", _number(row, "loss"))]
    values += [(word, _number(row, name)) for name, word in _TERMS.items()]
    values.append(("cosine", _number(row, "cosine")))
    return [f"{name} {value:.4f}" for name, value in values if value is not None]


def _rates(row: dict[str, Any]) -> list[str]:
    found = [(name, _number(row, key)) for name, key in (("rate", "learning_rate"), ("gradient", "grad_norm"))]
    words = [f"{name} {value:.3g}" for name, value in found if value is not None]
    if (padding := _number(row, "padding")) is not None:
        words.append(f"padding {100 * padding:.0f} %")
    return words


def _curves(arm: ArmView) -> Iterator[tuple[str, list[float]]]:
    rows = [row for row in arm.history if "loss" in row]
    scored = [row["validation"] for row in arm.history if isinstance(row.get("validation"), dict)]
    for name, source, key in (
        ("loss", rows, "loss"),
        ("cosine", rows, "cosine"),
        ("validated nll", scored, "answer_nll"),
        ("accuracy", scored, "accuracy"),
    ):
        values = [value for row in source if (value := _number(row, key)) is not None]
        if len(values) > 1:
            yield name, values


def _ranks(training: Training) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2))
    for head in ("rank", "host", "device", "busy", "memory"):
        table.add_column(head, justify="right" if head in ("busy", "memory") else "left")
    shown = sorted(training.ranks, key=lambda one: -one.busy)[:_MOST_RANKS]
    for one in sorted(shown, key=lambda one: one.rank):
        memory = f"{one.memory_bytes / 2**30:.2f} GiB"
        table.add_row(str(one.rank), escape(_plain(one.host)), escape(one.device), f"{100 * one.busy:.0f} %", memory)
    if len(training.ranks) > len(shown):
        table.add_row("", f"the {len(shown)} busiest of {len(training.ranks)}")
    return table


def _answers(training: Training) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2))
    for head in ("validation question", "gold", "answer"):
        table.add_column(head, overflow="ellipsis", no_wrap=True, ratio=1 if head != "validation question" else 3)
    for one in training.answers[:_MOST_WARNINGS]:
        style = "green" if one.right else "red"
        table.add_row(Text(_plain(one.question)), Text(_plain(one.gold)), Text(_plain(one.answer), style=style))
    return table


def _summary(arm: ArmView) -> str:
    """An arm that is not training now, on one line."""
    if arm.training is None and not arm.is_finished:
        return f"{arm.name}  waits"
    words = f"{arm.name}  trained"
    return (
        words if arm.training is None else f"{words} {arm.training.step:,} steps  {validation_line(arm) or ''}".rstrip()
    )


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _plain(text: str) -> str:
    """A text of a file on one line, without control characters that a terminal would obey."""
    return " ".join("".join("\ufffd" if hidden_character(one) else one for one in " ".join(text.split())).split())
