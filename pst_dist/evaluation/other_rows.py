"""Score a trained student on rows that are not those of its run: `pst evaluate RUN data.test=other.jsonl`.

The rows are read by the rules of `pst check` and scored by `evaluate`, into a folder of their own below RUN/eval whose
name has the digest of the rows and the task. The run's own scores, shards and saved config stay as they are.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, fetch_data, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample, normalise_question
from pst_dist.data.shards import ShardSet
from pst_dist.data.sources import LoadedData, load_data
from pst_dist.data.sources.compressed import data_stem
from pst_dist.data.tasks import get_task
from pst_dist.errors import ConfigError, DataError, InputError
from pst_dist.evaluation.adaptive import chosen_threshold
from pst_dist.evaluation.decoder import Executor, InProcess
from pst_dist.evaluation.evaluate import (
    VERSION,
    check_lineage,
    decoder_of,
    evaluations_of,
    finished,
    publish_evaluation,
    score_samples,
    scoring_settings,
)
from pst_dist.evaluation.scores import rows_to_score, score_of
from pst_dist.storage.manifest import MANIFEST, digest_of, read_manifest
from pst_dist.storage.outputs import refuse_foreign_folder
from pst_dist.student.saved import LoadedStudent, load_student
from pst_dist.student.unreadable import unreadable_rows
from pst_dist.text.redaction import redact_values
from pst_dist.text.urls import place_name

log = logging.getLogger(__name__)


def evaluate_rows(config: Config, *, rebuild: bool = False, executor: Executor | None = None) -> dict[str, Any]:
    """Decode and score the rows of `config.data.test` with a run's student; returns the results.

    Besides what `evaluate` returns they have `source`: where the rows came from, their digest, what was left out, and
    how many of the questions are also in the training rows, with the accuracy on the others. A finished evaluation of
    the same student, rows and settings is read back, unless `rebuild`.

    Raises ConfigError for a task that does not fit the answer type and for evaluate.split=validation, DataError and
    InputError as reading the rows does, and otherwise as `evaluate`.
    """
    if config.evaluate.split != "test":
        raise ConfigError(
            f"evaluate.split={config.evaluate.split} has no effect when data.test names the rows", "leave it out"
        )
    run = run_dir(config)
    task = get_task(config.task, config.data.answer_type)
    loaded = load_data(_only_these_rows(config), unreadable_rows(config))
    samples = rows_to_score(loaded.splits["test"], config.evaluate.max_rows)
    if not samples:
        raise DataError("none of the rows can be scored", "run `pst check` on them", path=_first_spec(config))
    executor = executor or InProcess()
    student = load_student(run.best, executor.device)
    shards = _shards_of(config, run)
    check_lineage(config, student, shards)
    digest = digest_of({"task": task.name, "rows": [sample.to_json() for sample in loaded.splits["test"]]})
    name = f"{_stem(config)}-{digest[:8]}"
    directory = run.evaluation(name)
    left_out = _left_out(loaded)
    fingerprint = functools.partial(_fingerprint, config, run, student, shards, [digest, left_out])
    if not rebuild and (done := finished(config, student, executor, directory, fingerprint)) is not None:
        return done
    refuse_foreign_folder(directory, "evaluation")
    config = _with_threshold(config, run, student)
    decoder = decoder_of(config, student, executor, directory, fingerprint, rebuild=rebuild)
    results, rows = score_samples(config, run, decoder, samples, task, split=name, shards=shards, in_shards=False)
    results["source"] = {"rows": redact_values(_specs(config)), "digest": digest, **left_out}
    results["source"] |= _overlap(samples, rows, shards)
    publish_evaluation(directory, decoder, results, rows)
    return results


def _only_these_rows(config: Config) -> Config:
    """The config of reading nothing but data.test, with every row kept that can be scored."""
    only = {
        **{"train": None, "validation": None, "split_file": None, "teacher_completions": None},
        **{"keep": "all", "leaks": "keep", "wrong_rationales": 0, "max_rows": None},
    }
    return config.model_copy(update={"data": config.data.model_copy(update=only)})


def _specs(config: Config) -> list[str]:
    found = config.data.test
    return [found] if isinstance(found, str) else list(found or [])


def _first_spec(config: Config) -> str | None:
    return next(iter(_specs(config)), None)


def _stem(config: Config) -> str:
    """The beginning of the folder's name: the file's, or that of the first of several."""
    specs = _specs(config)
    word = specs[0].partition("?")[0] if specs[0].startswith("gen:") else specs[0]
    name = word if word.startswith(("hf:", "gen:")) else data_stem(place_name(word))
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40].strip("-") or "rows"
    return plain if len(specs) == 1 else f"{plain}-and-{len(specs) - 1}-more"


def _shards_of(config: Config, run: RunDir) -> ShardSet | None:
    """The run's own shards; None, with a warning, where only the student was copied."""
    if run.remote is None and not (run.shards / MANIFEST).is_file():
        log.warning("no shards in %s: cannot count the questions that are also in the training rows", run.shards)
        return None
    fetch_data(config)
    return ShardSet.open(run.shards)


