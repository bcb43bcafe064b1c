"""The page that compares several arms: table, accuracy against tokens, loss curves, sample answers.

The statistics come from `evaluation.compare`, the plots from `plots`, the layout from `templates/compare.html`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_dist.arms import COST_BASELINE
from pst_dist.config.locate import RESOLVED
from pst_dist.evaluation.compare import ArmResult, Comparison, cells, compare
from pst_dist.evaluation.evaluate import SPLITS_SCORED
from pst_dist.evaluation.records import read_metrics
from pst_dist.evaluation.scores import per_correct
from pst_dist.evaluation.verdict import verdict
from pst_dist.publish import html, markdown, plots
from pst_dist.publish.html import Cell, Figure, Row, Table
from pst_dist.publish.render import render
from pst_dist.storage.outputs import check_output, is_markdown_page, is_page, write_output
from pst_dist.text.redaction import redact

_SHOWN = 12
_ACCURACY_CAPTION = (
    "Higher is more accurate; further left means fewer tokens to the answer. Bars show one standard error. "
    "Arms with nearly equal token counts are drawn side by side."
)
_COSTS = (
    *("steps", "training", "tokens trained on", "tokens per second"),
    *("tokens per correct answer", "ms per correct answer", "parameters", "seed"),
)
_CURVES_CAPTION = (
    "Loss of the answer during training: on training batches (left) and on held-out validation rows (right)."
)


def compare_report(runs: Sequence[Path], target: Path) -> Path:
    """Write one self-contained page with all arms side by side to `target`, its tables beside it as `.md`; returns it.

    Raises InputError and StaleError as `compare` does, InputError for a target that is not ours, and EnvironmentFault
    without matplotlib or scipy.
    """
    text = target.with_suffix(".md")
    check_output(target, is_page)
    check_output(text, is_markdown_page)
    comparison = compare(runs)
    metrics = [read_metrics(arm.run / "metrics.jsonl") for arm in comparison.arms]
    samples, disagreements = _side_by_side(comparison)
    values: dict[str, Any] = {
        "comparison": comparison,
        "verdict": verdict(comparison),
        "arms": _arms_table(comparison),
        "samples": samples,
        "disagreements": disagreements,
        "costs": _cost_table(comparison),
        "commands": _commands(comparison, target),
    }
    page = render(
        "compare.html",
        headline=_comparison_headline(comparison),
        has_cost_baseline=any(arm.times_fewer_tokens for arm in comparison.arms),
        cost_baseline=COST_BASELINE,
        chance=html.percent(comparison.arms[0].results.get("chance") or None),
        accuracy_figure=Figure(plots.accuracy_plot(comparison), _ACCURACY_CAPTION),
        curves=Figure(png, _CURVES_CAPTION) if (png := plots.curves_plot(comparison, metrics)) else None,
        **values,
    )
    write_output(text, render("compare.md", md=markdown, **values), is_markdown_page)
    write_output(target, page, is_page)
    return target


def _comparison_headline(comparison: Comparison) -> list[tuple[str, str]]:
    best = max(comparison.arms, key=lambda arm: arm.results["accuracy"])
    tiles = [(html.percent(best.results["accuracy"]), f"best accuracy: {best.label}")]
    baseline = next(arm for arm in comparison.arms if arm.label == comparison.baseline)
    if baseline is not best:
        tiles.append((html.percent(baseline.results["accuracy"]), f"baseline: {baseline.label}"))
    if best.times_fewer_tokens and best.results["arm"] != COST_BASELINE:
        tiles.append(
            (f"{best.times_fewer_tokens:.1f}x", f"fewer tokens to the answer than {COST_BASELINE}: {best.label}")
        )
    return tiles


def _arms_table(comparison: Comparison) -> Table:
    head: Row = ["arm", *(Cell(name, "right") for name in comparison.columns())]
    rows: list[Row] = [
        [Cell(arm.label, colour=style["color"]), *(Cell(cell, "right") for cell in cells(arm))]
        for arm, style in _styled(comparison)
    ]
    return Table(head, rows)


def _side_by_side(comparison: Comparison) -> tuple[Table, int]:
    """(sample answers of all arms, number of shown rows on which they disagree); those rows come first."""
    marks = list(zip(*([row["correct"] for row in arm.samples] for arm in comparison.arms), strict=True))
    order = sorted(range(len(marks)), key=lambda k: (len(set(marks[k])) == 1, k))[:_SHOWN]
    head: Row = ["question", "gold", *(Cell(arm.label, colour=s["color"]) for arm, s in _styled(comparison))]
    first = comparison.arms[0].samples
    rows: list[Row] = [
        [
            html.shortened(first[k]["question"]),
            first[k]["gold"],
            *(html.answer_cell(arm.samples[k]) for arm in comparison.arms),
        ]
        for k in order
    ]
    return Table(head, rows), sum(len(set(marks[k])) > 1 for k in order)


def _styled(comparison: Comparison) -> list[tuple[ArmResult, dict[str, Any]]]:
    return list(zip(comparison.arms, plots.styles(comparison), strict=True))


def _cost_table(comparison: Comparison) -> Table:
    head: Row = [
        "arm",
        *(Cell(name, "right") for name in _COSTS),
    ]
    rows: list[Row] = []
    for arm, style in _styled(comparison):
        training = arm.results.get("training") or {}
        cells = (
            f"{training['steps']:,}" if training else "",
            html.duration(training["seconds"]) if training else "",
            f"{training['tokens']:,}" if training else "",
            f"{training['tokens'] / training['seconds']:,.0f}" if training.get("seconds") else "",
            *per_correct(arm.results),
            f"{arm.results.get('parameters', 0):,}",
            str(arm.results["seed"]),
        )
        rows.append([Cell(arm.label, colour=style["color"]), *(Cell(cell, "right") for cell in cells)])
    return Table(head, rows)


def _commands(comparison: Comparison, target: Path) -> str:
    """The commands that recreate every run and this page."""
    made_by = dict.fromkeys(
        redact(command.read_text(encoding="utf-8").strip())
        for arm in comparison.arms
        if (command := arm.run / "command.txt").is_file()
    )
    again = [f"pst run {shlex.quote(str(arm.run / RESOLVED))}   # {arm.label}" for arm in comparison.arms]
    own_rows = comparison.split in SPLITS_SCORED
    runs = " ".join(shlex.quote(str(arm.run if own_rows else arm.folder)) for arm in comparison.arms)
    page_again = f"pst compare {runs} --output {shlex.quote(str(target))}"
    recorded = ["# the commands that produced these runs", *made_by, ""] if made_by else []
    return "\n".join(
        [*recorded, "# repeat each run from its resolved config", *again, "", "# recreate this page", page_again]
    )
