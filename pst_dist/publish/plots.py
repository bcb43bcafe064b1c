"""The plots of a run's metrics and of a comparison's accuracies, each a PNG in memory.

Each arm has one colour, from `arms`, on every page. `run_page` and `compare_page` place the plots.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pst_dist.arms import ARMS
from pst_dist.errors import EnvironmentFault
from pst_dist.evaluation.records import is_plottable

if TYPE_CHECKING:
    from pst_dist.evaluation.compare import Comparison

METRIC_WORDS = {"accuracy": "accuracy", "answer_nll": "NLL of the answer", "written_nll": "NLL of rationale and answer"}
"""The metric that chooses the checkpoint, in words for the caption."""
TERM_COLOURS = {"answer": "#2f6fdb", "rationale": "#d0790b", "alignment": "#c2255c"}
INK, FAINT, _GRID = "#1f2733", "#7a8493", "#e4e8ee"
_DPI = 192  # twice the displayed size, so that plots stay sharp on a high-density screen


def new_figure(width: float, height: float, panels: int = 1, *, columns: int | None = None) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side or `columns` per row; raises EnvironmentFault without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentFault(f"cannot import {error.name}", "pip install 'pst-dist[report]'") from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    across = min(columns or panels, panels)
    axes = [figure.add_subplot(-(-panels // across), across, k + 1) for k in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(colors=INK, labelsize=9, length=3, color=FAINT)
        axis.grid(axis="y", color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def to_png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": "pst_dist"})
    return stream.getvalue()


def name_axes(axis: Any, x: str, y: str, title: str = "") -> None:
    """Label both axes, and title the panel."""
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    if title:
        axis.set_title(title, fontsize=10, color=INK, loc="left")


def from_zero(axis: Any) -> None:
    """Start the y axis at 0, with room for a dot at the top."""
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])


def add_legend(axis: Any) -> None:
    """A legend without a frame, if any curve has a label."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK)


def series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one training metric at the steps where it was logged."""
    rows = [(row["step"], row[name]) for row in metrics if is_plottable(row.get(name))]
    return [step for step, _ in rows], [value for _, value in rows]


def validation_series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric on the validation rows."""
    rows = [(row["step"], row["validation"][name]) for row in metrics if name in (row.get("validation") or {})]
    return [step for step, _ in rows], [value for _, value in rows]


def _both(axis: Any, metrics: Sequence[dict[str, Any]], name: str, colour: str, label: str) -> bool:
    """Draw a training curve, and validation values as dots on a thin line; False when there is neither."""
    steps, values = series(metrics, name)
    if steps:
        axis.plot(steps, values, color=colour, linewidth=1.6, label=label)
    seen, scores = validation_series(metrics, name)
    if seen:
        axis.plot(
            seen,
            scores,
            color=colour,
            linewidth=0.9,
            linestyle=":",
            marker="o",
            markersize=3,
            label=f"{label}, validation",
        )
    return bool(steps or seen)


def loss_plot(metrics: Sequence[dict[str, Any]]) -> bytes | None:
    """Raw loss terms over steps: cross-entropies on the left, alignment distance on the right; None without any."""
    aligned = bool(series(metrics, "alignment")[0])
    figure, axes = new_figure(10.3 if aligned else 5.0, 3.0, 2 if aligned else 1)
    drawn = _both(axes[0], metrics, "answer_nll", TERM_COLOURS["answer"], "answer")
    drawn |= _both(axes[0], metrics, "rationale_nll", TERM_COLOURS["rationale"], "rationale")
    name_axes(axes[0], "optimizer step", "nats per token", "Cross-entropy")
    if aligned:
        _both(axes[1], metrics, "alignment", TERM_COLOURS["alignment"], "alignment")
        name_axes(axes[1], "optimizer step", "distance per sample", "Distance to the teacher")
    for axis in axes:
        from_zero(axis)
        add_legend(axis)
    return to_png(figure) if drawn else None


def cosine_plot(metrics: Sequence[dict[str, Any]]) -> bytes | None:
    """Cosine between the student's projected state and the teacher's embedding; None without alignment."""
    figure, (axis,) = new_figure(5.0, 2.9)
    if not _both(axis, metrics, "cosine", TERM_COLOURS["alignment"], "cosine"):
        return None
    axis.axhline(0, color=FAINT, linewidth=0.8)
    axis.set_ylim(top=1)
    name_axes(axis, "optimizer step", "mean cosine", "Cosine to the teacher")
    add_legend(axis)
    return to_png(figure)


def gradient_plot(metrics: Sequence[dict[str, Any]]) -> bytes | None:
    """Each term's share of the gradient at the hidden state; None when fewer than two terms were logged."""
    shares = {term: series(metrics, f"gradient_share_{term}") for term in TERM_COLOURS}
    shown = {term: curve for term, curve in shares.items() if curve[0]}
    if len(shown) < 2:
        return None
    figure, (axis,) = new_figure(5.0, 2.9)
    for term, (steps, values) in shown.items():
        axis.plot(steps, [100 * value for value in values], color=TERM_COLOURS[term], linewidth=1.6, label=term)
    axis.set_ylim(0, 100)
    name_axes(axis, "optimizer step", "share of the gradient (%)", "Shares of the gradient")
    add_legend(axis)
    return to_png(figure)


