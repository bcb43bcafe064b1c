"""Reads the JSON files of a finished run and checks the fields that report, comparison, experiment and card use.

An evaluation writes results.json and samples.jsonl, training writes train.json and metrics.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pst_dist.errors import IntegrityError
from pst_dist.evaluation.scores import with_current_names
from pst_dist.storage.json_files import read_json, read_lines, typed

_REMEDY = "run `pst evaluate` with --rebuild"


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Tokens(_Open):
    mean: float
    median: float | None = None
    p95: float | None = None


class _WholeTokens(_Tokens):
    median: float
    p95: float


class _Latency(_Open):
    median: float
    p90: float | None = None


class _WholeLatency(_Latency):
    p90: float


class _Similarity(_Open):
    mean: float
    shuffled_mean: float


class _Student(_Open):
    digest: str


class _Share(_Open):
    accuracy: float
    tokens: float
    thinking: float


class _Adaptive(_Share):
    think_below: float
    at_once: _Share
    always_thinking: _Share


class _Unseen(_Open):
    accuracy: float


class _Source(_Open):
    in_training: int | None
    unseen: _Unseen | None


class _Part(_Open):
    task: str
    rows: int
    accuracy: float
    accuracy_stderr: float
    unparsed: int
    tokens_to_answer: _Tokens


class _Results(_Open):
    """The fields that every reader needs, and the types of the optional ones."""

    task: str
    split: str
    rows: int
    accuracy: float
    accuracy_stderr: float
    tokens_to_answer: _Tokens
    milliseconds_to_answer: _Latency | None
    arm: str | None = None
    variant: list[str] | None = None
    seed: int | None = None
    rationale_similarity: _Similarity | None = None
    contains_answer: float | None = None
    incomplete: int | None = None
    rows_per_second: float | None = None
    parameters: int | None = None
    device: str | None = None
    student: _Student | None = None
    shards: str | None = None
    chance: float | None = None
    majority: float | None = None
    training: dict[str, int | float | str | None] | None = None
    adaptive: _Adaptive | None = None
    source: _Source | None = None
    sources: dict[str, _Part] | None = None


class _ComparedResults(_Results):
    """Also the fields by which a comparison names its runs."""

    arm: str
    variant: list[str]
    seed: int


class _WholeResults(_ComparedResults):
    """Also the fields that the page of a run shows."""

    tokens_to_answer: _WholeTokens
    milliseconds_to_answer: _WholeLatency | None
    contains_answer: float
    incomplete: int
    rows_per_second: float
    parameters: int
    device: str
    student: _Student
    shards: str


class _Training(_Open):
    fingerprint: str | None = None
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    best_step: int | None = None
    best_value: float | None = None
    metric: Literal["accuracy", "answer_nll", "written_nll"] | None = None


class _WholeTraining(_Training):
    steps: int
    seconds: float
    tokens: int


def read_training(path: Path, *, whole: bool = False) -> dict[str, Any]:
    """The contents of train.json; {} if the file does not exist.

    Raises IntegrityError, naming the field, for a wrong type, and with `whole` when steps, seconds or tokens are
    missing.
    """
    if not path.is_file():
        return {}
    record = read_json(path)
    typed(record, _WholeTraining if whole else _Training, path, "run `pst train` again")
    return dict(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps in metrics.jsonl, in order; other lines are skipped."""
    return [row for row in read_lines(path) if _is_step(row.get("step")) and _are_numbers(row.get("validation", {}))]


_MOST_STEPS = 2**48


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_STEPS


def is_plottable(value: Any) -> bool:
    """Whether a value is a number that a picture can show: its axes are float64, and leave room around the values."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(is_plottable(one) for one in value.values())


def read_results(path: Path) -> dict[str, Any]:
    """The results in a file; raises IntegrityError, naming the field, for a wrong type or one that is missing."""
    results = read_json(path)
    typed(results, _Results, path, _REMEDY)
    return with_current_names(results)


def check_comparable(results: dict[str, Any], path: Path) -> None:
    """Raises IntegrityError when results lack something that a comparison needs."""
    typed(results, _ComparedResults, path, _REMEDY)
    _check_unparsed(results, path)


def check_whole(results: dict[str, Any], path: Path) -> None:
    """Raises IntegrityError when results lack something that the page of a run shows."""
    typed(results, _WholeResults, path, _REMEDY)
    _check_unparsed(results, path)


def _check_unparsed(results: dict[str, Any], path: Path) -> None:
    """The count that older versions wrote under another name; `read_results` has given it today's."""
    value = results.get("unparsed")
    if not isinstance(value, int) or isinstance(value, bool):
        raise IntegrityError("unparsed: is missing or not a whole number", _REMEDY, path=path)


def student_of(results: dict[str, Any]) -> str | None:
    """Digest of the student that was scored; None if it was not recorded."""
    student = results.get("student")
    return student["digest"] if student else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The scored rows in samples.jsonl; raises IntegrityError, naming the line, for a missing or invalid field."""
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
