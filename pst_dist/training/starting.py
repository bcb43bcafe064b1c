"""The steps of a training before it builds its student: check folders, fix `auto` settings, identify the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet
from pst_dist.distributed.progress import working
from pst_dist.distributed.ranks import Ranks, from_main, main_first_errors
from pst_dist.embedding.targets import open_teacher
from pst_dist.models.identity import files_of_identity, identity_of
from pst_dist.storage.atomic import remove_directory
from pst_dist.storage.outputs import refuse_foreign_folder
from pst_dist.student.pretrained import base_place
from pst_dist.student.tokenizer import KeptTokenizer, build_tokenizer
from pst_dist.training.begun import begun_settings, settled
from pst_dist.training.checkpoints.verifying import digests_together
from pst_dist.training.precision import suits_bf16, with_precision


def settled_here(config: Config, run: RunDir) -> Config:
    """The config without `auto`, as the training here began or as its student needs it; on rank zero."""
    shards = ShardSet.open(run.shards, verify=False)
    rows, kept = shards.split("train"), KeptTokenizer(run.tokenizer, shards.manifest.digest)
    config = settled(config, begun_settings(run), lambda: build_tokenizer(config.student, rows, kept))
    return with_precision(config, run, lambda: suits_bf16(config, rows))


def base_on_all(config: Config, ranks: Ranks) -> dict[str, Any] | None:
    """`base_of` the student, with the files of its weights hashed by all ranks; collective."""
    place, identity = None, None
    with main_first_errors(ranks), working():
        place = base_place(config.student) if ranks.is_main else None
    place = from_main(place)
    if place is None:
        return None
    files: list[Path] = []
    with main_first_errors(ranks):
        files = files_of_identity(place) if ranks.is_main else []
    digests = digests_together(from_main(files), ranks)
    with main_first_errors(ranks), working():
        identity = identity_of(place, digests) if ranks.is_main else None
    return from_main(identity)


def prepare(config: Config, run: RunDir, shards: ShardSet) -> None:
    """Do once on each machine what its other ranks then find done: compare vectors, train a tokenizer, make indexes."""
    rows = shards.split("train")
    teacher = open_teacher(config, run, shards)
    build_tokenizer(config.student, rows, KeptTokenizer(run.tokenizer, shards.manifest.digest))
    if teacher is not None and config.loss.alignment == "info_nce":
        _ = rows.candidates


def refuse_foreign_folders(run: RunDir) -> None:
    """Raises InputError, before hours of training, when a folder that it replaces contains files that pst did not
    write."""
    refuse_foreign_folder(run.checkpoints, "checkpoints")
    refuse_foreign_folder(run.best, "student")


def forget_training(run: RunDir) -> None:
    """Remove an earlier training from a run directory."""
    for folder in (run.checkpoints, run.best):
        remove_directory(folder)
    for file in (run.training, run.metrics):
        file.unlink(missing_ok=True)
