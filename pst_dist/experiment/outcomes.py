"""The outcome of each finished run, one per line of a file, so that machines without a shared disk can split the runs.

`outcomes.jsonl` is written next to every page. For each run it contains the settings, which rows were answered
correctly, and the results, so every number and paired test on the page can be recomputed and results of several
machines can be combined: `pst experiment FILE --with FOLDER`.
"""

# Shapes in this file: R scored rows

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from pst_dist.config.keys import flat_keys
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.errors import InputError, IntegrityError, StaleError
from pst_dist.evaluation.records import read_metrics, read_rows
from pst_dist.evaluation.scores import with_current_names
from pst_dist.experiment.runs import placeless, result_of, samples_of
from pst_dist.experiment.spec import Run
from pst_dist.publish.plots import validation_series
from pst_dist.storage.json_files import parse_json, read_content, typed
from pst_dist.storage.manifest import canonical_json, digest_of, read_manifest

OUTCOMES = "outcomes.jsonl"
_SHOWN = 3
_ALWAYS = {
    *("arm", "task", "split", "parameters", "unparsed", "device", "tokens_to_answer", "milliseconds_to_answer"),
}
_ACCOUNT = _ALWAYS | {"chance", "majority", "training", "adaptive"}
"""The results that the page shows besides the correct rows."""
_CURVE = "curve"
"""Key of the learning curve: [[step, nats per answer token on the validation rows], ...]. Outcomes of earlier versions
and runs without validation rows have none."""


class _Share(BaseModel):
    accuracy: float
    tokens: float
    thinking: float


class _Adaptive(_Share):
    at_once: _Share
    always_thinking: _Share


class _Tokens(BaseModel):
    mean: float


class _Latency(BaseModel):
    median: float


class _Account(BaseModel):
    """The fields of a run's results that `experiment.results` reads; other numbers are only copied."""

    arm: str
    task: str
    split: str
    parameters: int
    device: str
    tokens_to_answer: _Tokens
    milliseconds_to_answer: _Latency | None
    chance: float | None = None
    majority: float | None = None
    training: dict[str, int | float | str | None] | None = None
    adaptive: _Adaptive | None = None
    curve: list[tuple[int, float]] | None = None


class _Line(BaseModel):
    """One line of the file."""

    run: str
    config: dict[str, Any]
    shards: str
    rows: str
    right: Annotated[str, Field(pattern="^[01]+$")]
    results: _Account


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    run: str
    """Its name: task, variant, varied values and seed."""
    config: Config
    """All settings, without folders (`placeless`)."""
    shards: str
    """Digest of the shards that it was trained and scored on."""
    rows: str
    """Digest of the sorted ids of the scored rows."""
    right: np.ndarray
    """[R] bool, whether each row is correct, in the order of the sorted ids."""
    results: dict[str, Any]
    """The part of its results, as `pst evaluate` wrote them, that a page shows."""

    def to_line(self) -> str:
        """One line of JSON; default settings are omitted, so that new settings do not change old lines."""
        return canonical_json(
            {
                "run": self.run,
                "config": self.config.model_dump(mode="json", exclude_defaults=True),
                "shards": self.shards,
                "rows": self.rows,
                "right": "".join("01"[int(one)] for one in self.right),
                "results": self.results,
            }
        )

    @classmethod
    def from_line(cls, line: str, path: Path) -> Outcome:
        """Parse such a line; raises IntegrityError if it is invalid, or ValueError for another version's config."""
        raw = parse_json(line.encode(), path)
        typed(raw, _Line, path)
        right = np.array([one == "1" for one in raw["right"]], dtype=bool)
        results = with_current_names(raw["results"])
        if not right.size or not _ALWAYS <= results.keys():
            raise IntegrityError("results are incomplete", path=path)
        config = placeless(Config.model_validate(raw["config"]))
        return cls(raw["run"], config, raw["shards"], raw["rows"], right, results)


def outcome_of(run: Run) -> Outcome | None:
    """The outcome of a run that is finished here; None for any other. Raises IntegrityError for damaged results."""
    results = result_of(run.config)
    if results is None:
        return None
    rows = sorted(read_rows(samples_of(run.config)), key=lambda row: row["id"])
    return Outcome(
        run=run.name,
        config=placeless(run.config),
        shards=results["shards"],
        rows=digest_of([row["id"] for row in rows]),
        right=np.array([row["correct"] for row in rows], dtype=bool),
        results={key: results[key] for key in _ACCOUNT if key in results} | _curve(run.config),
    )


def _curve(config: Config) -> dict[str, Any]:
    """The learning curve under its key; empty where no validation was logged."""
    steps, values = validation_series(read_metrics(run_dir(config).metrics), "answer_nll")
    return {_CURVE: [list(point) for point in zip(steps, values, strict=True)]} if steps else {}


def outcomes_text(outcomes: Iterable[Outcome]) -> str:
    """The content of the outcomes file."""
    return "".join(outcome.to_line() + "\n" for outcome in outcomes)


def outcomes_elsewhere(runs: Sequence[Run], folders: Sequence[Path]) -> dict[str, Outcome]:
    """Run name -> outcome in the folders' files, for each of `runs` that is in one; the first folder wins.

    Raises InputError for a folder without the file, IntegrityError for an invalid line, and StaleError, naming the
    settings, for a run that had other settings there.
    """
    wanted = {run.name: run for run in runs}
    found: dict[str, Outcome] = {}
    for folder in folders:
        for name, outcome in _read(folder / OUTCOMES).items():
            if name in wanted:
                _check_settings(outcome, wanted[name], folder)
                found.setdefault(name, outcome)
    return found


def check_same_rows(runs: Sequence[Run], outcomes: Mapping[str, Outcome]) -> None:
    """Raises StaleError when runs that must share rows used different ones, or different rows are packed here now."""
    known: dict[str, str] = {}
    for run in runs:
        if run.name not in outcomes:
            continue
        place = str(run.config.data_dir)
        if place not in known:
            here = read_manifest(run_dir(run.config).shards, "shards")
            known[place] = here.digest if here else outcomes[run.name].shards
        if outcomes[run.name].shards != known[place]:
            raise StaleError(
                f"{run.name} was run on different rows than the rest of its task",
                "compare data and versions on the machines; rows are equal when `pst shard` prints equal digests",
                path=place,
            )


def _read(path: Path) -> dict[str, Outcome]:
    if not path.is_file():
        raise InputError("no outcomes found", "`pst experiment` writes them next to every page", path=path)
    found = {}
    for number, line in enumerate(read_content(path).decode(errors="replace").split("\n"), start=1):
        if not line:
            continue
        try:
            outcome = Outcome.from_line(line, path)
        except (ValueError, IntegrityError) as error:  # pydantic's is a ValueError
            raise IntegrityError(
                "not a run's outcome in this version's format",
                "copy the file again, or use the version that wrote it",
                path=path,
                line=number,
            ) from error
        found[outcome.run] = outcome
    return found


def _check_settings(outcome: Outcome, run: Run, folder: Path) -> None:
    theirs, ours = (flat_keys(one.model_dump(mode="json")) for one in (outcome.config, placeless(run.config)))
    differing = [key for key in ours if theirs[key] != ours[key]]  # `check_same_rows` compares the rows themselves
    if differing:
        said = ", ".join(f"{key}={theirs[key]} (here {ours[key]})" for key in differing[:_SHOWN])
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise StaleError(f"{run.name} was run with {said}{more}", "give both the same settings", path=folder)
