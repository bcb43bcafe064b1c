"""Scores a trained student on held-out rows: accuracy, tokens and milliseconds to the answer, rationale similarity.

The text before the stop token is scored, not the last number in the whole text. Results are tied to the digests of
student and rows, so the same evaluation never runs twice. `data.tasks` turns text into an answer, `student.generate`
generates it, `scores` counts, `compare` compares evaluations.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, fetch_data, run_dir
from pst_dist.config.schema import Config, EvaluateConfig
from pst_dist.config.variant import variant_of
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet, synthetic_of
from pst_dist.data.tasks import Task, get_task, task_of
from pst_dist.errors import InputError, StaleError
from pst_dist.evaluation.adaptive import adaptive_answers
from pst_dist.evaluation.batches import Done, remove_batches
from pst_dist.evaluation.decoder import Decoder, Executor, InProcess, set_precision
from pst_dist.evaluation.explanations import explanations_of
from pst_dist.evaluation.records import read_results, read_training, student_of
from pst_dist.evaluation.scores import (
    chance_of,
    contains_answer,
    rows_to_score,
    sample_row,
    score_of,
    scores_of_sources,
)
from pst_dist.evaluation.similarity import compare_rationales
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
from pst_dist.student.contexts import Decoded
from pst_dist.student.generate import is_right, predict
from pst_dist.student.saved import LoadedStudent, load_student

log = logging.getLogger(__name__)
RESULTS, SAMPLES = "results.json", "samples.jsonl"
VERSION = 1
"""Part of every fingerprint: raised when the same inputs would be scored differently."""
SPLITS_SCORED = ("test", "validation")
"""The run's own splits; every other folder below RUN/eval has the scores of other rows."""
DECODING = ".decoding"
"""Folder of a run with the batches of evaluations that are not finished."""


def evaluate(config: Config, *, rebuild: bool = False, executor: Executor | None = None) -> dict[str, Any]:
    """Decode and score one split; writes results.json and samples.jsonl into the run and returns the results.

    `executor` decodes, this process when not given. A finished evaluation of the same student, rows and settings is
    read back instead, unless `rebuild`; one that was killed continues. Raises InputError when there is no student or
    nothing to score, StaleError when the student belongs to another arm or was trained from other shards.
    """
    run, split = run_dir(config), config.evaluate.split
    executor = executor or InProcess()
    student = load_student(run.best, executor.device)
    fetch_data(config)
    shards = ShardSet.open(run.shards)
    check_lineage(config, student, shards)
    task = get_task(config.task, config.data.answer_type)
    embeddings = read_manifest(run.embeddings, "embeddings") if student.format.writes_rationale else None

    def fingerprint(bf16: bool) -> str:
        return digest_of(
            {
                "version": VERSION,
                "student": student.manifest.digest,
                "shards": shards.manifest.digest,
                "embeddings": embeddings.digest if embeddings else None,
                "task": task.name,
                "settings": scoring_settings(config, bf16=bf16),
            }
        )

    directory = run.evaluation(split)
    if not rebuild and (results := finished(config, student, executor, directory, fingerprint)) is not None:
        return results
    samples = rows_to_score(shards.split(split), config.evaluate.max_rows)
    if not samples:
        raise InputError(
            f"there are no {split} rows in these shards",
            f"set data.{split} or data.{split}_size and run `pst shard` again",
            path=run.shards,
        )
    refuse_foreign_folder(directory, "evaluation")  # before the decoding
    decoder = decoder_of(config, student, executor, directory, fingerprint, rebuild=rebuild)
    results, rows = score_samples(
        config, run, decoder, samples, task, split=split, shards=shards, validation=shards.split("validation")
    )
    publish_evaluation(directory, decoder, results, rows, synthetic_of(shards.manifest))
    return results


def finished(
    config: Config, student: LoadedStudent, executor: Executor, directory: Path, fingerprint: Callable[[bool], str]
) -> dict[str, Any] | None:
    """The results in `directory` if they are those of this evaluation in a precision that the executor may use."""
    for bf16 in executor.may_use_bf16(config, student):
        if (done := finished_evaluation(directory, fingerprint(bf16))) is not None:
            log.info("evaluation of %s is complete, nothing to do", directory)
            remove_batches(_batches(config, directory))  # where a command was killed after writing the scores
            return done
    return None


