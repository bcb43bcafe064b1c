"""Checks before the first stage of a run for errors of later stages: student, layout, encoder, split, ranks.

The checks are cheap: they read configs, tokenizers and the headers of weight files, and build models on torch's meta
device without memory, but read no weights. Errors in weights or rows are found where these are read.
"""

from __future__ import annotations

from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import expand_arms, run_dir
from pst_dist.config.schema import Config
from pst_dist.config.zero import find_deepspeed_json
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import DataError

_OTHER = {"test": "validation", "validation": "test"}


def preflight(config: Config) -> None:
    """Raise the error with which a later stage of `pst run` would fail, if it can be detected now; writes nothing.

    ConfigError for settings that contradict the student, InputError or EnvironmentFault for a student or encoder that
    cannot be loaded, DataError if the split to score has no rows.
    """
    check_split(config)
    if config.train.deepspeed is not None:
        find_deepspeed_json(config.train.deepspeed)
    if config.train.backend != "ray":
        from pst_dist.distributed.ranks import Ranks, check_meeting_place
        from pst_dist.training.early_checks import check_settings

        ranks = Ranks.from_environment()
        check_meeting_place(ranks)
        if not all(run_dir(arm).training.is_file() for arm in expand_arms(config)):
            check_settings(config, ranks)
    if config.train.backend != "ray" or _has_student(config):
        check_student(config)
    if needs_embeddings(config):
        from pst_dist.embedding.encoder_model import check_encoder

        check_encoder(config.embed)


def _has_student(config: Config) -> bool:
    """Whether this machine, which only drives Ray workers, can load the student; it may lack what the workers have."""
    from pst_dist.student.unreadable import is_here

    return is_here(config)


def check_split(config: Config) -> None:
    """Raise DataError when no rows are given for the split to score."""
    split, data = config.evaluate.split, config.data
    cut = data.split_file or getattr(data, f"{split}_size")
    cut = cut or any(source.split_file or getattr(source, f"{split}_size") for source in data.mixture)
    if not cut and not data.specs(split):
        raise no_rows(split)


def no_rows(split: str) -> DataError:
    """The error for an empty split that should be scored."""
    return DataError(
        f"there are no {split} rows to score the student on",
        f"set data.{split} or data.{split}_size, or evaluate.split={_OTHER[split]}",
    )


def check_student(config: Config) -> None:
    """Raise what loading the student, and laying out rows for it, would raise for every arm of the config."""
    from pst_dist.logs import quiet_libraries
    from pst_dist.student.layout import layout_for
    from pst_dist.student.pretrained import build_without_weights
    from pst_dist.student.tokenizer import build_tokenizer, check_marker, check_prompt_ending
    from pst_dist.training.early_checks import check_shape

    quiet_libraries()
    # Without rows a fresh tokenizer only knows bytes, which is enough for the checks below.
    tokenizer: Any = build_tokenizer(config.student, ())
    shape = build_without_weights(config, tokenizer)
    check_prompt_ending(tokenizer, is_encoder_decoder=shape.is_encoder_decoder)
    for arm in expand_arms(config):
        check_shape(arm, shape)
        layout = layout_for(arm, tokenizer, is_encoder_decoder=shape.is_encoder_decoder)
        layout.prompt_ids("a")
        if any(asked.thinks_first for asked in ARMS[arm.arm].asked):
            check_marker(tokenizer, config.layout.answer_marker)
