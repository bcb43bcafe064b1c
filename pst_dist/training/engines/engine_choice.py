"""Chooses the engine that a config asks for."""

from __future__ import annotations

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.training.engines.deepspeed_engine import DeepSpeedEngine
from pst_dist.training.engines.engine import Engine
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.module import Student


def build_engine(student: Student, train: TrainConfig, ranks: Ranks) -> Engine:
    """The engine the config selects; `check_settings` has refused several ranks without `train.deepspeed`."""
    if train.deepspeed is None:
        return SingleProcessEngine(student, train, ranks)
    return DeepSpeedEngine(student, train, ranks)
