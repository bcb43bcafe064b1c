"""Scores a trained student on held-out rows: accuracy, tokens and milliseconds to the answer, rationale similarity.

The text before the stop token is scored, not the last number in the whole text. Results are tied to the digests of
student and rows, so the same evaluation never runs twice. `data.tasks` turns text into an answer, `student.generate`
generates it, `scores` counts, `compare` compares evaluations.
"""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, fetch_data, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet, synthetic_of
from pst_dist.data.tasks import Task, get_task
from pst_dist.errors import InputError, StaleError
from pst_dist.evaluation.adaptive import adaptive_answers
from pst_dist.evaluation.records import read_results, read_training, student_of
from pst_dist.evaluation.scores import chance_of, contains_answer, given_rationales, rows_to_score, sample_row, score_of
from pst_dist.evaluation.similarity import compare_rationales
from pst_dist.logs import progress
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import (
    Manifest,
    canonical_json,
    digest_of,
    read_manifest,
    write_json,
)
from pst_dist.storage.outputs import refuse_foreign_folder
from pst_dist.student.ask import timed_answer
from pst_dist.student.generate import Decoded, decode_answers, is_right, predict
from pst_dist.student.layout import variant_of
from pst_dist.student.saved import LoadedStudent, load_student

log = logging.getLogger(__name__)
RESULTS, SAMPLES = "results.json", "samples.jsonl"
_VERSION = 1
_WARM_UPS = 2


def evaluate(config: Config, *, rebuild: bool = False) -> dict[str, Any]:
    """Decode and score one split; writes results.json and samples.jsonl into the run and returns the results.

    A finished evaluation of the same student, rows and settings is read back instead, unless `rebuild`. Raises
    InputError when there is no student or nothing to score, StaleError when the student belongs to another arm or was
    trained from other shards.
    """
    run, split = run_dir(config), config.evaluate.split
    student = load_student(run.best)
    fetch_data(config)
    shards = ShardSet.open(run.shards)
    _check_lineage(config, student, shards)
    task = get_task(config.task, config.data.answer_type)
    embeddings = read_manifest(run.embeddings, "embeddings") if student.format.writes_rationale else None
    fingerprint = digest_of(
        {
            "version": _VERSION,
            "student": student.manifest.digest,
            "shards": shards.manifest.digest,
            "embeddings": embeddings.digest if embeddings else None,
            "task": task.name,
            "settings": _settings(config),
        }
    )
    directory = run.evaluation(split)
    if not rebuild and (done := finished_evaluation(directory, fingerprint)) is not None:
        log.info("evaluation of %s is complete, nothing to do", directory)
        return done
    samples = rows_to_score(shards.split(split), config.evaluate.max_rows)
    if not samples:
        raise InputError(
            f"there are no {split} rows in these shards",
            f"set data.{split} or data.{split}_size and run `pst shard` again",
            path=run.shards,
        )
    refuse_foreign_folder(directory, "evaluation")  # before the decoding
    results, rows = _score(config, run, student, shards, samples, task)
    extra = {"split": split, "rows": len(rows), "student": student.manifest.digest, **synthetic_of(shards.manifest)}
    with Artefact(directory, "evaluation").publish(fingerprint, extra) as draft:
        write_json(draft.path / RESULTS, results)
        write_text(draft.path / SAMPLES, "".join(canonical_json(row) + "\n" for row in rows))
    log.info(
        "%s on %d %s rows: accuracy %.2f %% (standard error %.2f), %.1f tokens to the answer",
        config.arm,
        results["rows"],
        split,
        100 * results["accuracy"],
        100 * results["accuracy_stderr"],
        results["tokens_to_answer"]["mean"],
    )
    return results


def _settings(config: Config) -> dict[str, Any]:
    """The settings that affect the results."""
    settings = config.evaluate.model_dump()
    if not ARMS[config.arm].chooses_order:
        del settings["think_below"]  # keeps evaluations valid that were made before this key existed
    return settings


def _check_lineage(config: Config, student: LoadedStudent, shards: ShardSet) -> None:
    """Raises StaleError for a student of another arm or of other shards."""
    if student.format.arm != config.arm:
        raise StaleError(
            f"the student here was trained as {student.format.arm}, but the config has arm {config.arm}",
            "name the run directory of that arm, or train again",
            path=student.directory,
        )
    trained_from = student.manifest.extra.get("shards")
    if trained_from is not None and trained_from != shards.manifest.digest:
        raise StaleError(
            "the student was trained from different shards", "run `pst train` again", path=student.directory
        )