def validation_plot(metrics: Sequence[dict[str, Any]], best_step: int | None, metric: str) -> bytes | None:
    """The metric that chose the checkpoint over steps, the chosen step marked; None without validation rows."""
    steps, values = validation_series(metrics, metric)
    if not steps:
        return None
    scale = 100 if metric == "accuracy" else 1
    figure, (axis,) = new_figure(5.0, 2.9)
    axis.plot(
        steps,
        [scale * value for value in values],
        color=TERM_COLOURS["answer"],
        linewidth=1.4,
        marker="o",
        markersize=3,
    )
    if best_step in steps:
        at = scale * values[steps.index(best_step)]
        axis.plot(
            [best_step], [at], "o", color=TERM_COLOURS["alignment"], markersize=7, label=f"chosen: step {best_step}"
        )
    name_axes(axis, "optimizer step", "accuracy (%)" if metric == "accuracy" else "nats per token", "Validation")
    add_legend(axis)
    return to_png(figure)


def arm_colour(arm: str) -> str:
    """The arm's colour in every plot; a faint one for an arm unknown to this version."""
    return ARMS[arm].colour if arm in ARMS else FAINT


def arm_style(arm: str, index: int) -> dict[str, Any]:
    """An arm's colour, with a line style and marker that differ between runs of the same arm."""
    dashes, markers = ("-", "--", ":", "-."), ("o", "s", "^", "D")
    return {
        "color": arm_colour(arm),
        "linestyle": dashes[index % len(dashes)],
        "marker": markers[index % len(markers)],
    }


def styles(comparison: Comparison) -> list[dict[str, Any]]:
    """One style per run, in order; the colour is the arm's."""
    seen: dict[str, int] = {}
    found = []
    for arm in comparison.arms:
        name = arm.results["arm"]
        found.append(arm_style(name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return found


def accuracy_plot(comparison: Comparison) -> bytes:
    """Accuracy with one standard error against mean tokens to the answer, on a logarithmic axis."""
    figure, (axis,) = new_figure(8.2, 4.0)
    arms = comparison.arms
    places = apart([arm.results["tokens_to_answer"]["mean"] for arm in arms])
    for arm, style, place in zip(arms, styles(comparison), places, strict=True):
        results = arm.results
        axis.errorbar(
            place,
            100 * results["accuracy"],
            yerr=100 * results["accuracy_stderr"],
            fmt=style["marker"],
            color=style["color"],
            markersize=8,
            capsize=4,
            elinewidth=1.4,
            label=arm.label,
        )
    chance = arms[0].results.get("chance")
    if chance:
        axis.axhline(100 * chance, color=FAINT, linewidth=0.9, linestyle="--", label="guessing")
    token_axis(axis, places)
    top = max(100 * (arm.results["accuracy"] + arm.results["accuracy_stderr"]) for arm in arms)
    axis.set_ylim(0, min(102, max(10, 1.12 * top)))
    name_axes(axis, "tokens to the answer (mean, logarithmic)", "accuracy (%)")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return to_png(figure)


def apart(tokens: Sequence[float]) -> list[float]:
    """Positions on a logarithmic axis: values within 8 % of each other are drawn side by side around their middle."""
    places = list(tokens)
    group: list[int] = []
    for k in [*sorted(range(len(tokens)), key=lambda k: (tokens[k], k)), None]:
        if k is not None and (not group or tokens[k] <= 1.08 * tokens[group[0]]):
            group.append(k)
            continue
        middle = (tokens[group[0]] * tokens[group[-1]]) ** 0.5
        for rank, member in enumerate(group if len(group) > 1 else []):
            places[member] = middle * 1.09 ** (rank - (len(group) - 1) / 2)
        group = [] if k is None else [k]
    return places


def token_axis(axis: Any, tokens: Sequence[float]) -> None:
    """Set a logarithmic x axis with ticks at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(tokens) / 1.5, max(tokens) * 1.5
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = [tick for decade in (0.1, 1, 10, 100, 1000, 10000) for tick in (decade, 2 * decade, 5 * decade)]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def curves_plot(comparison: Comparison, metrics: Sequence[Sequence[dict[str, Any]]]) -> bytes | None:
    """Answer NLL of all runs, training batches on the left and validation rows on the right; None without any."""
    figure, axes = new_figure(10.3, 3.3, 2)
    drawn = False
    for arm, style, rows in zip(comparison.arms, styles(comparison), metrics, strict=True):
        for axis, (steps, values) in zip(
            axes, (series(rows, "answer_nll"), validation_series(rows, "answer_nll")), strict=True
        ):
            if steps:
                marker = {"marker": style["marker"], "markersize": 3} if axis is axes[1] else {}
                axis.plot(
                    steps,
                    values,
                    color=style["color"],
                    linestyle=style["linestyle"],
                    linewidth=1.5,
                    label=arm.label,
                    **marker,
                )
                drawn = True
    for axis, title in zip(axes, ("Training batches", "Validation rows"), strict=True):
        from_zero(axis)
        name_axes(axis, "optimizer step", "answer NLL (nats per token)", title)
    add_legend(axes[0])
    return to_png(figure) if drawn else None
