"""Scores the student on the validation rows and keeps the best one so far in `best`, a plain Hugging Face folder.

`train.metric_for_best_model` says what is compared. Without validation rows every student counts as the best, so the
last one is kept. `training.validation` computes the scores; `training.loop` decides when to validate.
"""

from __future__ import annotations

import math
import time
from typing import Any

from pst_dist.distributed.progress import at, working
from pst_dist.distributed.ranks import main_first_errors, together
from pst_dist.student.saved import save_student
from pst_dist.training.bad_steps import diverged_validation
from pst_dist.training.checkpoints.state import RunState, advanced
from pst_dist.training.engines.engine import Engine
from pst_dist.training.fingerprint import choosing_metric
from pst_dist.training.memory.pass_size import PassSize
from pst_dist.training.parts import Parts
from pst_dist.training.reporting.metrics import MetricsLog
from pst_dist.training.share import held
from pst_dist.training.validation import ValidationScore, is_better


class BestStudent:
    """Validates the student of an engine, and writes it to `best` when no earlier one was better."""

    def __init__(self, parts: Parts, engine: Engine, size: PassSize) -> None:
        self.parts, self.engine, self.size = parts, engine, size

    def validate(self, state: RunState, metrics: MetricsLog) -> RunState:
        """Score the validation rows, keep the student if it is the best so far, and return the state; collective.

        Raises DivergedError on all ranks when the loss is not finite.
        """
        at("validation", state.step)
        started = time.monotonic()
        value = self.score(state)
        if value.loss is not None and not math.isfinite(value.loss):
            raise diverged_validation(value.loss, state.step)
        metrics.validation(state.step, value, seconds=time.monotonic() - started)
        with together(self.parts.ranks):
            metrics.answers(state.step, self.parts.validator.sample_answers(self.engine))
        metric = choosing_metric(self.parts.config)
        chosen = value.chosen(metric)
        if chosen is not None and state.best_value is not None and not is_better(metric, chosen, state.best_value):
            return state
        improved = chosen is None or chosen != state.best_value
        state = advanced(
            state,
            best_value=chosen,
            best_step=state.step,
            improved_step=state.step if improved else state.improved_step,
        )
        self.keep(state, value)
        return state

    def score(self, state: RunState) -> ValidationScore:
        """The validation scores with the term weights of this state; collective."""
        parts = self.parts
        return parts.validator.score(self.engine, held(parts.weights, parts.config.loss, state), self.size)

    def keep(self, state: RunState, value: ValidationScore) -> None:
        """Write the current student as the best one; collective."""
        parts = self.parts
        at("keeping the student", state.step)
        with main_first_errors(parts.ranks), working():
            weights = self.engine.full_weights(parts.run.path)
        with main_first_errors(parts.ranks), working():
            if parts.ranks.is_main:
                save_student(
                    parts.student.model,
                    weights,
                    parts.tokenizer,
                    parts.layout.format,
                    parts.run.best,
                    fingerprint=parts.fingerprint,
                    extra={"step": state.step, **self._origin(), **value.to_json()},
                )

    def _origin(self) -> dict[str, Any]:
        """What the student was trained from, for its record."""
        parts, config = self.parts, self.parts.config
        return {
            "arm": config.arm,
            "seed": config.seed,
            "shards": parts.shards_digest,
            "embeddings": parts.embeddings_digest,
            "base_model": config.student.model_name_or_path,
            "base": parts.base,
            "new_token_init": config.student.new_token_init,
            "bf16": config.train.bf16,
            "loss": config.loss.model_dump(mode="json"),
            **parts.synthetic,
        }