def finished_evaluation(directory: Path, fingerprint: str | None = None) -> dict[str, Any] | None:
    """The results of a complete evaluation (with this fingerprint, if given), or None; raises IntegrityError."""
    artefact = Artefact(directory, "evaluation")
    if artefact.verified(fingerprint, remedy="run `pst evaluate` with --rebuild") is None:
        return None
    return read_results(directory / RESULTS)


def evaluations_of(run: Path, student: Manifest | None) -> list[dict[str, Any]]:
    """Finished evaluations of exactly this student in a run directory, test first; all of them for None.

    Evaluations of an earlier student are skipped with a warning. Raises IntegrityError for a damaged one.
    """
    found = []
    for split in ("test", "validation"):
        results = finished_evaluation(run / "eval" / split)
        if results is None:
            continue
        if student is not None and student_of(results) != student.digest:
            log.warning("skipping %s: it belongs to an older student; run `pst evaluate` again", run / "eval" / split)
            continue
        found.append(results)
    return found


def _score(
    config: Config,
    run: RunDir,
    student: LoadedStudent,
    shards: ShardSet,
    samples: list[ReasoningSample],
    task: Task,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results, one row per sample)."""
    settings, questions = config.evaluate, [sample.question for sample in samples]
    started = time.perf_counter()
    decode = functools.partial(_decode, config, student)
    if ARMS[config.arm].chooses_order:
        right = functools.partial(is_right, task, student.format)
        decoded, adaptive = adaptive_answers(config.evaluate, samples, shards.split("validation"), decode, right)
    else:
        decoded, adaptive = decode(samples), None
    seconds = time.perf_counter() - started
    rows = [
        sample_row(sample, answer, predict(task, student.format, answer), task)
        for sample, answer in zip(samples, decoded, strict=True)
    ]
    results = {
        "task": task.name,
        "arm": config.arm,
        "variant": variant_of(config),
        "split": settings.split,
        "seed": student.manifest.extra.get("seed", config.seed),
        **score_of(rows),
        "contains_answer": sum(contains_answer(task, d.text, s.answer) for s, d in zip(samples, decoded, strict=True))
        / len(rows),
        "chance": chance_of(task, samples),
        "majority": Counter(sample.answer for sample in samples).most_common(1)[0][1] / len(samples),
        "milliseconds_to_answer": _latency(
            student,
            questions[: settings.latency_rows],
            settings.max_new_tokens,
            adaptive["think_below"] if adaptive else 0.0,
        ),
        "rows_per_second": len(rows) / seconds,
        "rationale_similarity": compare_rationales(config, run, student, shards, samples, decoded, rows),
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "device": _device_name(student),
        "student": {"digest": student.manifest.digest, "step": student.manifest.extra.get("step")},
        "shards": shards.manifest.digest,
        "training": _training(run, student),
    }
    if adaptive:
        results["adaptive"] = adaptive
        for row, answer in zip(rows, decoded, strict=True):
            row |= {"thought_first": answer.thought_first, "probability_at_once": answer.probability}
    return results, rows


def _decode(
    config: Config, student: LoadedStudent, samples: Sequence[ReasoningSample], other: bool = False
) -> list[Decoded]:
    """Answers to all samples, with rationales supplied if the settings ask for it; `other` makes it think first."""
    settings = config.evaluate
    with progress(f"evaluate {config.arm}", total=len(samples), unit="rows") as bar:
        return decode_answers(
            student.model,
            student.tokenizer,
            student.format,
            [sample.question for sample in samples],
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            given=None
            if settings.rationale == "own"
            else given_rationales(samples, wrong=settings.rationale == "wrong"),
            other=other,
            on_batch=bar.advance,
        )


def _latency(
    student: LoadedStudent, questions: Sequence[str], max_new_tokens: int, think_below: float
) -> dict[str, Any] | None:
    """Wall time to the answer in milliseconds, one question at a time, after warming up."""
    if not questions:
        return None
    for question in questions[:_WARM_UPS]:
        timed_answer(student, question, max_new_tokens=max_new_tokens, think_below=think_below)
    times = [
        timed_answer(student, question, max_new_tokens=max_new_tokens, think_below=think_below)[1]
        for question in questions
    ]
    return {"median": float(np.median(times)), "p90": float(np.percentile(times, 90)), "rows": len(times)}


def _device_name(student: LoadedStudent) -> str:
    device = student.model.device
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _training(run: RunDir, student: LoadedStudent) -> dict[str, Any] | None:
    """Steps, seconds and tokens of the training that produced this student; None without its record."""
    record = read_training(run.training)
    if record.get("fingerprint") != student.manifest.fingerprint:
        return None
    return {name: record.get(name) for name in ("steps", "seconds", "tokens", "best_step", "best_value", "metric")}
