"""Arms scored on identical rows, compared by paired tests.

Arms are compared row by row, which detects much smaller differences than comparing two accuracies. Rows are joined by
id; runs that were scored on different rows are refused. `publish.compare_page` renders the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.arms import BASELINE, COST_BASELINE
from pst_dist.errors import InputError, StaleError
from pst_dist.evaluation.evaluate import RESULTS, SAMPLES, finished_evaluation
from pst_dist.evaluation.records import check_comparable, read_rows, student_of
from pst_dist.evaluation.statistics import PairedTest, format_p, paired_test
from pst_dist.storage.manifest import read_manifest
from pst_dist.text.tables import aligned


@dataclass(frozen=True)
class ArmResult:
    """One run in a comparison."""

    label: str
    run: Path
    folder: Path
    """Its scores, `run`/eval/NAME."""
    results: dict[str, Any]
    """As `evaluate` wrote them."""
    samples: list[dict[str, Any]]
    """Scored rows, in the order of the first run's."""
    test: PairedTest | None
    """None for the baseline itself."""
    times_fewer_tokens: float | None
    """Tokens to the answer of pre_thinking divided by this arm's; None without a pre_thinking run."""


@dataclass(frozen=True)
class Comparison:
    """Arms on identical rows."""

    task: str
    split: str
    rows: int
    baseline: str
    """Label of the run that the others are tested against."""
    arms: list[ArmResult]

    def table(self) -> str:
        """Plain text with aligned columns."""
        lines = [("arm", *self.columns()), *((arm.label, *cells(arm)) for arm in self.arms)]
        text = aligned(lines)
        rule = "-" * len(text[0])
        return "\n".join(
            [f"{self.task}: {self.rows} {self.split} rows, the same for every arm", text[0], rule, *text[1:]]
        )

    def columns(self) -> tuple[str, ...]:
        """Headings for the values of `cells`; s.e. and differences are in percentage points."""
        return ("accuracy %", "s.e.", f"vs {self.baseline}", "95 % interval", "p", "unparsed", "tokens", "fewer", "ms")

    def to_json(self) -> dict[str, Any]:
        """Plain dict, without the samples."""
        arms = [
            {
                "label": arm.label,
                "run": str(arm.run),
                "results": arm.results,
                "test": asdict(arm.test) if arm.test else None,
                "times_fewer_tokens": arm.times_fewer_tokens,
            }
            for arm in self.arms
        ]
        return {"task": self.task, "split": self.split, "rows": self.rows, "baseline": self.baseline, "arms": arms}


def cells(arm: ArmResult) -> tuple[str, ...]:
    """An arm's values as text, in the order of `Comparison.columns`; "" for what was not measured."""
    results, test, latency = arm.results, arm.test, arm.results["milliseconds_to_answer"]
    return (
        f"{100 * results['accuracy']:.2f}",
        f"{100 * results['accuracy_stderr']:.2f}",
        f"{100 * test.difference:+.2f}" if test else "baseline",
        f"{100 * test.low:+.2f} to {100 * test.high:+.2f}" if test else "",
        format_p(test.p) if test else "",
        str(results["unparsed"]),
        f"{results['tokens_to_answer']['mean']:.1f}",
        f"{arm.times_fewer_tokens:.1f}x" if arm.times_fewer_tokens else "",
        f"{latency['median']:.1f}" if latency else "",
    )


def compare(runs: Sequence[Path]) -> Comparison:
    """Arms side by side, tested against the first answer_only run, or the first run when there is none.

    A directory with the runs of several arms counts as all of them. Scores of other rows are compared by naming their
    folders, RUN/eval/NAME, instead of the runs. Raises InputError for a run without a finished evaluation and for runs
    that were scored on different rows or as different tasks, naming two of them; StaleError when an evaluation does not
    belong to the student in its run.
    """
    folders = _score_folders(runs)
    found = [folder.parent.parent for folder in folders]
    results = [finished_evaluation(folder) for folder in folders]
    for folder, result in zip(folders, results, strict=True):
        if result is not None:
            check_comparable(result, folder / RESULTS)
    _check_current(found, results)
    samples = [read_rows(folder / SAMPLES) for folder in folders]
    rows = [_same_rows(found[0], samples[0], run, own) for run, own in zip(found, samples, strict=True)]
    whole = [result for result in results if result is not None]
    for run, result in zip(found, whole, strict=True):
        if result["task"] != whole[0]["task"]:
            raise InputError(
                f"was scored as task {result['task']}, and {found[0]} as {whole[0]['task']}",
                "evaluate both with the same task",
                path=run,
            )
    labels = _labels(found, whole)
    baseline = next((k for k, result in enumerate(whole) if result["arm"] == BASELINE), 0)
    thinking = next((result for result in whole if result["arm"] == COST_BASELINE), None)
    right = [np.array([row["correct"] for row in own], dtype=bool) for own in rows]
    arms = [
        ArmResult(
            label=labels[k],
            run=found[k],
            folder=folders[k],
            results=whole[k],
            samples=rows[k],
            test=None if k == baseline else paired_test(right[k], right[baseline]),
            times_fewer_tokens=_times_fewer(thinking, whole[k]),
        )
        for k in range(len(found))
    ]
    return Comparison(whole[0]["task"], folders[0].name, len(rows[0]), labels[baseline], arms)


