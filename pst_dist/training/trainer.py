"""`train(config)`: composes data, student, loss, engine and checkpoints into one run, under every launcher.

Each start first resumes the newest valid checkpoint, so a requeued job, a retry and a repeated command all work the
same way. `training.step` takes a step, `training.bad_steps` decides about bad ones, `training.saver` saves checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, fetch_data, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet, synthetic_of
from pst_dist.data.tasks import get_task
from pst_dist.distributed.peer_watch import alive, at, watched, working
from pst_dist.distributed.preemption import StopRequest, end_as_told, stop_requests
from pst_dist.distributed.ranks import (
    Ranks,
    check_same_software,
    device_of,
    from_main,
    main_first_errors,
    process_group,
    together,
)
from pst_dist.embedding.targets import open_teacher
from pst_dist.errors import DivergedError, InputError
from pst_dist.logs import quiet_libraries
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import write_json
from pst_dist.storage.outputs import refuse_link_out
from pst_dist.student.layout import layout_for
from pst_dist.student.lora import trained_count
from pst_dist.student.saved import save_student
from pst_dist.student.tokenizer import (
    KeptTokenizer,
    build_tokenizer,
    check_marker,
    check_prompt_ending,
)
from pst_dist.training.ahead import StepsAhead
from pst_dist.training.bad_steps import (
    Answer,
    after_good_step,
    after_rollback,
    after_skip,
    answer_to,
    diverged,
    diverged_validation,
)
from pst_dist.training.batches import Collator, step_batches
from pst_dist.training.begun import record_settled
from pst_dist.training.checked_rows import CheckedRows, check_all_rows, what_decides
from pst_dist.training.checkpoint import newest_valid, remove_old, resume
from pst_dist.training.deepspeed_config import deepspeed_settings
from pst_dist.training.dividing import holding_of
from pst_dist.training.engines import Engine, build_engine
from pst_dist.training.fingerprint import choosing_metric, settings_digest, training_settings
from pst_dist.training.head_fit import fit_head
from pst_dist.training.kept_apart import check_padding_free
from pst_dist.training.live import RankSigns, gather_signs
from pst_dist.training.loss import TermWeights
from pst_dist.training.metrics import MetricsLog
from pst_dist.training.module import build_student
from pst_dist.training.optimizer import check_optimizer, high_rate
from pst_dist.training.order import OrderPlan
from pst_dist.training.pass_size import PassSize, TooLarge, memory_errors
from pst_dist.training.precision import check_fp16
from pst_dist.training.result import TrainingResult, finished_training, global_batch_size
from pst_dist.training.saver import Saved, Saver
from pst_dist.training.share import after_measured, held
from pst_dist.training.starting import base_on_all, forget_training, prepare, refuse_foreign_folders, settled_here
from pst_dist.training.state import RunState, advanced
from pst_dist.training.step import BadStep, take_step, totals_over_ranks
from pst_dist.training.trackers import Tracker
from pst_dist.training.validation import ValidationScore, Validator, is_better
from pst_dist.training.verifying import verify_changed

log = logging.getLogger(__name__)


def train(
    config: Config,
    *,
    rebuild: bool = False,
    observer: Callable[[Saved], None] | None = None,
    trackers: Mapping[str, Tracker] | None = None,
    stop: StopRequest | None = None,
    lock_seconds: float = 0.0,
) -> TrainingResult:
    """Train one arm to its last step and return the result; resumes an earlier, incomplete training.

    `rebuild` removes the earlier training first, after locking the directory, so never one that is still running.
    `observer` is called on every rank after each checkpoint; rank zero reports metrics to the launcher's own `trackers`
    too, which stand under their names. A launcher that receives no signals passes its own `stop`
    to request an end. `lock_seconds` is how long to wait for an earlier process of the same run to release the
    directory.
    Raises ConfigError, InputError, StaleError or IntegrityError before the first step. Raises DivergedError on all
    ranks, with the weights from before the step, when a step is bad and `train.skip_bad_steps` and
    `train.max_rollbacks` are used up. Raises EnvironmentFault when memory runs out and smaller passes do not help.
    After SIGTERM or SIGUSR1 on any rank, all ranks write a checkpoint at the next step boundary and raise
    PreemptedError; after SIGINT, KeyboardInterrupt.
    """
    quiet_libraries()
    ranks = Ranks.from_environment()
    run = run_dir(config)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    if config.train.deepspeed is not None:
        deepspeed_settings(config.train, ranks.world_size)  # refuse before ranks connect and weights load
    check_optimizer(config.train)
    if ranks.is_main and (high := high_rate(config)):
        log.warning("%s", high)
    check_fp16(config.train, device_of(ranks))
    lock = directory_lock(run.path, wait_seconds=lock_seconds) if ranks.is_main else contextlib.nullcontext()
    patience, with_deepspeed = config.train.timeout_seconds, config.train.deepspeed is not None
    with (
        process_group(ranks, with_deepspeed=with_deepspeed, timeout_seconds=patience),
        contextlib.nullcontext(stop) if stop is not None else stop_requests() as told,
        watched(ranks, patience, run.stacks),
        contextlib.ExitStack() as stack,
    ):
        at("loading")
        check_same_software()
        with together(ranks), working():  # a node may not see the data; refusing before the lock leaves nothing behind
            fetch_data(config, on_file=alive)
            ShardSet.open(run.shards, verify=False)
        with main_first_errors(ranks):
            stack.enter_context(lock)
            if ranks.is_main:
                refuse_foreign_folders(run)
                if rebuild:
                    forget_training(run)
        with main_first_errors(ranks), working():
            config = settled_here(config, run) if ranks.is_main else config
        config = from_main(config)
        base = base_on_all(config, ranks)
        at("verifying the shards")
        shards = ShardSet.open(run.shards, verify=False)
        verify_changed(Artefact(run.shards, "shards", remembers=True), shards.manifest, ranks)
        at("loading")
        with together(ranks), working():
            if ranks.local_rank == 0 and ranks.world_size > 1:
                prepare(config, run, shards)
        with together(ranks), working():
            training = _Training(config, run, shards, ranks, told, base, observer, trackers)
        with memory_errors(config):
            training.make_student()
            return training.run_all()


class _Training:
    """One call of `train`: the objects built once, and the loop over steps."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        shards: ShardSet,
        ranks: Ranks,
        stop: StopRequest,
        base: dict[str, Any] | None,
        observer: Callable[[Saved], None] | None = None,
        trackers: Mapping[str, Tracker] | None = None,
    ) -> None:
        self.trackers = trackers
        self.config, self.run, self.ranks, self.stop, self.observer = config, run, ranks, stop, observer
        self.base = base
        self.shards_digest, self.synthetic = shards.manifest.digest, synthetic_of(shards.manifest)
        samples = shards.split("train")
        if not len(samples):
            raise InputError("these shards contain no training rows", "set data.train", path=run.shards)
        self.teacher = open_teacher(config, run, shards)
        batch = global_batch_size(config.train, ranks.world_size)
        self.settings = training_settings(
            config, shards.manifest.digest, self.teacher.digest if self.teacher else None, batch, base
        )
        self.fingerprint = settings_digest(self.settings)
        parts = tuple((part.rows, part.weight) for part in shards.mixture)
        self.plan = OrderPlan(len(samples), batch, config.seed, parts)
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
        self.device = device_of(ranks)
        self._busy_before = time.monotonic(), 0.0

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
        """What turns rows into batches for this student."""
        config = self.config
        if config.train.padding_free:
            check_padding_free(self.student.model, warn=self.ranks.is_main)
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

    def run_all(self) -> TrainingResult:
        with working():
            done = from_main(finished_training(self.run, self.fingerprint) if self.ranks.is_main else None)
        if self.ranks.is_main:
            record_settled(self.config, self.run)
        if done is not None:
            log.info("training is complete: %d steps, nothing to do", done.steps)
            return done
        at("building the engine")
        with working():
            engine = build_engine(self.student, self.config.train, self.ranks)
        self.size = PassSize.of(self.config, engine)
        at("resuming")
        state = self._resume(engine)
        engine.scaling = state.loss_scaling
        if state.step == 0:
            at("checking rows")
            task = get_task(self.config.task, self.config.data.answer_type)
            deciding = what_decides(self.settings, self.tokenizer, scored=task.name, base=self.base)
            known = CheckedRows(self.run.checked_rows, deciding)
            check_all_rows(self.samples, self.layout, task, known, self.ranks)
        fits = state.step == 0 and self.teacher is not None and self.config.loss.head_init == "ridge"
        fitted = fit_head(engine, self.samples, self.layout, self.collate, self.config) if fits else None
        log.info(
            "arm %s: %s parameters%s, %d rows, %d steps of %d samples on %d rank(s), engine %s, %s",
            self.config.arm,
            f"{sum(getattr(p, 'ds_numel', p.numel()) for p in self.student.model.parameters()):,}",
            f" ({trained_count(self.student.model):,} trained)" if self.student.is_adapted else "",
            len(self.samples),
            self.total,
            self.plan.global_batch_size,
            self.ranks.world_size,
            engine.name,
            self.device,
        )
        metrics = MetricsLog(
            self.config, self.run, self.ranks, first_step=state.step, total=self.total, own=self.trackers
        )
        saver = Saver(
            engine,
            self.run.checkpoints,
            keep=self.config.train.save_total_limit,
            total=self.total,
            in_background=self.config.train.save_in_background,
            observer=self.observer,
        )
        with metrics, saver:
            metrics.head_fit(fitted)
            try:
                state = self._loop(engine, state, metrics, saver)
            except DivergedError:  # raised on all ranks, so a checkpoint in flight can still be published
                saver.settle()
                raise
        result = TrainingResult(
            fingerprint=self.fingerprint,
            shards=self.shards_digest,
            embeddings=self.teacher.digest if self.teacher else None,
            steps=state.step,
            seconds=state.seconds,
            tokens=state.tokens,
            best_step=state.best_step or 0,
            best_value=state.best_value,
            metric=choosing_metric(self.config),
        )
        with main_first_errors(self.ranks):
            if self.ranks.is_main:
                # A kill during the last save, after publishing, leaves old checkpoints that no later save removes.
                remove_old(self.run.checkpoints, state, keep=self.config.train.save_total_limit)
                refuse_link_out(self.run.training, self.run.path)
                write_json(self.run.training, vars(result))
        return result

    def _resume(self, engine: Engine) -> RunState:
        """Load the newest valid checkpoint, or an earlier one from which a lost best student can be recreated.

        That is the checkpoint of the best step or one before it; training from there reaches the same best step.
        """
        fresh = RunState(self.fingerprint, engine.name, self.ranks.world_size, settings=self.settings)
        root, accept = self.run.checkpoints, self.config.train.accept_changes
        newest = newest_valid(root, self.ranks)
        best_step = newest[1].best_step if newest else None
        with working():
            intact = from_main(Artefact(self.run.best, "student").is_intact() if self.ranks.is_main else None)
        if best_step is None or intact:
            return resume(engine, root, fresh, accept_changes=accept)
        log.warning("the best student (step %d) is missing or damaged; recreating it", best_step)
        state = resume(engine, root, fresh, at_most=best_step, accept_changes=accept)
        if state.step == best_step:
            self._keep_student(engine, state, self._score(engine, state))
            return resume(engine, root, fresh, accept_changes=accept)
        return state

    def _loop(self, engine: Engine, state: RunState, metrics: MetricsLog, saver: Saver) -> RunState:
        train = self.config.train
        every_eval = self._eval_every
        every_save = train.save_steps or every_eval
        saved, loss = state.step, math.nan
        at("data", state.step + 1)
        if self._has_stopped_early(state):  # killed after that save
            return state
        steps = self._batches(state.step)
        while (batches := steps.take()) is not None:
            started, waited = time.monotonic(), steps.waited_seconds
            at("counting", state.step + 1)
            totals = totals_over_ranks(batches, self.stop.signal, busy=saver.busy)
            if totals.told:
                if saved < state.step:
                    saver.save(state, loss)
                saver.settle()
                end_as_told(totals.told, f"saved after step {state.step} of {self.total}")
            if saver.pending and not totals.busy:
                saver.settle()
            holds = self.config.loss.alignment_share is not None
            watch = (state.step + 1) % train.logging_steps == 0 or state.step == 0 or holds
            with steps.preparing_next():
                taken = take_step(
                    engine,
                    state,
                    batches,
                    totals,
                    held(self.weights, self.config.loss, state),
                    train,
                    seed=self.config.seed,
                    total=self.total,
                    watch=watch,
                )
                took = time.monotonic() - started
                at("data", state.step + 2)  # where the block waits for the thread
            if isinstance(taken, TooLarge):
                self.size.halve(taken, f"step {state.step + 1}")
                steps = self._batches(state.step)
                continue
            tokens, seconds = state.tokens + totals.tokens, state.seconds + took
            went_back = False
            if isinstance(taken, BadStep):
                before = len(state.rollbacks)
                state = self._answer(engine, state, taken, metrics, saver)
                went_back = len(state.rollbacks) > before  # saved below, so that the next start knows it
            else:
                state = after_good_step(advanced(state, step=state.step + 1), taken.loss, train)
                state = after_measured(state, taken, self.config.loss)
                loss = taken.loss
                signs = self._signs(engine) if metrics.is_logged(state.step) else []
                lengths = [length for batch in batches for length in batch.lengths] if self.ranks.is_main else []
                epoch, share = self.plan.epoch_of(state.step - 1), (waited, took)
                metrics.step(taken, epoch=epoch, waited_and_took=share, signs=signs, lengths=lengths)
            state = advanced(state, tokens=tokens, seconds=seconds, loss_scaling=engine.scaling)
            last = state.step == self.total
            if state.step % every_eval == 0 or last:
                state = self._validate(engine, state, metrics)
            stopped_early = self._has_stopped_early(state)
            if state.step % every_save == 0 or last or went_back or stopped_early:
                saver.save(state, loss)
                saved = state.step
            if stopped_early:
                log.info(
                    "stopped early at step %d of %d: no validation since step %s was better",
                    *(state.step, self.total, state.improved_step),
                )
                break
            at("data", state.step + 1)
        saver.settle()
        return state

    def _signs(self, engine: Engine) -> list[RankSigns]:
        """Each rank's share of the time since the last call; collective."""
        now, busy = time.monotonic(), engine.busy_seconds
        share = (busy - self._busy_before[1]) / max(now - self._busy_before[0], 1e-9)
        self._busy_before = now, busy
        return gather_signs(self.ranks, self.device, min(1.0, share))

    def _has_stopped_early(self, state: RunState) -> bool:
        """Whether `train.early_stopping_patience` validations in a row, the last at this step, were not the best."""
        patience, every = self.config.train.early_stopping_patience, self._eval_every
        if patience is None or state.improved_step is None or state.step % every:
            return False
        return state.step - state.improved_step >= patience * every

    @property
    def _eval_every(self) -> int:
        return self.config.train.eval_steps or self.plan.steps_per_epoch

    def _answer(self, engine: Engine, state: RunState, bad: BadStep, metrics: MetricsLog, saver: Saver) -> RunState:
        """Skip a bad step, roll back, or raise DivergedError, as `training.bad_steps` decides; collective."""
        answer = answer_to(state, self.config.train)
        if answer is Answer.SKIP:
            metrics.bad_step(state.step + 1, "skipped", bad.fault, bad.sample_ids)
            return after_skip(state)
        saver.settle()
        found = newest_valid(self.run.checkpoints, self.ranks) if answer is Answer.ROLL_BACK else None
        if found is None:
            metrics.bad_step(state.step + 1, "stopped", bad.fault, bad.sample_ids)
            raise diverged(bad.fault, state, self.config.train)
        path, checkpoint = found
        outcome = f"rolled back to the weights of step {checkpoint.step}"
        metrics.bad_step(state.step + 1, outcome, bad.fault, bad.sample_ids)
        at("resuming", state.step + 1)
        with working():
            engine.load(path)
        return after_rollback(state, checkpoint)

    def _batches(self, first_step: int) -> StepsAhead:
        """The passes of each step from `first_step` on, of the size that passes have now."""
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
            micro_batch_size=self.size.rows,
            by_length=self.size.by_length,
            workers=workers,
        )
        return StepsAhead(steps, in_thread=workers == 0)

    def _score(self, engine: Engine, state: RunState) -> ValidationScore:
        return self.validator.score(engine, held(self.weights, self.config.loss, state), self.size)

    def _validate(self, engine: Engine, state: RunState, metrics: MetricsLog) -> RunState:
        """Score the validation rows and keep the student if it is the best so far."""
        at("validation", state.step)
        started = time.monotonic()
        value = self._score(engine, state)
        if value.loss is not None and not math.isfinite(value.loss):
            raise diverged_validation(value.loss, state.step)
        metrics.validation(state.step, value, seconds=time.monotonic() - started)
        with together(self.ranks):
            metrics.answers(state.step, self.validator.sample_answers(engine))
        metric = choosing_metric(self.config)
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
        self._keep_student(engine, state, value)
        return state

    def _keep_student(self, engine: Engine, state: RunState, value: ValidationScore) -> None:
        """Write the current student as the best one; collective."""
        at("keeping the student", state.step)
        with main_first_errors(self.ranks), working():
            weights = engine.full_weights(self.run.path)
        with main_first_errors(self.ranks), working():
            if self.ranks.is_main:
                save_student(
                    self.student.model,
                    weights,
                    self.tokenizer,
                    self.layout.format,
                    self.run.best,
                    fingerprint=self.fingerprint,
                    extra={
                        "step": state.step,
                        "arm": self.config.arm,
                        "seed": self.config.seed,
                        "shards": self.shards_digest,
                        "embeddings": self.teacher.digest if self.teacher else None,
                        "base_model": self.config.student.model_name_or_path,
                        "base": self.base,
                        "new_token_init": self.config.student.new_token_init,
                        "bf16": self.config.train.bf16,
                        "loss": self.config.loss.model_dump(mode="json"),
                        **self.synthetic,
                        **value.to_json(),
                    },
                )
