"""The page on which several arms stand side by side: table, accuracy against tokens, loss curves, sample answers.

The statistics are `compare`, the pictures `plots`, the HTML `page`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_dist.config.loading import RESOLVED
from pst_dist.evaluation.compare import ArmResult, Comparison, cells, compare
from pst_dist.evaluation.records import read_metrics
from pst_dist.publish import html, plots
from pst_dist.publish.html import Cell, Row
from pst_dist.storage.atomic import write_text

_SHOWN = 12


def compare_report(runs: Sequence[Path], target: Path) -> Path:
    """Write one self-contained page with all arms side by side to `target` and return it.

    Raises InputError and StaleError as `compare` does. Nothing in the page is fetched from anywhere.
    """
    comparison = compare(runs)
    metrics = [read_metrics(arm.run / "metrics.jsonl") for arm in comparison.arms]
    curves = plots.curves_plot(comparison, metrics)
    body = [
        html.tiles(_comparison_headline(comparison)),
        html.heading("Accuracy"),
        _arms_table(comparison),
        html.paragraph(_reading(comparison), note=True),
        html.heading("Accuracy against tokens to the answer"),
        html.figure(
            plots.accuracy_plot(comparison),
            "Up is more often right, left is fewer tokens before the answer is there. Bars are one standard "
            "error; arms with nearly equal tokens are drawn side by side.",
        ),
    ]
    if curves is not None:
        caption = "The answer's loss while training: left on the batches trained on, right on held-out validation rows."
        body += [html.heading("Loss curves"), html.figure(curves, caption)]
    body += [*_side_by_side(comparison), html.heading("Cost of training"), _cost_table(comparison)]
    body += [html.heading("How to do it again"), html.code(_commands(comparison, target))]
    title = f"{comparison.task}: {len(comparison.arms)} arms on identical rows"
    lead = f"Scored on the same {comparison.rows:,} {comparison.split} rows, decoded greedily."
    write_text(target, html.document(title, lead, body))
    return target


def _comparison_headline(comparison: Comparison) -> list[tuple[str, str]]:
    best = max(comparison.arms, key=lambda arm: arm.results["accuracy"])
    tiles = [(html.percent(best.results["accuracy"]), f"best accuracy: {best.label}")]
    baseline = next(arm for arm in comparison.arms if arm.label == comparison.baseline)
    if baseline is not best:
        tiles.append((html.percent(baseline.results["accuracy"]), f"baseline: {baseline.label}"))
    if best.times_fewer_tokens and best.results["arm"] != "pre_thinking":
        tiles.append((f"{best.times_fewer_tokens:.1f}x", f"fewer tokens to the answer than pre_thinking: {best.label}"))
    return tiles


def _arms_table(comparison: Comparison) -> str:
    head: Row = ["arm", *(Cell(name, "right") for name in comparison.columns())]
    rows = [
        [Cell(arm.label, colour=style["color"]), *(Cell(cell, "right") for cell in cells(arm))]
        for arm, style in _styled(comparison)
    ]
    return html.table(head, rows)


def _reading(comparison: Comparison) -> str:
    chance = comparison.arms[0].results["chance"]
    words = (
        f"Differences are in points against {comparison.baseline}, row by row on the same rows: the interval is a "
        "paired bootstrap, p is McNemar's exact test, two-sided and not corrected for several comparisons. s.e. is the "
        "binomial standard error of the accuracy; it says nothing about other seeds. Unread: no answer of the task's "
        "type stood in the text."
    )
    if any(arm.times_fewer_tokens for arm in comparison.arms):
        words += " Fewer: tokens to the answer of pre_thinking over this arm's."
    return words + (f" Guessing gives {100 * chance:.1f} %." if chance else "")


def _side_by_side(comparison: Comparison) -> list[str]:
    """Sample answers of all arms: first rows on which they disagree, then others."""
    marks = list(zip(*([row["correct"] for row in arm.samples] for arm in comparison.arms), strict=True))
    order = sorted(range(len(marks)), key=lambda k: (len(set(marks[k])) == 1, k))[:_SHOWN]
    split = sum(len(set(marks[k])) > 1 for k in order)
    head: Row = [
        "question",
        "gold",
        *(Cell(arm.label, colour=s["color"]) for arm, s in _styled(comparison)),
    ]
    first = comparison.arms[0].samples
    rows = [
        [
            html.shortened(first[k]["question"]),
            first[k]["gold"],
            *(html.answer_cell(arm.samples[k]) for arm in comparison.arms),
        ]
        for k in order
    ]
    note = (
        f"{split} rows on which the arms disagree, then {len(order) - split} others, in the order of the split; "
        "right answers in green and wrong ones in red."
    )
    return [html.heading("Sample answers"), html.paragraph(note, note=True), html.table(head, rows)]


def _styled(comparison: Comparison) -> list[tuple[ArmResult, dict[str, Any]]]:
    return list(zip(comparison.arms, plots.styles(comparison), strict=True))


def _cost_table(comparison: Comparison) -> str:
    head: Row = [
        "arm",
        *(Cell(name, "right") for name in ("steps", "training", "tokens trained on", "parameters", "seed")),
    ]
    rows = []
    for arm, style in _styled(comparison):
        training = arm.results.get("training") or {}
        cells = (
            f"{training['steps']:,}" if training else "",
            html.duration(training["seconds"]) if training else "",
            f"{training['tokens']:,}" if training else "",
            f"{arm.results.get('parameters', 0):,}",
            str(arm.results["seed"]),
        )
        rows.append([Cell(arm.label, colour=style["color"]), *(Cell(cell, "right") for cell in cells)])
    return html.table(head, rows)


def _commands(comparison: Comparison, target: Path) -> str:
    """What to type to make every run again, and this page."""
    made_by = dict.fromkeys(
        command.read_text(encoding="utf-8").strip()
        for arm in comparison.arms
        if (command := arm.run / "command.txt").is_file()
    )
    again = [f"pst run {shlex.quote(str(arm.run / RESOLVED))}   # {arm.label}" for arm in comparison.arms]
    runs = " ".join(shlex.quote(str(arm.run)) for arm in comparison.arms)
    page_again = f"pst compare {runs} --output {shlex.quote(str(target))}"
    recorded = ["# these runs were made by", *made_by, ""] if made_by else []
    return "\n".join(
        [*recorded, "# each of them again, from its resolved config", *again, "", "# this page", page_again]
    )
