"""An experiment's results as a Markdown page, with its plots next to it and everything needed to reproduce it.

`results_files` writes the page, `results_table` has the cells of its main tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from pst_dist.arms import BASELINE
from pst_dist.config.run_dir import environment
from pst_dist.evaluation.statistics import format_p
from pst_dist.experiment.outcomes import OUTCOMES
from pst_dist.experiment.pictures import panels_of
from pst_dist.experiment.published import PUBLISHED, PUBLISHED_TASKS
from pst_dist.experiment.results import Group, Pair, Results
from pst_dist.experiment.results_table import table_rows, tells_unparsed
from pst_dist.experiment.spec import point_words
from pst_dist.text.redaction import redacted_command

_HOW = (
    "Accuracy is the mean over seeds; s.e. combines the errors over seeds and over rows. Differences are paired: same "
    "rows, same seeds. Their 95 % intervals resample rows and seeds (10,000 times); p is not corrected for multiple "
    "comparisons. Tokens are counted up to the end of the answer; ms is the median time to the answer, one question at "
    "a time."
)
_UNPARSED = (
    " Unparsed outputs contain no answer, for example because they reached evaluate.max_new_tokens first; they count "
    "as wrong."
)


def page_of(results: Results, command: Sequence[str], pictures: Sequence[str]) -> str:
    """The page as Markdown; `pictures` are the file names of plots next to it."""
    experiment, panels = results.experiment, panels_of(results)
    parts = [f"# {experiment.name}", experiment.question.strip(), _state(results)]
    if "accuracy.png" in pictures:
        caption = "Dots show one standard error; small dots are single seeds; the dashed line is guessing."
        parts += ["## Accuracy", "![accuracy of every variant](accuracy.png)", caption]
    if "sweep.png" in pictures:
        parts += [f"## Accuracy over {next(iter(experiment.vary))}", "![accuracy over the varied key](sweep.png)"]
    if len(panels) > 1:
        parts += ["## Summary", _summary(results)]
    parts += ["## In detail", _HOW + (_UNPARSED if any(tells_unparsed(groups) for _, groups in panels) else "")]
    for title, groups in panels:
        parts += [
            f"### {title}",
            f"{groups[0].rows:,} {groups[0].split} rows" + _chance(groups[0]) + ".",
            _markdown(table_rows(results, groups)),
        ]
    if results.pairs:
        parts += ["## Pairs", _pairs(results), *_controls(results)]
    if "cost.png" in pictures:
        caption = "Points with similar token counts are drawn slightly apart."
        parts += ["## Accuracy against tokens to the answer", "![accuracy against tokens](cost.png)", caption]
    parts += [*_adaptive(panels)]
    if "curves.png" in pictures:
        caption = (
            "Loss of an answer token on the validation rows, mean over seeds. Runs whose curves were not recorded are "
            "not shown."
        )
        parts += ["## Learning curves", "![loss of an answer token over steps](curves.png)", caption]
    parts += ["## Cost of training", _cost(panels)]
    published = _published(results)
    if published:
        parts += ["## Published results for comparison", *published]
    if results.failures:
        failed = [f"- {name}: {what}" for name, what in results.failures.items()]
        parts += ["## Failed runs", "\n".join(failed)]
    parts += ["## How it was made", _how(results, command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _state(results: Results) -> str:
    done = sum(len(group.seeds) for group in results.groups)
    total = done + len(results.missing)
    return f"{done} of {total} runs are finished; the tables show only these." if results.missing else ""


def _chance(group: Group) -> str:
    known = {"guessing": group.chance, "the most frequent answer": group.majority}
    return "".join(f", {what} gives {100 * share:.1f} %" for what, share in known.items() if share)


def _summary(results: Results) -> str:
    """A row per variant, a column per task and point, and the mean for variants that have all of them."""
    panels = panels_of(results)
    header = ["variant", *(title for title, _ in panels), "mean"]
    rows = [header]
    for variant in results.experiment.variants:
        found = [next((g for g in groups if g.variant == variant), None) for _, groups in panels]
        known = [group for group in found if group is not None]
        if not known:
            continue
        mean = f"{100 * sum(g.accuracy for g in known) / len(known):.2f}" if len(known) == len(panels) else ""
        rows.append([variant, *(_short(group) for group in found), mean])
    frequent = [share for _, groups in panels if (share := groups[0].majority)]
    if len(frequent) == len(panels):
        shares = [f"{100 * share:.2f}" for share in (*frequent, sum(frequent) / len(frequent))]
        rows.append(["the most frequent answer", *shares])
    return _markdown(rows) + (
        "\n\nAccuracy in % with its standard error; + and - mark a difference from "
        f"{BASELINE} whose 95 % interval excludes zero."
        if BASELINE in results.experiment.baselines
        else "\n\nAccuracy in % with its standard error."
    )


def _short(group: Group | None) -> str:
    if group is None:
        return ""
    test = group.against(BASELINE)
    mark = "" if test is None or test.low <= 0 <= test.high else (" +" if test.low > 0 else " -")
    return f"{100 * group.accuracy:.2f} ± {100 * group.stderr:.2f}{mark}"


def _pairs(results: Results) -> str:
    rows = [["task", "variant", "against", "difference", "95 % interval", "p", "seeds"]]
    for pair in results.pairs:
        test = pair.test
        title = ", ".join([pair.task, *point_words(pair.point)])
        interval = f"{100 * test.low:+.2f} to {100 * test.high:+.2f}"
        difference = f"{100 * test.difference:+.2f}"
        rows.append([title, pair.variant, test.baseline, difference, interval, format_p(test.p), str(test.seeds)])
    return _markdown(rows, text=3)


def _controls(results: Results) -> list[str]:
    """What the pairs of an arm and its control say; empty without one."""
    pairs = results.control_pairs
    if not pairs:
        return []
    same = [pair for pair in pairs if not pair.is_clear]
    if not same:
        those = "The arm and its control differ" if len(pairs) == 1 else "Each arm differs from its control"
        return [f"{those} measurably."]
    named = [", ".join([pair.task, *point_words(pair.point)]) + f": {_against(pair)}" for pair in same]
    return [
        f"In {len(same)} of the {len(pairs)} pairs of an arm and its control, the two do not differ measurably (the "
        "interval includes zero). Such a comparison is inconclusive: it shows neither that the removed part helps nor "
        "that it does not.",
        "\n".join(f"- {name}" for name in named),
    ]


def _against(pair: Pair) -> str:
    test = pair.test
    interval = f"{100 * test.low:+.2f} to {100 * test.high:+.2f}"
    return f"{pair.variant} against {test.baseline}, {100 * test.difference:+.2f} points ({interval})"


def _adaptive(panels: Sequence[tuple[str, list[Group]]]) -> list[str]:
    """The section on adaptive students; empty without one."""
    rows = [["task", "variant", "answers", "accuracy %", "tokens", "thinking %"]]
    for title, groups in panels:
        for group in groups:
            for way, mean in (group.adaptive or {}).items():
                shares = (f"{100 * mean['accuracy']:.2f}", f"{mean['tokens']:.1f}", f"{100 * mean['thinking']:.1f}")
                rows.append([title, group.variant, way, *shares])
    if len(rows) == 1:
        return []
    words = (
        "Each is one student that has learnt both orders. It thinks first when the probability of its immediate answer "
        "is below a threshold, which is chosen on validation rows unless evaluate.think_below is set. When it thinks, "
        "tokens include both answers."
    )
    return ["## Answering at once or thinking first", words, _markdown(rows, text=3)]


def _cost(panels: Sequence[tuple[str, list[Group]]]) -> str:
    header = ["task", "variant", "parameters", "steps", "tokens trained on", "seconds"]
    rows = [header]
    for title, groups in panels:
        for group in groups:
            rows.append(
                [
                    title,
                    group.variant,
                    f"{group.parameters:,}",
                    f"{group.steps:,.0f}" if group.steps else "",
                    f"{group.training_tokens:,.0f}" if group.training_tokens else "",
                    f"{group.training_seconds:,.0f}" if group.training_seconds else "",
                ]
            )
    return _markdown(rows, text=2) + "\n\nMeans over seeds. Seconds depend on the load of the machine."


def _published(results: Results) -> list[str]:
    """Fine-tune-CoT's tables for its twelve tasks; not shown for generated rows."""
    scored_as = {group.scored_as for group in results.groups if not group.generated}
    names = [name for name in PUBLISHED_TASKS if name in scored_as]
    if not names:
        return []
    rows = [["published", *names]]
    for label, values in PUBLISHED.items():
        by_task = dict(zip(PUBLISHED_TASKS, values, strict=True))
        rows.append([label, *(f"{by_task[name]:.2f}" for name in names)])
    return [
        _markdown(rows),
        "Accuracy in %, from the notebook of Fine-tune-CoT (itsnamgyu/reasoning-teacher). Those students are "
        "pretrained, the reported epoch is the best on the test set, and their answer-only rows include those "
        "on which the teacher is wrong. If students or rows differ from ours, the numbers are context, not a "
        "comparison.",
    ]


def _how(results: Results, command: Sequence[str]) -> str:
    versions = environment()
    shown = ("python", "pst_dist", "torch", "transformers", "sentence-transformers")
    devices = " and ".join(dict.fromkeys(group.device for group in results.groups))
    lines = [
        f"    {redacted_command(command)}",
        "",
        "The same command resumes a stopped experiment, and does nothing when it is finished. ",
    ]
    lines[-1] += ", ".join(f"{name} {versions[name]}" for name in shown) + (f"; on {devices}." if devices else ".")
    if results.elsewhere:
        total = len(results.outcomes)
        lines[-1] += f" The outcomes of {results.elsewhere} of {total} runs come from earlier calls or other machines."
    lines[-1] += f" [{OUTCOMES}]({OUTCOMES}) lists the correct rows of every run, so the tests can be recomputed."
    return "\n".join(lines)


def _markdown(rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """A Markdown table; the first `text` columns are text, the others numbers."""
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---" if place < text else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *body])
