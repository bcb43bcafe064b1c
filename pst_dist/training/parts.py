"""The parts of one training, built once from the config and the shards: rows, order, teacher, tokenizer and student.

They are everything that turns rows into batches and loss, but no engine. `training.trainer` builds the engine around
the student and runs the steps.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet, synthetic_of
from pst_dist.distributed.progress import at, working
from pst_dist.distributed.ranks import Ranks, together
from pst_dist.embedding.targets import open_teacher
from pst_dist.errors import InputError
from pst_dist.student.layout import layout_for
from pst_dist.student.tokenizer import (
    KeptTokenizer,
    build_tokenizer,
    check_marker,
    check_prompt_ending,
)
from pst_dist.training.batching.ahead import StepsAhead
from pst_dist.training.batching.batches import Collator
from pst_dist.training.batching.kept_apart import check_padding_free, warn_of_slow_attention
from pst_dist.training.batching.order import OrderPlan
from pst_dist.training.batching.step_batches import step_batches
from pst_dist.training.engines.dividing import holding_of
from pst_dist.training.fingerprint import settings_digest, training_settings
from pst_dist.training.loss import TermWeights
from pst_dist.training.memory.pass_size import PassSize
from pst_dist.training.module import build_student
from pst_dist.training.result import global_batch_size
from pst_dist.training.validation import Validator


class Parts:
    """The objects of one training; those that depend on the student exist after `make_student`."""

    def __init__(
        self, config: Config, run: RunDir, shards: ShardSet, ranks: Ranks, base: dict[str, Any] | None
    ) -> None:
        """Open rows, teacher and tokenizer; `base` identifies the base model of a LoRA student.

        Raises InputError when the shards lack rows that the config needs.
        """
        self.config, self.run, self.ranks, self.base = config, run, ranks, base
        self.shards_digest, self.synthetic = shards.manifest.digest, synthetic_of(shards.manifest)
        samples = shards.split("train")
        if not len(samples):
            raise InputError("these shards contain no training rows", "set data.train", path=run.shards)
        self.teacher = open_teacher(config, run, shards)
        batch = global_batch_size(config.train, ranks.world_size)
        self.settings = training_settings(config, shards.manifest.digest, self.embeddings_digest, batch, base)
        self.fingerprint = settings_digest(self.settings)
        mixture = tuple((part.rows, part.weight) for part in shards.mixture)
        self.plan = OrderPlan(len(samples), batch, config.seed, mixture)
        self.total = config.train.max_steps or config.train.num_train_epochs * self.plan.steps_per_epoch
        self.weights = TermWeights.of(config.loss, config.arm)  # `share.held` replaces the alignment's
        self.samples = samples
        if self.teacher is not None and config.loss.alignment == "info_nce":
            _ = samples.candidates  # before the loader's workers are forked
        kept = KeptTokenizer(run.tokenizer, shards.manifest.digest)
        self.tokenizer = build_tokenizer(config.student, samples, kept)
        if config.train.early_stopping_patience is not None and not len(shards.split("validation")):
            raise InputError(
                "train.early_stopping_patience needs validation rows", "set data.validation or data.validation_size"
            )
        self.validation_samples = shards.split("validation")

    @property
    def embeddings_digest(self) -> str | None:
        """Digest of the embeddings' manifest; None for an arm without alignment."""
        return self.teacher.digest if self.teacher else None

    def make_student(self) -> None:
        """Build the student, and what depends on its architecture; collective."""
        holding, width = holding_of(self.config.train, self.ranks), self.teacher.dimension if self.teacher else None
        torch.manual_seed(self.config.seed)
        at("building the student")
        # Where ranks divide the weights, building is full of collectives, and a rank that fails ends the others.
        with contextlib.nullcontext() if holding.divides else together(self.ranks), working():
            self.student = build_student(self.config, self.tokenizer, width, holding)
        with together(self.ranks), working():
            self._lay_out()

    def _lay_out(self) -> None:
        """Build what turns rows into batches for this student, after checking that the student can take them."""
        config = self.config
        if config.train.padding_free:
            check_padding_free(is_encoder_decoder=self.student.is_encoder_decoder)
            if self.ranks.is_main:
                warn_of_slow_attention(self.student.model)
        check_prompt_ending(self.tokenizer, is_encoder_decoder=self.student.is_encoder_decoder)
        asked = ARMS[config.arm].asked
        if any(one.thinks_first for one in asked):
            check_marker(self.tokenizer, config.layout.answer_marker)
        self.layout = layout_for(config, self.tokenizer, is_encoder_decoder=self.student.is_encoder_decoder)
        self.collate = Collator(
            loss=config.loss,
            pad_id=self.tokenizer.pad_token_id,
            decoder_start_id=self.student.decoder_start_id,
            teacher=self.teacher,
            capacity=config.train.per_device_train_batch_size * len(asked),
            padding_free=config.train.padding_free,
        )
        self.validator = Validator(
            config, self.validation_samples, self.layout, self.collate, self.tokenizer, self.ranks
        )

    def batches_from(self, first_step: int, size: PassSize) -> StepsAhead:
        """This rank's batches of each step after `first_step`, cut into passes of this size."""
        workers = self.config.train.dataloader_num_workers
        steps = step_batches(
            self.plan,
            self.samples,
            self.layout,
            self.collate,
            first_step=first_step,
            last_step=self.total,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            micro_batch_size=size.rows,
            by_length=size.by_length,
            workers=workers,
        )
        return StepsAhead(steps, in_thread=workers == 0)
