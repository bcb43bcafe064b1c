"""What can be known to fail later, found before the first stage of a run: student, layout, encoder, split, ranks.

Cheap on purpose: configs, tokenizers and the headers of weight files are read, models are built without memory (on
torch's meta device), weights are not. What only the weights or the rows can tell is refused where they are read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import expand_arms
from pst_dist.config.schema import Config
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import DataError

_OTHER = {"test": "validation", "validation": "test"}


def preflight(config: Config) -> None:
    """Raise the error that a later stage of `pst run` would end with, as far as it can be known now; writes nothing.

    ConfigError for settings that contradict the student, InputError or EnvironmentFault for a student or encoder that
    cannot be loaded, DataError for a split that is to be scored and has no rows.
    """
    check_split(config)
    if config.train.backend != "ray":
        from pst_dist.distributed.ranks import Ranks, check_meeting_place

        check_meeting_place(Ranks.from_environment())
    if config.train.backend != "ray" or _is_here(config):
        check_student(config)
    if needs_embeddings(config):
        from pst_dist.embedding.encoder import check_encoder

        check_encoder(config.embed)


def _is_here(config: Config) -> bool:
    """Whether this machine, which only drives Ray's workers, can load the student: they may have what it lacks."""
    name = config.student.model_name_or_path
    has_libraries = all(importlib.util.find_spec(module) is not None for module in ("torch", "transformers"))
    return has_libraries and (name is None or Path(name).expanduser().exists())


def check_split(config: Config) -> None:
    """Raise DataError when no rows are given for the split that is to be scored."""
    split, data = config.evaluate.split, config.data
    if data.split_file is None and getattr(data, split) is None and not getattr(data, f"{split}_size"):
        raise no_rows(split)


def no_rows(split: str) -> DataError:
    """The error for a split that is to be scored and is empty."""
    return DataError(
        f"there are no {split} rows to score the student on",
        f"give data.{split} or data.{split}_size, or evaluate.split={_OTHER[split]}",
    )


def check_student(config: Config) -> None:
    """Raise what loading the student, and laying out rows for it, would raise for every arm of the config."""
    from pst_dist.logs import quiet_libraries
    from pst_dist.student.layout import layout_for
    from pst_dist.student.pretrained import build_without_weights
    from pst_dist.student.tokenizer import build_tokenizer, check_marker, check_prompt_ending

    quiet_libraries()
    # Without rows a fresh tokenizer knows bytes only, which is all that the checks below ask of it.
    tokenizer: Any = build_tokenizer(config.student, ())
    seq2seq = build_without_weights(config, tokenizer)
    check_prompt_ending(tokenizer, is_encoder_decoder=seq2seq)
    for arm in expand_arms(config):
        layout = layout_for(arm, tokenizer, is_encoder_decoder=seq2seq)
        layout.prompt_ids("a")
        if any(asked.thinks_first for asked in ARMS[arm.arm].asked):
            check_marker(tokenizer, config.layout.answer_marker)
