"""Combines the runs of an experiment: means over seeds, standard errors, and paired tests against the baselines.

Rows are a sample of questions; seeds are a sample of initial weights and sample orders. Accuracy is the mean over both;
the error over seeds estimates how much another training would differ, the error over rows how much another test set
would. `results_page` and `pictures` present the results.
"""

# Shapes in this file: S seeds, R rows

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pst_dist.arms import COST_BASELINE
from pst_dist.config.keys import flat_keys
from pst_dist.errors import InputError
from pst_dist.evaluation.statistics import Difference, paired, standard_error
from pst_dist.experiment.outcomes import Outcome, check_same_rows, outcome_of
from pst_dist.experiment.spec import Experiment, Point, Run


@dataclass(frozen=True)
class Group:
    """All finished seeds of one variant of one task at one point."""

    task: str
    variant: str
    point: Point
    arm: str
    scored_as: str
    """The task whose scoring rules were used."""
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    """One per seed."""
    accuracy: float
    stderr_seeds: float | None
    """Standard deviation over seeds / sqrt(S), with S - 1; None for a single seed."""
    stderr_rows: float
    """Standard deviation over rows of each row's mean over seeds, / sqrt(R)."""
    rows: int
    split: str
    chance: float | None
    majority: float | None
    """Accuracy of always giving the most frequent answer of the scored rows; None if it was not recorded."""
    tokens: float
    """Tokens to the answer, mean over rows and seeds."""
    times_fewer_tokens: float | None
    """Tokens of pre_thinking divided by these; None without a pre_thinking run."""
    milliseconds: float | None
    """Median milliseconds to the answer, one question at a time; mean over seeds."""
    training_tokens: float | None
    training_seconds: float | None
    parameters: int
    steps: float | None
    unparsed: int
    """Outputs without an answer, over all seeds."""
    device: str
    """The device that generated the answers."""
    generated: bool
    """Whether the rows come from a generator; published numbers are then not comparable."""
    adaptive: dict[str, dict[str, float]] | None
    """An adaptive student answering at once, always thinking first, and as it chose: accuracy, tokens and the share of
    rows on which it thought, means over seeds."""
    tests: tuple[Difference, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    """Learning curve: (step, nats per answer token on the validation rows), mean over seeds; empty unless every seed
    recorded the same steps."""

    @property
    def stderr(self) -> float:
        """Both errors combined: sqrt(seeds^2 + rows^2)."""
        return math.hypot(self.stderr_seeds or 0.0, self.stderr_rows)

    def against(self, baseline: str) -> Difference | None:
        """The test against one baseline."""
        return next((test for test in self.tests if test.baseline == baseline), None)


@dataclass(frozen=True)
class Pair:
    """One of the experiment's pairs, on one task at one point."""

    task: str
    point: Point
    variant: str
    test: Difference

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % interval excludes zero."""
        return not self.test.low <= 0 <= self.test.high


@dataclass(frozen=True)
class Results:
    """The results of an experiment's finished runs."""

    experiment: Experiment
    groups: list[Group]
    pairs: list[Pair]
    missing: list[Run]
    failures: dict[str, str] = field(default_factory=dict)
    """Name of a run -> its error."""
    outcomes: list[Outcome] = field(default_factory=list)
    """Every finished run, in the order of the runs."""
    elsewhere: int = 0
    """How many of them were taken from other folders."""

    def of(self, task: str, point: Point) -> list[Group]:
        """The variants of one task at one point, in the order of the file."""
        return [group for group in self.groups if (group.task, group.point) == (task, point)]

    @property
    def control_pairs(self) -> list[Pair]:
        """The pairs of an arm and its own control."""
        keys = {name: flat_keys(value) for name, value in self.experiment.variants.items()}
        return [pair for pair in self.pairs if _is_control_of(keys[pair.variant], keys[pair.test.baseline])]

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "groups": [_group_json(group) for group in self.groups],
            "pairs": [asdict(pair) for pair in self.pairs],
            "missing": [run.name for run in self.missing],
            "failures": self.failures,
        }


def _group_json(group: Group) -> dict[str, Any]:
    numbers = asdict(group) | {"stderr": group.stderr}
    if not group.curve:
        del numbers["curve"]
    return numbers


def _is_control_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether exactly one of two variants of an arm is a control: it breaks the targets or removes the term."""

    def is_control(keys: Mapping[str, Any]) -> bool:
        broken = keys.get("loss.control", "none") != "none" or keys.get("data.wrong_rationales", 0) > 0
        return broken or keys.get("loss.alignment_weight", 1) == 0

    return is_control(one) != is_control(other) and one.get("arm") == other.get("arm")


@dataclass(frozen=True)
class _Scored:
    """The finished seeds of a group."""

    runs: list[Run]
    outcomes: list[Outcome]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results of each seed."""
        return [outcome.results for outcome in self.outcomes]

    @property
    def right(self) -> np.ndarray:
        """[S, R] bool."""
        return np.stack([outcome.right for outcome in self.outcomes])


