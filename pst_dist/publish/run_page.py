"""The page of one run: training curves, scores, sample answers, and what it was made from.

Everything shown is read from the run directory; nothing is computed here. The plots come from `plots`, the layout
from `templates/run.html`; `compare_page` compares several arms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_dist.config.loading import RESOLVED
from pst_dist.errors import InputError
from pst_dist.evaluation.evaluate import RESULTS, SAMPLES, evaluations_of
from pst_dist.evaluation.explanations import explanation_lines
from pst_dist.evaluation.records import check_whole, read_metrics, read_rows, read_training
from pst_dist.publish import html, plots
from pst_dist.publish.compare_page import compare_report
from pst_dist.publish.html import Cell, Figure, Row, Table
from pst_dist.publish.render import render
from pst_dist.redaction import redact
from pst_dist.storage.json_files import read_object
from pst_dist.storage.manifest import Manifest, read_manifest
from pst_dist.storage.outputs import check_output, is_page, is_picture, write_output

__all__ = ["compare_report", "report"]

_SHOWN = 12
_MOVE = "move it away"


def report(run: Path) -> Path:
    """Write `run/report.html` and `run/plots/*.png` from the files in the run directory; returns the page's path.

    A run without an evaluation is shown as far as it got. Evaluations of an older student are omitted. Raises
    InputError when no training is found, and for a page or picture that was not written by pst.
    """
    target = run / "report.html"
    check_output(target, is_page, inside=run, remedy=_MOVE)
    metrics = read_metrics(run / "metrics.jsonl")
    training = read_training(run / "train.json", whole=True)
    if not metrics and not training:
        raise InputError("no training found", "run `pst train` first", path=run)
    student = read_manifest(run / "best", "student")
    evaluations = evaluations_of(run, student)
    for results in evaluations:
        check_whole(results, run / "eval" / results["split"] / RESULTS)
    page = render(
        "run.html",
        name=run.name,
        arm=student.extra.get("arm") if student else None,
        task=evaluations[0]["task"] if evaluations else None,
        steps=training["steps"] if training else metrics[-1]["step"],
        headline=_headline(evaluations, training),
        figures=_training_figures(run, metrics, training) if metrics else [],
        scores=_scores(evaluations) if evaluations else None,
        samples=_samples(run, evaluations[0]["split"]) if evaluations else None,
        digests=html.pairs_table(_digests(student, evaluations)),
        **_record(run),
    )
    write_output(target, page, is_page, inside=run, remedy=_MOVE)
    return target


def _headline(evaluations: Sequence[dict[str, Any]], training: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = []
    if evaluations:
        results = evaluations[0]
        error = 100 * results["accuracy_stderr"]
        tiles += [
            (
                html.percent(results["accuracy"]),
                f"accuracy on {results['rows']} {results['split']} rows, s.e. {error:.1f}",
            ),
            (f"{results['tokens_to_answer']['mean']:.1f}", "tokens to the answer, mean"),
        ]
        if results["milliseconds_to_answer"]:
            tiles.append(
                (f"{results['milliseconds_to_answer']['median']:.1f} ms", "to the answer, median, one at a time")
            )
    if training:
        tiles.append((html.duration(training["seconds"]), f"of training, {training['tokens']:,} tokens"))
    return tiles


def _training_figures(run: Path, metrics: list[dict[str, Any]], training: dict[str, Any]) -> list[Figure]:
    """The plots of a training, each also written to run/plots."""
    metric = training.get("metric", "answer_nll")
    drawn = {
        "loss": (
            plots.loss_plot(metrics),
            "The raw loss terms, before their weights. Dots are means over the validation rows.",
        ),
        "cosine": (
            plots.cosine_plot(metrics),
            "Mean cosine between the student's projected semantic state and the teacher's embedding.",
        ),
        "gradient_shares": (
            plots.gradient_plot(metrics),
            "Each term's share of the gradient at the hidden state. Near 0 or 100 %, consider another weight.",
        ),
        "validation": (
            plots.validation_plot(metrics, training.get("best_step"), metric),
            f"Validation {plots.METRIC_WORDS[metric]}, by which the checkpoint was chosen.",
        ),
    }
    if metric != "accuracy":
        accuracy = plots.validation_plot(metrics, training.get("best_step"), "accuracy")
        drawn["validation_accuracy"] = (accuracy, "Accuracy on the validation rows during training.")
    found = []
    for name, (png, caption) in drawn.items():
        if png is not None:
            write_output(run / "plots" / f"{name}.png", png, is_picture, inside=run, remedy=_MOVE)
            found.append(Figure(png, caption))
    return found


def _scores(evaluations: Sequence[dict[str, Any]]) -> Table:
    """What was measured, one column per split."""
    rows: list[tuple[str, Any]] = [
        ("task", lambda r: r["task"]),
        ("rows", lambda r: f"{r['rows']:,}"),
        ("accuracy", lambda r: f"{100 * r['accuracy']:.2f} %"),
        ("standard error", lambda r: f"{100 * r['accuracy_stderr']:.2f} points"),
        ("guessing", lambda r: html.percent(r.get("chance")) or "unknown"),
        ("the most frequent answer", lambda r: html.percent(r.get("majority"))),
        ("gold answer anywhere in the text", lambda r: html.percent(r["contains_answer"])),
        ("unparsed: no answer in the text", lambda r: f"{r['unparsed']} rows"),
        ("incomplete: no stop token", lambda r: f"{r['incomplete']} rows"),
        ("tokens to the answer: mean, median, 95th percentile", _tokens),
        ("milliseconds to the answer: median, 90th percentile", _milliseconds),
        ("rows per second, batched", lambda r: f"{r['rows_per_second']:.1f}"),
        ("cosine of the rationale to the teacher's", _similarity),
        ("measured on", lambda r: r["device"]),
    ]
    if any(results.get("source") for results in evaluations):
        rows.insert(2, ("questions also in the training rows", _in_training))
    for name, _ in explanation_lines(next((r["explanations"] for r in evaluations if r.get("explanations")), None)):
        rows.append((name, functools.partial(_of_explanations, name)))
    names = dict.fromkeys(name for results in evaluations for name in results.get("sources") or {})
    rows += [(f"accuracy on {name}", functools.partial(_of_source, name)) for name in names]
    head: Row = ["", *(Cell(results["split"], "right") for results in evaluations)]
    body: list[Row] = [[name, *(Cell(tell(results), "right") for results in evaluations)] for name, tell in rows]
    return Table(head, body)


def _of_explanations(name: str, results: dict[str, Any]) -> str:
    return dict(explanation_lines(results.get("explanations"))).get(name, "not measured")


def _of_source(name: str, results: dict[str, Any]) -> str:
    """The score of one source of a mixture."""
    part = (results.get("sources") or {}).get(name)
    if part is None:
        return "none"
    return f"{100 * part['accuracy']:.2f} % of {part['rows']:,} (standard error {100 * part['accuracy_stderr']:.2f})"


def _in_training(results: dict[str, Any]) -> str:
    """For other rows than the run's: how many questions, and the accuracy on those that are not."""
    source = results.get("source")
    if not source:
        return "none"
    if source["in_training"] is None:
        return "unknown"
    unseen = source["unseen"]
    return f"{source['in_training']:,}" + (
        f" (accuracy on the others: {html.percent(unseen['accuracy'])})" if unseen else ""
    )


