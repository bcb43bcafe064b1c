"""What training refuses in a config, found before the first stage of a run and again when training starts."""

from __future__ import annotations

from pst_dist.config.schema import Config
from pst_dist.config.zero import zero_stage
from pst_dist.distributed.ranks import Ranks, device_of
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import ConfigError
from pst_dist.student.pretrained import StudentShape
from pst_dist.training.batching.kept_apart import check_padding_free
from pst_dist.training.engines.deepspeed_config import deepspeed_settings
from pst_dist.training.engines.optimizer import check_optimizer
from pst_dist.training.module import check_layer
from pst_dist.training.precision import check_fp16


def check_settings(config: Config, ranks: Ranks) -> None:
    """Raise the error with which training would refuse its engine, precision or optimizer on this machine.

    ConfigError, or EnvironmentFault for a package that is missing.
    """
    train = config.train
    if train.deepspeed is not None:
        deepspeed_settings(train, ranks.world_size)
        if train.metric_for_best_model == "accuracy" and zero_stage(train.deepspeed) == 3:
            raise ConfigError(
                "train.metric_for_best_model=accuracy decodes on each rank, but ZeRO-3 splits the weights over ranks",
                "set it to answer_nll, or train.deepspeed to zero2",
            )
    elif ranks.world_size > 1:
        raise ConfigError(f"{ranks.world_size} ranks but train.deepspeed is not set", "set it to zero1, zero2 or zero3")
    check_optimizer(train)
    if train.fp16:  # else leave the GPU alone until training needs it
        check_fp16(train, device_of(ranks))


def check_shape(config: Config, shape: StudentShape) -> None:
    """Raise ConfigError for settings of training that do not fit the student."""
    if config.train.padding_free:
        check_padding_free(is_encoder_decoder=shape.is_encoder_decoder)
    if config.loss.layer is not None and shape.layers is not None and needs_embeddings(config):
        check_layer(config.loss.layer, shape.layers)
