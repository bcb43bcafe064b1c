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
import torch

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, fetch_data, run_dir
from pst_dist.config.schema import Config, EvaluateConfig
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.data.shards import ShardSet, synthetic_of
from pst_dist.data.tasks import Task, get_task, task_of
from pst_dist.errors import InputError, StaleError
from pst_dist.evaluation.adaptive import adaptive_answers
from pst_dist.evaluation.explanations import explanations_of
from pst_dist.evaluation.records import read_results, read_training, student_of
from pst_dist.evaluation.scores import (
    chance_of,
    contains_answer,
    given_rationales,
    rows_to_score,
    sample_row,
    score_of,
    scores_of_sources,
)
from pst_dist.evaluation.similarity import compare_rationales
from pst_dist.logs import progress
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.leftovers import final_name
from pst_dist.storage.manifest import (
    Manifest,
    canonical_json,
    digest_of,
    read_manifest,
    write_json,
)
from pst_dist.storage.outputs import refuse_foreign_folder
from pst_dist.student.ask import timed_answer
from pst_dist.student.contexts import Decoded
from pst_dist.student.generate import decode_answers, is_right, predict
from pst_dist.student.layout import variant_of
from pst_dist.student.saved import LoadedStudent, load_student

log = logging.getLogger(__name__)
RESULTS, SAMPLES = "results.json", "samples.jsonl"
VERSION = 1
"""Part of every fingerprint: raised when the same inputs would be scored differently."""
SPLITS_SCORED = ("test", "validation")
"""The run's own splits; every other folder below RUN/eval has the scores of other rows."""
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
    check_lineage(config, student, shards)
    task = get_task(config.task, config.data.answer_type)
    embeddings = read_manifest(run.embeddings, "embeddings") if student.format.writes_rationale else None
    fingerprint = digest_of(
        {
            "version": VERSION,
            "student": student.manifest.digest,
            "shards": shards.manifest.digest,
            "embeddings": embeddings.digest if embeddings else None,
            "task": task.name,
            "settings": scoring_settings(config, student),
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
    set_precision(config, student)
    results, rows = score_samples(
        config, run, student, samples, task, split=split, shards=shards, validation=shards.split("validation")
    )
    publish_evaluation(directory, fingerprint, results, rows, synthetic_of(shards.manifest))
    return results


def publish_evaluation(
    directory: Path,
    fingerprint: str,
    results: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    origin: dict[str, Any] | None = None,
) -> None:
    """Write results.json and samples.jsonl, replacing an older evaluation in `directory`.

    `origin` is what the manifest also says about the rows (`data.shards.synthetic_of`).
    """
    split = results["split"]
    extra = {"split": split, "rows": len(rows), "student": results["student"]["digest"], **(origin or {})}
    with Artefact(directory, "evaluation").publish(fingerprint, extra) as draft:
        write_json(draft.path / RESULTS, results)
        write_text(draft.path / SAMPLES, "".join(canonical_json(row) + "\n" for row in rows))
    log.info(
        "%s on %d %s rows: accuracy %.2f %% (standard error %.2f), %.1f tokens to the answer",
        results["arm"],
        results["rows"],
        split,
        100 * results["accuracy"],
        100 * results["accuracy_stderr"],
        results["tokens_to_answer"]["mean"],
    )


def scoring_settings(config: Config, student: LoadedStudent | None = None) -> dict[str, Any]:
    """The settings that affect the results; with a student also the precision in which it decodes."""
    settings = config.evaluate.model_dump()
    # What is left out keeps evaluations valid that were made before these keys existed.
    if not ARMS[config.arm].chooses_order:
        del settings["think_below"]
    del settings["bf16"]  # `auto` may mean either
    for key in ("batch_tokens", "latency_seconds"):
        if settings[key] == EvaluateConfig.model_fields[key].default:
            del settings[key]
    return settings | ({"bf16": True} if student is not None and _decodes_in_bf16(config, student) else {})


def _decodes_in_bf16(config: Config, student: LoadedStudent) -> bool:
    """Whether to decode in bfloat16: as `evaluate.bf16` says, or with `auto` on a GPU as the student was trained."""
    if config.evaluate.bf16 != "auto":
        return config.evaluate.bf16
    trained = student.manifest.extra.get("bf16", config.train.bf16)
    return student.model.device.type == "cuda" and trained is True


def set_precision(config: Config, student: LoadedStudent) -> None:
    """Convert the student's weights to bfloat16 where it decodes in it."""
    if _decodes_in_bf16(config, student):
        student.model.to(torch.bfloat16)


def check_lineage(config: Config, student: LoadedStudent, shards: ShardSet | None) -> None:
    """Raises StaleError for a student of another arm or of other shards (which are not compared when None)."""
    if student.format.arm != config.arm:
        raise StaleError(
            f"the student here was trained as {student.format.arm}, but the config has arm {config.arm}",
            "name the run directory of that arm, or train again",
            path=student.directory,
        )
    trained_from = student.manifest.extra.get("shards")
    if shards is not None and trained_from is not None and trained_from != shards.manifest.digest:
        raise StaleError(
            "the student was trained from different shards", "run `pst train` again", path=student.directory
        )


def finished_evaluation(directory: Path, fingerprint: str | None = None) -> dict[str, Any] | None:
    """The results of a complete evaluation (with this fingerprint, if given), or None; raises IntegrityError."""
    artefact = Artefact(directory, "evaluation")
    if artefact.verified(fingerprint, remedy="run `pst evaluate` with --rebuild") is None:
        return None
    return read_results(directory / RESULTS)


def is_evaluation_of_other_rows(folder: Path) -> bool:
    """Whether a folder below RUN/eval has scores of rows that are not those of the run."""
    return folder.name not in SPLITS_SCORED and final_name(folder.name) is None and folder.is_dir()


def evaluations_of(run: Path, student: Manifest | None) -> list[dict[str, Any]]:
    """Finished evaluations of exactly this student in a run directory; all of them for None.

    The test split comes first, then validation, then those of other rows by name. Evaluations of an earlier student
    are skipped with a warning. Raises IntegrityError for a damaged one.
    """
    found = []
    others = sorted(folder.name for folder in (run / "eval").glob("*-*") if is_evaluation_of_other_rows(folder))
    for split in (*SPLITS_SCORED, *others):
        results = finished_evaluation(run / "eval" / split)
        if results is None:
            continue
        if student is not None and student_of(results) != student.digest:
            log.warning("skipping %s: it belongs to an older student; run `pst evaluate` again", run / "eval" / split)
            continue
        found.append(results)
    return found


def score_samples(
    config: Config,
    run: RunDir,
    student: LoadedStudent,
    samples: Sequence[ReasoningSample],
    task: Task,
    *,
    split: str,
    shards: ShardSet | None,
    validation: Sequence[ReasoningSample] = (),
    in_shards: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results, one row per sample) of decoding and scoring `samples`; writes nothing.

    `split` names them in the results. `shards` are those of the run, None if they are not here, and `in_shards` says
    whether the samples come from them. On `validation` an adaptive student's threshold is chosen, unless it is set.
    """
    settings, questions = config.evaluate, [student.format.asked(sample) for sample in samples]
    started = time.perf_counter()
    decode = functools.partial(_decode, config, student)
    tasks = [task_of(sample, task) for sample in samples]
    if ARMS[config.arm].chooses_order:

        def right(sample: ReasoningSample, answer: Decoded) -> bool:
            return is_right(task_of(sample, task), student.format, sample, answer)

        decoded, adaptive = adaptive_answers(settings, samples, validation, decode, right)
    else:
        decoded, adaptive = decode(samples), None
    seconds = time.perf_counter() - started
    rows = [
        sample_row(sample, answer, predict(own, student.format, answer), own, student.format)
        for sample, answer, own in zip(samples, decoded, tasks, strict=True)
    ]
    texts = zip(samples, decoded, tasks, strict=True)
    chances = [chance_of(own, [sample]) for sample, own in zip(samples, tasks, strict=True)]
    results = {
        "task": "mixture" if any(sample.part for sample in samples) else task.name,
        "arm": config.arm,
        "variant": variant_of(config),
        "split": split,
        "seed": student.manifest.extra.get("seed", config.seed),
        **score_of(rows),
        "contains_answer": sum(contains_answer(own, d.text, s.answer) for s, d, own in texts) / len(rows),
        "chance": None if None in chances else sum(chance or 0.0 for chance in chances) / len(chances),
        "majority": Counter(sample.answer for sample in samples).most_common(1)[0][1] / len(samples),
        "milliseconds_to_answer": _latency(
            config, student, questions[: settings.latency_rows], adaptive["think_below"] if adaptive else 0.0
        ),
        "rows_per_second": len(rows) / seconds,
        "rationale_similarity": compare_rationales(
            config, run, student, shards, samples, decoded, rows, in_shards=in_shards
        ),
        "explanations": explanations_of(config, student, samples, decoded, rows, tasks),
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "device": _device_name(student),
        "dtype": str(student.model.dtype).removeprefix("torch."),
        "student": {"digest": student.manifest.digest, "step": student.manifest.extra.get("step")},
        "shards": shards.manifest.digest if shards else student.manifest.extra.get("shards", "unknown"),
        "training": _training(run, student),
    }
    if sources := scores_of_sources(samples, rows):
        results["sources"] = sources
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
            [student.format.asked(sample) for sample in samples],
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            max_new_tokens=settings.max_new_tokens,
            given=None
            if settings.rationale == "own"
            else given_rationales(samples, wrong=settings.rationale == "wrong"),
            other=other,
            on_batch=bar.advance,
            on_token=lambda count: bar.advance(0, f"{count} tokens of this batch"),
        )


def _latency(
    config: Config, student: LoadedStudent, questions: Sequence[str | Turns], think_below: float
) -> dict[str, Any] | None:
    """Wall time to the answer in milliseconds, one question at a time; `rows` is the number of questions measured.

    After warming up, at least one question is measured, and no further one once `evaluate.latency_seconds` have passed
    since the first warm-up.
    """
    settings = config.evaluate
    if not questions:
        return None
    ask = functools.partial(timed_answer, student, max_new_tokens=settings.max_new_tokens, think_below=think_below)
    end = time.monotonic() + settings.latency_seconds
    times: list[float] = []
    with progress(f"latency {config.arm}", total=len(questions), unit="questions") as bar:
        for question in questions[:_WARM_UPS]:
            bar.advance(0, "warming up")
            if time.monotonic() < end:
                ask(question)
        for question in questions:
            if times and time.monotonic() >= end:
                break
            times.append(ask(question)[1])
            bar.advance(1)
    if len(times) < len(questions):
        log.info(
            "latency: %d of %d questions measured in evaluate.latency_seconds=%g",
            len(times),
            len(questions),
            settings.latency_seconds,
        )
    return {"median": float(np.median(times)), "p90": float(np.percentile(times, 90)), "rows": len(times)}


def _device_name(student: LoadedStudent) -> str:
    device = student.model.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _training(run: RunDir, student: LoadedStudent) -> dict[str, Any] | None:
    """Steps, seconds and tokens of the training that produced this student; None without its record."""
    record = read_training(run.training)
    if record.get("fingerprint") != student.manifest.fingerprint:
        return None
    return {name: record.get(name) for name in ("steps", "seconds", "tokens", "best_step", "best_value", "metric")}
