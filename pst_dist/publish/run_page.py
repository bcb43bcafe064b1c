"""The page of one run: training curves, scores, its worst answers, what was left out, and what it was made from.

`report.md`, next to `report.html`, has the same tables. Everything shown is read from the run directory; nothing
is computed here. The plots come from `plots` and `cost_plots`, the layout from `templates/run.html` and `run.md`;
`compare_page` compares several arms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_dist.config.locate import RESOLVED
from pst_dist.errors import InputError
from pst_dist.evaluation.evaluate import RESULTS, SAMPLES, evaluations_of
from pst_dist.evaluation.explanations import explanation_rows
from pst_dist.evaluation.records import check_whole, read_metrics, read_rows, read_training
from pst_dist.evaluation.scores import per_correct
from pst_dist.publish import cost_plots, html, markdown, plots
from pst_dist.publish.compare_page import compare_report
from pst_dist.publish.html import Cell, Figure, Row, Table
from pst_dist.publish.render import render
from pst_dist.publish.run_details import left_out, worst_rows
from pst_dist.storage.json_files import read_object
from pst_dist.storage.manifest import Manifest, read_manifest
from pst_dist.storage.outputs import check_output, is_markdown_page, is_page, is_picture, write_output
from pst_dist.text.redaction import redact

__all__ = ["compare_report", "report"]

_SHOWN = 12
_MOVE = "move it away"


def report(run: Path) -> Path:
    """Write `report.html`, `report.md` and `plots/*.png` from the files of a run directory; returns the HTML page.

    A run without an evaluation is shown as far as it got. Evaluations of an older student are omitted. Raises
    InputError when no training is found, and for a page or picture that was not written by pst.
    """
    target, text = run / "report.html", run / "report.md"
    check_output(target, is_page, inside=run, remedy=_MOVE)
    check_output(text, is_markdown_page, inside=run, remedy=_MOVE)
    metrics = read_metrics(run / "metrics.jsonl")
    training = read_training(run / "train.json", whole=True)
    if not metrics and not training:
        raise InputError("no training found", "run `pst train` first", path=run)
    student = read_manifest(run / "best", "student")
    evaluations = evaluations_of(run, student)
    for results in evaluations:
        check_whole(results, run / "eval" / results["split"] / RESULTS)
    rows = read_rows(run / "eval" / evaluations[0]["split"] / SAMPLES) if evaluations else []
    figures = _figures(run, metrics, training, rows)
    values: dict[str, Any] = {
        "name": run.name,
        "arm": student.extra.get("arm") if student else None,
        "task": evaluations[0]["task"] if evaluations else None,
        "steps": training["steps"] if training else metrics[-1]["step"],
        "headline": _headline(evaluations, training),
        "scores": _scores(evaluations) if evaluations else None,
        "worst": worst_rows(rows),
        "worst_words": _WORST_WORDS,
        "samples": _samples(rows) if evaluations else None,
        "left_out": left_out(run, metrics, evaluations),
        "digests": html.pairs_table(_digests(student, evaluations)),
        **_record(run),
    }
    page = render("run.html", figures=list(figures.values()), **values)
    plots_of_it = [(f"plots/{name}.png", figure.caption) for name, figure in figures.items()]
    write_output(
        text, render("run.md", md=markdown, plots=plots_of_it, **values), is_markdown_page, inside=run, remedy=_MOVE
    )
    write_output(target, page, is_page, inside=run, remedy=_MOVE)
    return target


_WORST_WORDS = (
    "Wrong answers: first those without a parsable answer, then those whose rationale is least like the teacher's. "
    "Rationales are generated for the first evaluate.explain_rows rows only."
)


def _headline(evaluations: Sequence[dict[str, Any]], training: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = []
    if evaluations:
        results = evaluations[0]
        error = 100 * results["accuracy_stderr"]
        tiles += [
            (
                html.percent(results["accuracy"]),
                f"accuracy on {results['rows']} {results['split']} rows, s.e.\u00a0{error:.1f}",
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


def _figures(
    run: Path, metrics: list[dict[str, Any]], training: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, Figure]:
    """The plots of a training and of the scored rows by name, each also written to run/plots."""
    if not metrics:
        return {}
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
            "Each term's share of the gradient at the hidden state. Near 0 or 100 %: consider another weight.",
        ),
        "validation": (
            plots.validation_plot(metrics, training.get("best_step"), metric),
            f"Validation {plots.METRIC_WORDS[metric]}, by which the checkpoint was chosen.",
        ),
    }
    if metric != "accuracy":
        accuracy = plots.validation_plot(metrics, training.get("best_step"), "accuracy")
        drawn["validation_accuracy"] = (accuracy, "Accuracy on the validation rows during training.")
    drawn["lengths"] = (
        cost_plots.lengths_plot(rows),
        "Tokens that the student wrote up to the end of its answer, over the scored rows.",
    )
    drawn["throughput"] = (
        cost_plots.throughput_plot(metrics),
        "Tokens of training sequences per second, and the share of the computed positions that is padding.",
    )
    found = {}
    for name, (png, caption) in drawn.items():
        if png is not None:
            write_output(run / "plots" / f"{name}.png", png, is_picture, inside=run, remedy=_MOVE)
            found[name] = Figure(png, caption)
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
        ("tokens, milliseconds per correct answer", _per_correct),
        ("rows per second, batched", lambda r: f"{r['rows_per_second']:.1f}"),
        ("cosine of the rationale to the teacher's", _similarity),
        ("measured on", lambda r: r["device"]),
    ]
    if any(results.get("source") for results in evaluations):
        rows.insert(2, ("questions also in the training rows", _in_training))
    names = dict.fromkeys(name for results in evaluations for name in results.get("sources") or {})
    rows += [(f"accuracy on {name}", functools.partial(_of_source, name)) for name in names]
    head: Row = ["", *(Cell(results["split"], "right") for results in evaluations)]
    body: list[Row] = [[name, *(Cell(tell(results), "right") for results in evaluations)] for name, tell in rows]
    for name, values in explanation_rows([results.get("explanations") for results in evaluations]):
        body.append([name, *(Cell(value, "right") for value in values)])
    return Table(head, body)


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


def _per_correct(results: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(words for words in per_correct(results) if words))


def _similarity(results: dict[str, Any]) -> str:
    likeness = results.get("rationale_similarity")
    if not likeness:
        return "not measured"
    own, others = (round(likeness[name], 3) + 0.0 for name in ("mean", "shuffled_mean"))  # no minus zero
    return f"{own:.3f} (other rows' teachers: {others:.3f})"


def _samples(scored: Sequence[dict[str, Any]]) -> Table:
    """The first scored rows, with their rationales if any were generated."""
    rows = scored[:_SHOWN]
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
