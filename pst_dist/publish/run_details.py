"""Tables of a run's page: its worst answers, and everything that was skipped, dropped or cut on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.errors import PstError
from pst_dist.publish import html
from pst_dist.publish.html import Cell, Row, Table
from pst_dist.storage.manifest import read_manifest

_WORST = 10
_DROPPED = (
    ("bad_rows", "bad rows, listed in data/rejects.jsonl"),
    ("duplicates_dropped", "repeated training rows, dropped"),
    ("rationales_merged", "rationales of repeated questions, kept with the first row"),
    ("leaks_dropped", "training rows whose question is in validation or test, dropped"),
    ("teacher_wrong_dropped", "rows whose teacher gave another answer, dropped"),
    ("conflicting_answers", "questions with two different answers, kept"),
    ("rows_over_max_rows", "rows over data.max_rows, left out"),
    ("rows_unused", "rows in no split"),
    ("train_without_rationale", "training rows without a rationale"),
    ("wrong_rationales", "rationales replaced by another row's (data.wrong_rationales)"),
)


def worst_rows(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Wrong answers: without an answer first, then those with the rationale least like the teacher's; None if none."""
    wrong = [row for row in rows if not row["correct"]]
    if not wrong:
        return None
    wrong.sort(key=lambda row: (row.get("prediction") is not None, row.get("complete", True), _likeness(row)))
    explained = any(row.get("rationale") for row in wrong[:_WORST])
    head: Row = ["question", "gold", "answer", Cell("tokens", "right")]
    head += ["rationale, on request", "teacher's rationale"] if explained else []
    body: list[Row] = []
    for row in wrong[:_WORST]:
        cells: Row = [html.shortened(row["question"]), row["gold"], html.answer_cell(row)]
        cells.append(Cell(str(row.get("answer_tokens", "")), "right"))
        if explained:
            written = row["rationale"] if "rationale" in row else "not generated"
            cells += [html.shortened(written or ""), html.shortened(row.get("teacher_rationale") or "")]
        body.append(cells)
    return Table(head, body)


def _likeness(row: Mapping[str, Any]) -> float:
    """The cosine of a row's rationale to the teacher's; rows without one come last."""
    value = row.get("similarity")
    return float(value) if isinstance(value, int | float) else 2.0


def left_out(run: Path, metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> Table:
    """What was skipped, dropped or cut, stage by stage; one line that says so where nothing was."""
    found = [
        *_of_data(run),
        *_of_training(metrics),
        *_of_evaluations(evaluations),
    ]
    rows: list[Row] = [[stage, what, Cell(f"{count:,}", "right")] for stage, what, count in found if count]
    return Table(["stage", "what", Cell("how many", "right")], rows or [["all", "nothing", Cell("0", "right")]])


def _of_data(run: Path) -> Iterator[tuple[str, str, int]]:
    with contextlib.suppress(PstError):  # no saved config, one of another version, or data that is not on this machine
        data = run_dir(load_config(str(run)))
        shards = read_manifest(data.shards, "shards")
        report = shards.extra.get("report") if shards is not None else None
        for name, words in _DROPPED:
            yield "rows", words, _count((report or {}).get(name))
        embeddings = read_manifest(data.embeddings, "embeddings")
        if embeddings is not None:
            yield "embeddings", "rationales over the encoder's limit, cut", _count(embeddings.extra.get("truncated"))


def _of_training(metrics: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    bad = [str(row.get("outcome", "")) for row in metrics if "bad_step" in row]
    yield "training", "bad steps, skipped", sum(outcome == "skipped" for outcome in bad)
    yield "training", "bad steps that rolled the weights back", sum("rolled back" in outcome for outcome in bad)


def _of_evaluations(evaluations: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    for results in evaluations:
        split = f"evaluation, {results['split']}"
        yield split, "answers cut off at evaluate.max_new_tokens", _count(results.get("incomplete"))
        yield split, "answers that could not be parsed, counted as wrong", _count(results.get("unparsed"))
        timed = (results.get("milliseconds_to_answer") or {}).get("rows")
        if timed is not None and timed < results["rows"]:
            yield split, "rows whose latency was not measured (evaluate.latency_rows)", results["rows"] - _count(timed)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