def _fingerprint(
    config: Config, run: RunDir, student: LoadedStudent, shards: ShardSet | None, rows: Any, bf16: bool
) -> str:
    compared = shards is not None and student.format.writes_rationale
    embeddings = read_manifest(run.embeddings, "embeddings") if compared else None
    return digest_of(
        {
            "version": VERSION,
            "student": student.manifest.digest,
            "shards": shards.manifest.digest if shards else None,
            "embeddings": embeddings.digest if embeddings else None,
            "rows": rows,
            "settings": scoring_settings(config, bf16=bf16),
        }
    )


def _with_threshold(config: Config, run: RunDir, student: LoadedStudent) -> Config:
    """The config with the threshold that an adaptive student's own evaluation chose, unless one is set.

    Other rows must not choose it: it would then be fitted to the rows on which it is scored. Raises InputError when
    none was chosen yet.
    """
    if not ARMS[config.arm].chooses_order or config.evaluate.think_below is not None:
        return config
    chosen = chosen_threshold(evaluations_of(run.path, student.manifest))
    if chosen is None:
        raise InputError(
            "no threshold has been chosen for this adaptive student",
            "run `pst evaluate` on the run's own rows first, or set evaluate.think_below",
            path=run.path,
        )
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"think_below": chosen})})


def _left_out(loaded: LoadedData) -> dict[str, Any]:
    """Rows read, bad ones, repeated ones, and the column map of each file."""
    report = loaded.report
    return {
        "rows_read": report["test_read"],
        "bad_rows": report["bad_rows"],
        "duplicates": report["test_duplicates"],
        "columns": report["columns"],
        "file_digest": loaded.source_digest,
    }


def _overlap(
    samples: Sequence[ReasoningSample], rows: Sequence[dict[str, Any]], shards: ShardSet | None
) -> dict[str, Any]:
    """How many questions are also in the training rows, and the scores of the others; marks them in `rows`.

    `unseen` is None when no question is in the training rows, or all are, or the training rows are not known.
    """
    if shards is None:
        return {"in_training": None, "unseen": None}
    known = {normalise_question(sample.question) for sample in shards.split("train")}
    for sample, row in zip(samples, rows, strict=True):
        row["in_training"] = normalise_question(sample.question) in known
    unseen = [row for row in rows if not row["in_training"]]
    count = len(rows) - len(unseen)
    if count:
        log.warning("%d of %d questions are also in the training rows", count, len(rows))
    scores = score_of(unseen) if unseen and count else None
    names = ("rows", "correct", "accuracy", "accuracy_stderr")
    return {"in_training": count, "unseen": {name: scores[name] for name in names} if scores else None}
