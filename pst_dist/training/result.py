"""The result of a training, and whether the training that a config describes is already complete."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pst_dist.config.run_dir import RunDir, run_dir
from pst_dist.config.schema import Config, TrainConfig
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.targets import open_teacher
from pst_dist.errors import IntegrityError, StaleError
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.json_files import read_typed
from pst_dist.student.pretrained import base_of
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.begun import begun_settings, settled
from pst_dist.training.fingerprint import differing, settings_digest, training_settings
from pst_dist.training.precision import with_precision

log = logging.getLogger(__name__)


def global_batch_size(train: TrainConfig, world_size: int) -> int:
    """Samples of one optimizer step over all ranks."""
    if train.global_batch_size is not None:
        return train.global_batch_size
    return train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * world_size


@dataclass(frozen=True)
class TrainingResult:
    """What `train` returns; also `train.json` in the run directory."""

    fingerprint: str
    shards: str
    """Digest of the shards' manifest."""
    embeddings: str | None
    """Digest of the embeddings' manifest; None for an arm without alignment."""
    steps: int
    seconds: float
    """Training time over all starts, without validation and checkpoints."""
    tokens: int
    best_step: int
    best_value: float | None
    """The metric of the best step; None when there were no validation rows."""
    metric: str
    settings: dict[str, Any] | None = None
    """The settings behind the fingerprint; None in records of older versions."""


def recorded_training(run: RunDir) -> TrainingResult | None:
    """The result of the finished training in a run directory, with any settings, or None."""
    path = run.training
    if not path.is_file() or not Artefact(run.best, "student").is_intact():
        return None
    try:
        return read_typed(path, TrainingResult)
    except IntegrityError as error:
        log.warning("the record of the training is damaged and will be rewritten: %s", error)
        return None


def refuse_other_student(run: RunDir, found: TrainingResult, settings: Mapping[str, Any]) -> None:
    """Raise StaleError when training with these settings would replace the finished student, which has others.

    Where there are checkpoints, resuming decides what a changed setting means. Without them (`keep=student` of an
    experiment, or someone freed the disk) nothing else would stop a new training from overwriting the student.
    """
    if any(run.checkpoints.glob("checkpoint-*")):
        return
    if found.settings is None:
        what = "the finished student was trained with other settings, which its record does not list"
    else:
        saved, wanted = differing(found.settings, settings)
        what = f"the finished student was trained with {saved}, this run has {wanted}"
    remedy = "restore the setting, choose another output_dir, or train a new student with --rebuild"
    raise StaleError(what, remedy, path=run.training)


def complete_training(config: Config, world_size: int) -> TrainingResult | None:
    """The complete training that `train` would find for this config, or None; builds no student, starts no rank."""
    run = run_dir(config)
    shards = ShardSet.open(run.shards)
    teacher = open_teacher(config, run, shards)
    if not run.training.is_file():
        return None
    own = settled(config, begun_settings(run), lambda: build_tokenizer(config.student, shards.split("train")))
    own = with_precision(own, run)
    batch = global_batch_size(config.train, world_size)
    base = base_of(own.student) if own.student.lora.rank else None
    settings = training_settings(own, shards.manifest.digest, teacher.digest if teacher else None, batch, base)
    result = recorded_training(run)
    return result if result is not None and result.fingerprint == settings_digest(settings) else None