def decoder_of(
    config: Config,
    student: LoadedStudent,
    executor: Executor,
    directory: Path,
    fingerprint: Callable[[bool], str],
    *,
    rebuild: bool,
) -> Decoder:
    """What decodes an evaluation, with the batches that an earlier command decoded unless `rebuild`."""
    set_precision(config, student)
    possible = executor.may_use_bf16(config, student)
    found = fingerprint(possible[0] if len(possible) == 1 else executor.place(config, student).bf16)
    done = Done(_batches(config, directory) / found[:16])
    if rebuild:
        done.remove()
    return Decoder(config, student, executor, done, found)


def _batches(config: Config, directory: Path) -> Path:
    """Where the batches of an evaluation are until its scores are written."""
    return run_dir(config).path / DECODING / directory.name


def publish_evaluation(
    directory: Path,
    decoder: Decoder,
    results: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    origin: dict[str, Any] | None = None,
) -> None:
    """Write results.json and samples.jsonl, replacing an older evaluation in `directory`.

    `origin` is what the manifest also says about the rows (`data.shards.synthetic_of`).
    """
    split = results["split"]
    extra = {"split": split, "rows": len(rows), "student": results["student"]["digest"], **(origin or {})}
    with Artefact(directory, "evaluation").publish(decoder.fingerprint, extra) as draft:
        write_json(draft.path / RESULTS, results)
        write_text(draft.path / SAMPLES, "".join(canonical_json(row) + "\n" for row in rows))
    decoder.forget()
    log.info(
        "%s on %d %s rows: accuracy %.2f %% (standard error %.2f), %.1f tokens to the answer",
        results["arm"],
        results["rows"],
        split,
        100 * results["accuracy"],
        100 * results["accuracy_stderr"],
        results["tokens_to_answer"]["mean"],
    )


def scoring_settings(config: Config, *, bf16: bool = False) -> dict[str, Any]:
    """The settings that affect the results; `bf16` says whether the student decodes in it."""
    settings = config.evaluate.model_dump()
    # What is left out keeps evaluations valid that were made before these keys existed.
    if not ARMS[config.arm].chooses_order:
        del settings["think_below"]
    del settings["bf16"]  # `auto` may mean either
    del settings["backend"], settings["ray"]  # the answers are the same
    for key in ("batch_tokens", "latency_seconds"):
        if settings[key] == EvaluateConfig.model_fields[key].default:
            del settings[key]
    return settings | ({"bf16": True} if bf16 else {})


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
    decoder: Decoder,
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
    settings, student = config.evaluate, decoder.student
    tasks = [task_of(sample, task) for sample in samples]
    if ARMS[config.arm].chooses_order:

        def right(sample: ReasoningSample, answer: Decoded) -> bool:
            return is_right(task_of(sample, task), student.format, sample, answer)

        decoded, adaptive = adaptive_answers(settings, samples, validation, decoder.answers, right)
    else:
        decoded, adaptive = decoder.answers(samples), None
    place = decoder.place
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
        "milliseconds_to_answer": decoder.latency(
            samples[: settings.latency_rows], adaptive["think_below"] if adaptive else 0.0
        ),
        "rows_per_second": len(rows) / decoder.seconds,
        "rationale_similarity": compare_rationales(
            config, run, decoder, shards, samples, decoded, rows, in_shards=in_shards
        ),
        "explanations": explanations_of(config, decoder, samples, decoded, rows, tasks),
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "device": place.device,
        "dtype": "bfloat16" if place.bf16 else str(student.model.dtype).removeprefix("torch."),
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


def _training(run: RunDir, student: LoadedStudent) -> dict[str, Any] | None:
    """Steps, seconds and tokens of the training that produced this student; None without its record."""
    record = read_training(run.training)
    if record.get("fingerprint") != student.manifest.fingerprint:
        return None
    return {name: record.get(name) for name in ("steps", "seconds", "tokens", "best_step", "best_value", "metric")}
