"""The loop over the steps of a training: when to validate, save, skip, roll back, stop early or end as told.

`training.step` takes a step, `training.bad_steps` decides about bad ones, `training.best_student` validates, and
`training.checkpoints.saver` saves checkpoints. All decisions use sums over all ranks, so every rank makes the same
ones.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from pst_dist.distributed.preemption import StopRequest, end_as_told
from pst_dist.distributed.progress import at, working
from pst_dist.training.bad_steps import Answer, after_good_step, after_rollback, after_skip, answer_to, diverged
from pst_dist.training.best_student import BestStudent
from pst_dist.training.checkpoints.checkpoint import newest_valid
from pst_dist.training.checkpoints.saver import Saver
from pst_dist.training.checkpoints.state import RunState, advanced
from pst_dist.training.engines.engine import Engine
from pst_dist.training.memory.pass_size import PassSize, TooLarge
from pst_dist.training.parts import Parts
from pst_dist.training.reporting.live import BusyShare, RankSigns, gather_signs
from pst_dist.training.reporting.metrics import MetricsLog
from pst_dist.training.share import after_measured, held
from pst_dist.training.step import BadStep, take_step, totals_over_ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The steps of one start of a training, from the state that it resumes to the last step."""

    parts: Parts
    engine: Engine
    size: PassSize
    best: BestStudent
    metrics: MetricsLog
    saver: Saver
    stop: StopRequest
    busy: BusyShare

    def run(self, state: RunState) -> RunState:
        """Take the steps after `state.step` and return the state after the last one, which is saved; collective.

        Raises DivergedError, EnvironmentFault, PreemptedError or KeyboardInterrupt as `trainer.train` says.
        """
        parts, engine, saver = self.parts, self.engine, self.saver
        config, train = parts.config, parts.config.train
        every_eval = self._eval_every
        every_save = train.save_steps or every_eval
        saved, loss = state.step, math.nan
        at("data", state.step + 1)
        if self._has_stopped_early(state):  # killed after that save
            return state
        steps = parts.batches_from(state.step, self.size)
        while (batches := steps.take()) is not None:
            started, waited = time.monotonic(), steps.waited_seconds
            at("counting", state.step + 1)
            totals = totals_over_ranks(batches, self.stop.signal, busy=saver.busy)
            if totals.told:
                if saved < state.step:
                    saver.save(state, loss)
                saver.settle()
                end_as_told(totals.told, f"saved after step {state.step} of {parts.total}")
            if saver.pending and not totals.busy:
                saver.settle()
            holds = config.loss.alignment_share is not None
            watch = (state.step + 1) % train.logging_steps == 0 or state.step == 0 or holds
            with steps.preparing_next():
                taken = take_step(
                    engine,
                    state,
                    batches,
                    totals,
                    held(parts.weights, config.loss, state),
                    train,
                    seed=config.seed,
                    total=parts.total,
                    watch=watch,
                )
                took = time.monotonic() - started
                at("data", state.step + 2)  # where the block waits for the thread
            if isinstance(taken, TooLarge):
                self.size.halve(taken, f"step {state.step + 1}")
                steps = parts.batches_from(state.step, self.size)
                continue
            tokens, seconds = state.tokens + totals.tokens, state.seconds + took
            went_back = False
            if isinstance(taken, BadStep):
                before = len(state.rollbacks)
                state = self._answer(state, taken)
                went_back = len(state.rollbacks) > before  # saved below, so that the next start knows it
            else:
                state = after_good_step(advanced(state, step=state.step + 1), taken.loss, train)
                state = after_measured(state, taken, config.loss)
                loss = taken.loss
                signs = self._signs() if self.metrics.is_logged(state.step) else []
                lengths = [length for batch in batches for length in batch.lengths] if parts.ranks.is_main else []
                epoch, share = parts.plan.epoch_of(state.step - 1), (waited, took)
                self.metrics.step(taken, epoch=epoch, waited_and_took=share, signs=signs, lengths=lengths)
            state = advanced(state, tokens=tokens, seconds=seconds, loss_scaling=engine.scaling)
            last = state.step == parts.total
            if state.step % every_eval == 0 or last:
                state = self.best.validate(state, self.metrics)
            stopped_early = self._has_stopped_early(state)
            if state.step % every_save == 0 or last or went_back or stopped_early:
                saver.save(state, loss)
                saved = state.step
            if stopped_early:
                log.info(
                    "stopped early at step %d of %d: no validation since step %s was better",
                    *(state.step, parts.total, state.improved_step),
                )
                break
            at("data", state.step + 1)
        saver.settle()
        return state

    @property
    def _eval_every(self) -> int:
        return self.parts.config.train.eval_steps or self.parts.plan.steps_per_epoch

    def _has_stopped_early(self, state: RunState) -> bool:
        """Whether `train.early_stopping_patience` validations in a row, the last at this step, were not the best."""
        patience, every = self.parts.config.train.early_stopping_patience, self._eval_every
        if patience is None or state.improved_step is None or state.step % every:
            return False
        return state.step - state.improved_step >= patience * every

    def _answer(self, state: RunState, bad: BadStep) -> RunState:
        """Skip a bad step, roll back, or raise DivergedError, as `training.bad_steps` decides; collective."""
        train, metrics = self.parts.config.train, self.metrics
        answer = answer_to(state, train)
        if answer is Answer.SKIP:
            metrics.bad_step(state.step + 1, "skipped", bad.fault, bad.sample_ids)
            return after_skip(state)
        self.saver.settle()
        found = newest_valid(self.saver.root, self.parts.ranks) if answer is Answer.ROLL_BACK else None
        if found is None:
            metrics.bad_step(state.step + 1, "stopped", bad.fault, bad.sample_ids)
            raise diverged(bad.fault, state, train)
        path, checkpoint = found
        outcome = f"rolled back to the weights of step {checkpoint.step}"
        metrics.bad_step(state.step + 1, outcome, bad.fault, bad.sample_ids)
        at("resuming", state.step + 1)
        with working():
            self.engine.load(path)
        return after_rollback(state, checkpoint)

    def _signs(self) -> list[RankSigns]:
        """Each rank's share of the time since the last call; collective."""
        return gather_signs(self.parts.ranks, self.engine.device, self.busy.since_last(self.engine.busy_seconds))