def _tokens(results: dict[str, Any]) -> str:
    tokens = results["tokens_to_answer"]
    return f"{tokens['mean']:.1f}, {tokens['median']:.0f}, {tokens['p95']:.0f}"


def _milliseconds(results: dict[str, Any]) -> str:
    latency = results["milliseconds_to_answer"]
    return f"{latency['median']:.1f}, {latency['p90']:.1f}" if latency else "not measured"


def _similarity(results: dict[str, Any]) -> str:
    likeness = results.get("rationale_similarity")
    if not likeness:
        return "not measured"
    own, others = (round(likeness[name], 3) + 0.0 for name in ("mean", "shuffled_mean"))  # no minus zero
    return f"{own:.3f} (other rows' teachers: {others:.3f})"


def _samples(run: Path, split: str) -> Table:
    """The first scored rows, with their rationales if any were generated."""
    rows = read_rows(run / "eval" / split / SAMPLES)[:_SHOWN]
    explained = any(row.get("rationale") for row in rows)
    head: Row = [
        "question",
        "gold",
        "answer",
        *(["rationale, on request", "teacher's rationale"] if explained else []),
    ]
    body: list[Row] = []
    for row in rows:
        cells: Row = [html.shortened(row["question"]), row["gold"], html.answer_cell(row)]
        if explained:
            cells += [html.shortened(row.get("rationale") or ""), html.shortened(row.get("teacher_rationale") or "")]
        body.append(cells)
    return Table(head, body)


def _record(run: Path) -> dict[str, str | None]:
    """Command, config and environment; None for what was not recorded, without the passwords of older records."""

    def text_of(name: str) -> str | None:
        path = run / name
        return redact(path.read_text(encoding="utf-8", errors="replace").strip()) if path.is_file() else None

    environment = read_object(run / "environment.json") if (run / "environment.json").is_file() else {}
    return {
        "command": text_of("command.txt"),
        "config": text_of(RESOLVED),
        "environment": "\n".join(f"{name}: {value}" for name, value in environment.items()) or None,
    }


def _digests(student: Manifest | None, evaluations: Sequence[dict[str, Any]]) -> dict[str, str]:
    """sha256 digests of the artefacts that this run depends on."""
    digests = {}
    if student is not None:
        digests["student"] = student.digest
        digests["training settings, rows and embeddings"] = student.fingerprint
    for results in evaluations:
        digests[f"{results['split']} evaluation of student"] = results["student"]["digest"]
        digests["shards"] = results["shards"]
    return digests
