"""Chooses the engine that a config asks for."""

from __future__ import annotations

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.errors import ConfigError
from pst_dist.training.engines.deepspeed_engine import DeepSpeedEngine
from pst_dist.training.engines.engine import Engine
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.module import Student


def build_engine(student: Student, train: TrainConfig, ranks: Ranks) -> Engine:
    """The engine the config selects; raises ConfigError for several ranks without `train.deepspeed`."""
    if train.deepspeed is None:
        if ranks.world_size > 1:
            raise ConfigError(
                f"{ranks.world_size} ranks but train.deepspeed is not set", "set it to zero1, zero2 or zero3"
            )
        return SingleProcessEngine(student, train, ranks)
    return DeepSpeedEngine(student, train, ranks)
