"""Plots of what a run costs: speed and padding while it trained, and the tokens of its answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pst_dist.evaluation.records import is_plottable
from pst_dist.publish.plots import FAINT, INK, add_legend, from_zero, name_axes, new_figure, series, to_png

_RIGHT, _WRONG = "#18794e", "#b3261e"
_BINS = 24


def throughput_plot(metrics: Sequence[dict[str, Any]]) -> bytes | None:
    """Tokens per second over steps, and the share of padding; None without two logged steps."""
    steps, speeds = series(metrics, "tokens_per_second")
    if len(steps) < 2:
        return None
    padded, padding = series(metrics, "padding")
    figure, axes = new_figure(10.3 if padded else 5.0, 3.0, 2 if padded else 1)
    axes[0].plot(steps, speeds, color=INK, linewidth=1.6)
    name_axes(axes[0], "optimizer step", "tokens per second", "Speed, all ranks together")
    from_zero(axes[0])
    if padded:
        axes[1].plot(padded, [100 * value for value in padding], color=FAINT, linewidth=1.6)
        name_axes(axes[1], "optimizer step", "% of the positions", "Padding")
        from_zero(axes[1])
    return to_png(figure)


def lengths_plot(rows: Sequence[dict[str, Any]]) -> bytes | None:
    """Histogram of the tokens to the answer, right and wrong answers apart; None where no row has them."""
    counted = [row for row in rows if is_plottable(row.get("answer_tokens"))]
    if not counted:
        return None
    longest = max(row["answer_tokens"] for row in counted)
    width = max(1, math.ceil((longest + 1) / _BINS))
    parts = [[row["answer_tokens"] for row in counted if row["correct"] is right] for right in (True, False)]
    figure, axes = new_figure(5.0, 3.0)
    edges = [width * k - 0.5 for k in range((longest + width) // width + 1)]
    axes[0].set_xlim(left=-0.5, right=max(edges[-1], 9.5))  # one narrow bar where all answers are short
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].hist(parts, bins=edges, stacked=True, color=[_RIGHT, _WRONG], label=["right", "wrong"])
    name_axes(axes[0], "tokens to the answer", "rows", "Length of the answers")
    add_legend(axes[0])
    return to_png(figure)
