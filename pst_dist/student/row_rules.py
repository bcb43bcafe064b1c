"""What a student decides about the rows of its run, for the stage that packs them (`data.packing`)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.packing import StudentRules
from pst_dist.models.locate import WEIGHT_SUFFIXES, locate_model
from pst_dist.storage.stamps import stamp_of
from pst_dist.student.prompt import keeps_turns
from pst_dist.student.unreadable import is_here, unreadable_rows


def student_rules(config: Config) -> StudentRules:
    """The rules of the student that a config describes; loads no tokenizer."""
    return StudentRules(
        unreadable=functools.partial(unreadable_rows, config),
        tokenizer=_tokenizer_stamps(config),
        keeps_turns=keeps_turns(config),
    )


def _tokenizer_stamps(config: Config) -> Any:
    """The files of a pretrained student on this machine that decide whether it can read a row (`unreadable_rows`)."""
    if config.student.model_name_or_path is None or not is_here(config):
        return None
    place = locate_model(config.student.model_name_or_path, config.student.revision)
    folder = Path(place.target)
    if place.gguf is not None:
        return stamp_of(folder / place.gguf)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [[path.name, stamp_of(path)] for path in files if path.suffix not in WEIGHT_SUFFIXES]
