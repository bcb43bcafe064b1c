"""The plots of an experiment, each a PNG in memory: accuracies with errors, over a varied key, and against tokens, and
learning curves.

Arms have the same colours as on every other page; variants of one arm differ in marker and line style.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pst_dist.experiment.results import Group, Results
from pst_dist.experiment.spec import point_words
from pst_dist.publish.plots import (
    FAINT,
    INK,
    add_legend,
    apart,
    arm_colour,
    arm_style,
    from_zero,
    name_axes,
    new_figure,
    to_png,
    token_axis,
)

_MOST_PANELS = 6
"""With more panels there is no cost plot: a page of thumbnails is harder to read than the table."""
_MOST_CURVES = 12
"""The same for learning curves, which need less room."""
Panel = tuple[str, list[Group]]
"""A title and the variants in it."""


def panels_of(results: Results) -> list[Panel]:
    """One panel per task and point."""
    experiment = results.experiment
    found = []
    for task in experiment.tasks:
        for point in experiment.points:
            groups = results.of(task, point)
            if groups:
                found.append((", ".join([task, *point_words(point)]), groups))
    return found


def _across(panels: int) -> int:
    """Panels per row: at most three; four panels form a square."""
    return 2 if panels == 4 else min(3, panels)


def accuracy_picture(results: Results) -> bytes | None:
    """A dot with its standard error for every variant, a small dot for every seed; None without results."""
    panels = panels_of(results)
    if not panels:
        return None
    variants = [name for name in results.experiment.variants if any(g.variant == name for _, gs in panels for g in gs)]
    across = _across(len(panels))
    height = (0.9 + 0.28 * len(variants)) * -(-len(panels) // across)
    longest = max(map(len, variants))
    figure, axes = new_figure(min(13.0, (3.3 + 0.075 * longest) * across), height, len(panels), columns=across)
    for axis, (title, groups) in zip(axes, panels, strict=True):
        for group in groups:
            place, colour = variants.index(group.variant), arm_colour(group.arm)
            axis.errorbar(
                100 * group.accuracy, place, xerr=100 * group.stderr, fmt="o", color=colour, markersize=6, capsize=3
            )
            if len(group.accuracies) > 1:
                axis.plot(
                    [100 * a for a in group.accuracies], [place + 0.25] * len(group.accuracies), ".", color=colour
                )
        chance = groups[0].chance
        if chance:
            axis.axvline(100 * chance, color=FAINT, linewidth=0.9, linestyle="--")
        axis.set_xlim(*_reach(groups))
        axis.set_yticks(range(len(variants)), variants)
        axis.set_ylim(len(variants) - 0.4, -0.6)
        axis.grid(axis="x", color="#e4e8ee", linewidth=0.8)
        name_axes(axis, "accuracy (%)", "", title)
    return to_png(figure)


def _reach(groups: Sequence[Group]) -> tuple[float, float]:
    """Axis limits in percent, a little beyond the lowest and highest value, limited to about 0 and 100."""
    ends = [100 * value for g in groups for value in (*g.accuracies, g.accuracy - g.stderr, g.accuracy + g.stderr)]
    room = max(2.0, 0.08 * (max(ends) - min(ends)))
    return max(-1.0, min(ends) - room), min(101.0, max(ends) + room)


def sweep_picture(results: Results) -> bytes | None:
    """Accuracy over the one varied key, a panel per task; None unless exactly one numeric key is varied."""
    experiment = results.experiment
    if len(experiment.vary) != 1:
        return None
    (key, values), *_ = experiment.vary.items()
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    tasks = [task for task in experiment.tasks if any(group.task == task for group in results.groups)]
    if len(numbers) != len(values) or len(values) < 2 or not tasks:
        return None
    across = _across(len(tasks))
    legend = 0.7 + 0.08 * max(len(group.variant) for group in results.groups)  # inches, beside the panels
    figure, axes = new_figure(legend + 4.0 * across, 3.3 * -(-len(tasks) // across), len(tasks), columns=across)
    for axis, task in zip(axes, tasks, strict=True):
        for variant, style in _styles(results):
            points = [(value, _at(results.of(task, ((key, value),)), variant)) for value in sorted(numbers)]
            known = [(value, group) for value, group in points if group is not None]
            if known:
                axis.errorbar(
                    [value for value, _ in known],
                    [100 * group.accuracy for _, group in known],
                    yerr=[100 * group.stderr for _, group in known],
                    color=style["color"],
                    linestyle=style["linestyle"],
                    marker=style["marker"],
                    markersize=5,
                    capsize=3,
                    linewidth=1.5,
                    label=variant,
                )
        if min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
            axis.set_xscale("log")
            axis.set_xticks(sorted(numbers), [f"{value:,g}" for value in sorted(numbers)])
            axis.minorticks_off()
        name_axes(axis, key, "accuracy (%)", task)
    axes[-1].legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return to_png(figure)


def cost_picture(results: Results) -> bytes | None:
    """Accuracy against tokens to the answer for the arms, a panel per task and point; None without results."""
    panels = panels_of(results)
    if not panels or len(panels) > _MOST_PANELS:
        return None
    across = _across(len(panels))
    figure, axes = new_figure(1.9 + 3.9 * across, 3.3 * -(-len(panels) // across), len(panels), columns=across)
    styles = dict(_styles(results))
    for axis, (title, groups) in zip(axes, panels, strict=True):
        shown = _plain(groups)
        places = apart([max(group.tokens, 0.1) for group in shown])
        for group, place in zip(shown, places, strict=True):
            style = styles[group.variant]
            axis.errorbar(
                place,
                100 * group.accuracy,
                yerr=100 * group.stderr,
                fmt=style["marker"],
                color=style["color"],
                capsize=3,
                label=group.variant,
            )
        token_axis(axis, places)
        highest = max(100 * (group.accuracy + group.stderr) for group in shown)
        axis.set_ylim(0, 1.05 * highest or None)  # room for a dot at the top; automatic when all are 0
        name_axes(axis, "tokens to the answer (mean, logarithmic)", "accuracy (%)", title)
    add_legend(axes[-1])
    return to_png(figure)


def curve_picture(results: Results) -> bytes | None:
    """Loss of an answer token on the validation rows over steps, a panel per task and point; None without curves."""
    panels = [(title, found) for title, groups in panels_of(results) if (found := [g for g in groups if g.curve])]
    if not panels or len(panels) > _MOST_CURVES:
        return None
    across = _across(len(panels))
    figure, axes = new_figure(1.9 + 3.7 * across, 2.9 * -(-len(panels) // across), len(panels), columns=across)
    styles = dict(_styles(results))
    for axis, (title, groups) in zip(axes, panels, strict=True):
        for group in groups:
            steps, values = zip(*group.curve, strict=True)
            axis.plot(steps, values, **styles[group.variant], markersize=4, linewidth=1.5, label=group.variant)
        from_zero(axis)
        name_axes(axis, "optimizer step", "nats per answer token", title)
        add_legend(axis)
    return to_png(figure)


def _plain(groups: Sequence[Group]) -> list[Group]:
    """The first variant of each arm in the file, which is normally its plain form."""
    return list({group.arm: group for group in reversed(groups)}.values())[::-1]


def _at(groups: Sequence[Group], variant: str) -> Group | None:
    return next((group for group in groups if group.variant == variant), None)


def _styles(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Each variant with its arm's colour and its own line style and marker."""
    arms = {group.variant: group.arm for group in results.groups}
    seen: dict[str, int] = {}
    found = []
    for variant in (name for name in results.experiment.variants if name in arms):
        arm = arms[variant]
        found.append((variant, arm_style(arm, seen.get(arm, 0))))
        seen[arm] = seen.get(arm, 0) + 1
    return found