def _score_folders(named: Sequence[Path]) -> list[Path]:
    """The folder of scores of each run: as named, or that of the best split that all have; raises InputError."""
    folders = [path for path in named if path.absolute().parent.name == "eval" and (path / SAMPLES).is_file()]
    if folders and len(folders) < len(named):
        run = next(path for path in named if path not in folders)
        raise InputError(
            "is not a folder of scores, but the others are", "name RUN/eval/NAME for each of them", path=run
        )
    folders = [path if path.parent.name == "eval" else path.absolute() for path in folders]
    runs = [folder.parent.parent for folder in folders] or expand_runs(named)
    if len(runs) < 2:
        raise InputError("a comparison needs at least two runs", "name several run directories", path=runs[0])
    if folders:
        return folders
    split = _common_split(runs)
    return [run / "eval" / split for run in runs]


def _times_fewer(thinking: dict[str, Any] | None, results: dict[str, Any]) -> float | None:
    """Mean tokens of pre_thinking divided by an arm's; None without pre_thinking or when the arm generated nothing."""
    tokens = results["tokens_to_answer"]["mean"]
    return thinking["tokens_to_answer"]["mean"] / tokens if thinking and tokens > 0 else None


def expand_runs(runs: Sequence[Path]) -> list[Path]:
    """The run directories, each directory that only contains runs replaced by those runs; raises InputError."""
    found: list[Path] = []
    for run in runs:
        inner = sorted(path.parent.parent for path in run.glob("*/eval/*") if (path / SAMPLES).is_file())
        if (run / "eval").is_dir() or not inner:
            found.append(run)
        else:
            found += list(dict.fromkeys(inner))
    if not found:
        raise InputError("no run given", "name run directories")
    for run in found:
        if not (run / "eval").is_dir():
            raise InputError("no evaluation found", "run `pst evaluate` first", path=run)
    return found


def _common_split(runs: Sequence[Path]) -> str:
    """`test` when every run was scored on it, else `validation`; raises InputError."""
    for split in ("test", "validation"):
        lacking = [run for run in runs if finished_evaluation(run / "eval" / split) is None]
        if not lacking:
            return split
    raise InputError("these runs share no finished evaluation", "run `pst evaluate` first", path=lacking[0])


def _check_current(runs: Sequence[Path], results: Sequence[dict[str, Any] | None]) -> None:
    """Raises StaleError when an evaluation is older than the student in its run: scores and curves would not match."""
    for run, result in zip(runs, results, strict=True):
        student = read_manifest(run / "best", "student")
        if student is not None and result is not None and student_of(result) != student.digest:
            raise StaleError("the evaluation belongs to an older student", "run `pst evaluate` again", path=run)


def _same_rows(
    first: Path, wanted: list[dict[str, Any]], run: Path, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A run's rows in the order of the first run's; raises InputError when the rows differ."""
    by_id = {row["id"]: row for row in rows}
    ours = {row["id"]: (row["question"], row["gold"]) for row in wanted}
    theirs = {name: (row["question"], row["gold"]) for name, row in by_id.items()}
    if ours != theirs:
        differ = sum(ours.get(name) != theirs.get(name) for name in {*ours, *theirs})
        raise InputError(
            f"was scored on different rows than {first}: {differ} of {len({*ours, *theirs})} differ",
            "evaluate both on the same shards and with the same evaluate.max_rows",
            path=run,
        )
    return [by_id[name] for name in ours]


def _labels(runs: Sequence[Path], results: Sequence[dict[str, Any]]) -> list[str]:
    """A unique label for each run: arm and variant, then the seed if needed, then the directory if needed.

    The directory is given by its name, or by its full path when names repeat.
    """
    labels = [", ".join([result["arm"], *result["variant"]]) for result in results]
    seeded = [f"{label} seed {result['seed']}" for label, result in zip(labels, results, strict=True)]
    labels = [more if labels.count(label) > 1 else label for label, more in zip(labels, seeded, strict=True)]
    for directories in ([run.name for run in runs], [str(run) for run in runs]):
        named = [f"{label} ({name})" for label, name in zip(labels, directories, strict=True)]
        if len(set(named)) == len(named):
            break
    return [more if labels.count(label) > 1 else label for label, more in zip(labels, named, strict=True)]
