"""The JSON files of a finished run, checked for what their readers count on: report, comparison, experiment, card.

results.json and samples.jsonl are an evaluation's, train.json and metrics.jsonl the training's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pst_dist.errors import IntegrityError
from pst_dist.storage.json_files import read_json, read_lines, typed

_REMEDY = "run `pst evaluate` with --rebuild"


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Tokens(_Open):
    mean: float
    median: float
    p95: float


class _Latency(_Open):
    median: float
    p90: float


class _Similarity(_Open):
    mean: float
    shuffled_mean: float


class _Student(_Open):
    digest: str


class _Results(_Open):
    """Fields that are read without asking whether they are there; others are looked up with a default."""

    task: str
    arm: str
    variant: list[str]
    split: str
    seed: int
    rows: int
    accuracy: float
    accuracy_stderr: float
    contains_answer: float
    incomplete: int
    rows_per_second: float
    tokens_to_answer: _Tokens
    milliseconds_to_answer: _Latency | None
    rationale_similarity: _Similarity | None = None
    parameters: int
    device: str
    student: _Student
    shards: str
    chance: float | None = None
    majority: float | None = None
    training: dict[str, int | float | str | None] | None = None


class _Training(_Open):
    fingerprint: str
    steps: int
    seconds: float
    tokens: int
    best_step: int
    best_value: float | None
    metric: Literal["accuracy", "answer_nll", "written_nll"]


def read_training(path: Path) -> dict[str, Any]:
    """What train.json says of a finished training, {} when there is none; raises IntegrityError for a damaged one."""
    if not path.is_file():
        return {}
    record = read_json(path)
    typed(record, _Training, path, "run `pst train` again")
    return dict(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps in metrics.jsonl in their order; lines that are no such rows are left out."""
    return [row for row in read_lines(path) if _is_integer(row.get("step")) and _are_numbers(row.get("validation", {}))]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, int | float) for one in value.values())


def read_results(path: Path) -> dict[str, Any]:
    """The results in a file; raises IntegrityError, naming file and field, when one that readers need is not right."""
    results = read_json(path)
    typed(results, _Results, path, _REMEDY)
    return dict(results)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The scored rows in samples.jsonl; raises IntegrityError, naming the line, when one lacks what is read of it."""
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        wrong = [name for name in ("id", "question", "gold") if not isinstance(row.get(name), str)]
        if not isinstance(row.get("correct"), bool):
            wrong.append("correct")
        if wrong:
            raise IntegrityError(f"{wrong[0]} is missing or of the wrong type", _REMEDY, path=path, line=number)
    if len({row["id"] for row in rows}) != len(rows):
        raise IntegrityError("two rows have the same id", _REMEDY, path=path)
    return rows
