"""The table of an experiment's results: a block per task and point, a row per variant.

It has the same cells on the terminal and in the Markdown page (`results_page`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pst_dist.evaluation.statistics import format_p
from pst_dist.experiment.pictures import panels_of
from pst_dist.experiment.results import Group, Results
from pst_dist.text.tables import aligned


def table_lines(results: Results) -> list[str]:
    """The terminal's table, a block per task and point."""
    lines = []
    for title, groups in panels_of(results):
        text = aligned(table_rows(results, groups))
        lines += ["", f"{title}: {groups[0].rows} {groups[0].split} rows", text[0], "-" * len(text[0]), *text[1:]]
    return lines[1:]


def table_rows(results: Results, groups: Sequence[Group]) -> list[list[str]]:
    """The table of one task and point, header first."""
    baselines = [name for name in results.experiment.baselines if any(group.against(name) for group in groups)]
    unparsed = tells_unparsed(groups)
    return [_columns(baselines, unparsed), *(_cells(group, baselines, unparsed) for group in groups)]


def tells_unparsed(groups: Sequence[Group]) -> bool:
    """Whether to show unparsed outputs: if they are at least 1 % of some variant's outputs."""
    return any(_unparsed(group) >= 0.01 for group in groups)


def _unparsed(group: Group) -> float:
    return group.unparsed / (group.rows * len(group.seeds))


def _columns(baselines: Sequence[str], unparsed: bool) -> list[str]:
    tests = [word for name in baselines for word in (f"vs {name}", "95 % interval", "p")]
    return ["variant", "accuracy %", "s.e.", "seeds", *tests, "tokens", "fewer", "ms", *(["unparsed %"] * unparsed)]


def _cells(group: Group, baselines: Sequence[str], unparsed: bool) -> list[str]:
    tests = []
    for name in baselines:
        test = group.against(name)
        tests += (
            [f"{100 * test.difference:+.2f}", f"{100 * test.low:+.2f} to {100 * test.high:+.2f}", format_p(test.p)]
            if test
            else ["", "", ""]
        )
    return [
        group.variant,
        f"{100 * group.accuracy:.2f}",
        f"{100 * group.stderr:.2f}",
        str(len(group.seeds)),
        *tests,
        f"{group.tokens:.1f}",
        f"{group.times_fewer_tokens:.1f}x" if group.times_fewer_tokens else "",
        f"{group.milliseconds:.1f}" if group.milliseconds else "",
        *([f"{100 * _unparsed(group):.1f}"] * unparsed),
    ]