def collect(
    experiment: Experiment,
    runs: Sequence[Run],
    failures: dict[str, str] | None = None,
    elsewhere: Mapping[str, Outcome] | None = None,
) -> Results:
    """Combine all finished runs; the others are listed as missing.

    A run that is not finished here is looked up by name in `elsewhere`. Raises InputError when two runs of one task
    were scored on different rows, StaleError when runs that must share rows were trained on different ones.
    """
    elsewhere = elsewhere or {}
    here = {run.name: outcome for run in runs if (outcome := outcome_of(run)) is not None}
    outcomes = {**elsewhere, **here}
    check_same_rows(runs, outcomes)
    scored: dict[tuple[str, str, Point], _Scored] = {}
    rows: dict[str, tuple[str, int]] = {}
    for run in runs:
        if run.name not in outcomes:
            continue
        outcome = outcomes[run.name]
        scored_rows = (outcome.rows, len(outcome.right))
        if rows.setdefault(run.task, scored_rows) != scored_rows:
            raise InputError(
                f"{run.name} was scored on different rows than the first run of {run.task}", path=run.config.output_dir
            )
        own = scored.setdefault(run.group, _Scored([], []))
        own.runs.append(run)
        own.outcomes.append(outcome)
    groups = [_group(key, own, scored, experiment.baselines) for key, own in scored.items()]
    order = {label: place for place, label in enumerate([*experiment.variants])}
    tasks = {label: place for place, label in enumerate([*experiment.tasks])}
    points = {point: place for place, point in enumerate(experiment.points)}
    groups.sort(key=lambda group: (tasks[group.task], points[group.point], order[group.variant]))
    return Results(
        experiment,
        groups,
        _pairs(experiment, scored),
        missing=[run for run in runs if run.name not in outcomes],
        failures=failures or {},
        outcomes=[outcomes[run.name] for run in runs if run.name in outcomes],
        elsewhere=len(outcomes) - len(here),
    )


def _pairs(experiment: Experiment, scored: dict[tuple[str, str, Point], _Scored]) -> list[Pair]:
    """Every pair, on each task and point for which the two variants share a seed."""
    found = []
    for (variant, other), task, point in itertools.product(experiment.pairs, experiment.tasks, experiment.points):
        own, base = scored.get((task, variant, point)), scored.get((task, other, point))
        test = _test(other, own, base) if own and base else None
        if test is not None:
            found.append(Pair(task, point, variant, test))
    return found


def _group(
    key: tuple[str, str, Point],
    own: _Scored,
    scored: dict[tuple[str, str, Point], _Scored],
    baselines: Sequence[str],
) -> Group:
    task, variant, point = key
    accuracies = own.right.mean(axis=1)
    seeds = len(accuracies)
    tokens = _mean([result["tokens_to_answer"]["mean"] for result in own.results])
    thinking = next(
        (
            other
            for (name, _, place), other in scored.items()
            if (name, place) == (task, point) and other.results[0]["arm"] == COST_BASELINE
        ),
        None,
    )
    longest = _mean([result["tokens_to_answer"]["mean"] for result in thinking.results]) if thinking else None
    tests = [
        _test(name, own, other)
        for name in baselines
        if name != variant and (other := scored.get((task, name, point))) is not None
    ]
    training = [result.get("training") or {} for result in own.results]
    return Group(
        task=task,
        variant=variant,
        point=point,
        arm=own.results[0]["arm"],
        scored_as=own.results[0]["task"],
        seeds=tuple(run.seed for run in own.runs),
        accuracies=tuple(float(value) for value in accuracies),
        accuracy=float(accuracies.mean()),
        stderr_seeds=float(accuracies.std(ddof=1) / math.sqrt(seeds)) if seeds > 1 else None,
        stderr_rows=standard_error(own.right.mean(axis=0)),
        rows=own.right.shape[1],
        split=own.results[0]["split"],
        chance=own.results[0].get("chance"),
        majority=own.results[0].get("majority"),
        tokens=tokens or 0.0,
        times_fewer_tokens=longest / tokens if longest and tokens else None,
        milliseconds=_mean([(result["milliseconds_to_answer"] or {}).get("median") for result in own.results]),
        training_tokens=_mean([record.get("tokens") for record in training]),
        training_seconds=_mean([record.get("seconds") for record in training]),
        parameters=own.results[0]["parameters"],
        steps=_mean([record.get("steps") for record in training]),
        unparsed=sum(result["unparsed"] for result in own.results),
        device=own.results[0]["device"],
        generated="gen:" in f"{own.runs[0].config.data.train} {own.runs[0].config.data.test}",
        adaptive=_adaptive([result["adaptive"] for result in own.results if result.get("adaptive")]),
        tests=tuple(test for test in tests if test is not None),
        curve=_mean_curve([result.get("curve") or [] for result in own.results]),
    )


def _adaptive(accounts: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]] | None:
    """Means over seeds of the `adaptive` sections of the evaluations."""
    if not accounts:
        return None
    ways = {"at once": [account["at_once"] for account in accounts]}
    ways |= {"always thinking": [account["always_thinking"] for account in accounts], "as it chose": list(accounts)}
    names = ("accuracy", "tokens", "thinking")
    return {way: {name: float(np.mean([one[name] for one in found])) for name in names} for way, found in ways.items()}


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[tuple[int, float], ...]:
    """The mean of the seeds' learning curves; empty unless all have the same steps."""
    steps = [int(step) for step, _ in curves[0]]
    if any([step for step, _ in curve] != steps for curve in curves):
        return ()
    return tuple((step, float(np.mean([curve[k][1] for curve in curves]))) for k, step in enumerate(steps))


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the measured values; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _test(baseline: str, own: _Scored, other: _Scored) -> Difference | None:
    """The paired test over the seeds that both have; None if they share none."""
    mine = {run.seed: row for run, row in zip(own.runs, own.right, strict=True)}
    theirs = {run.seed: row for run, row in zip(other.runs, other.right, strict=True)}
    common = [seed for seed in mine if seed in theirs]
    if not common:
        return None
    arm, base = np.stack([mine[s] for s in common]), np.stack([theirs[s] for s in common])
    return paired(baseline, arm, base)
