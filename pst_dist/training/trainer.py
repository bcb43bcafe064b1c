"""`train(config)`: composes data, student, loss, engine and checkpoints into one run, under every launcher.

Each start first resumes the newest valid checkpoint, so a requeued job, a retry and a repeated command all work the
same way. `training.starting` has what precedes the build, `training.parts` builds data and student, and
`training.loop` runs the steps.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

import torch

from pst_dist.config.run_dir import fetch_data, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet
from pst_dist.data.tasks import get_task
from pst_dist.distributed.peer_watch import watched
from pst_dist.distributed.preemption import StopRequest, stop_requests
from pst_dist.distributed.progress import alive, at, working
from pst_dist.distributed.ranks import (
    Ranks,
    check_same_software,
    from_main,
    main_first_errors,
    process_group,
    together,
)
from pst_dist.errors import DivergedError
from pst_dist.logs import quiet_libraries
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import write_json
from pst_dist.storage.outputs import refuse_link_out
from pst_dist.student.lora import trained_count
from pst_dist.training.begun import record_settled
from pst_dist.training.best_student import BestStudent
from pst_dist.training.checked_rows import CheckedRows, check_all_rows, what_decides
from pst_dist.training.checkpoints.checkpoint import newest_valid, remove_old, resume
from pst_dist.training.checkpoints.saver import Saved, Saver
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.checkpoints.verifying import verify_changed
from pst_dist.training.early_checks import check_settings
from pst_dist.training.engines.engine import Engine
from pst_dist.training.engines.engine_choice import build_engine
from pst_dist.training.engines.optimizer import high_rate
from pst_dist.training.fingerprint import choosing_metric
from pst_dist.training.head_fit import fit_head
from pst_dist.training.loop import Loop
from pst_dist.training.memory.pass_size import PassSize, memory_errors
from pst_dist.training.parts import Parts
from pst_dist.training.reporting.live import BusyShare
from pst_dist.training.reporting.metrics import MetricsLog
from pst_dist.training.reporting.trackers import Tracker
from pst_dist.training.result import TrainingResult, recorded_training, refuse_other_student
from pst_dist.training.starting import base_on_all, forget_training, prepare, refuse_foreign_folders, settled_here

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
    `observer` is called on every rank after each checkpoint. `trackers` are further trackers by name, to which rank
    zero reports metrics beside those of `train.report_to`. A launcher that receives no signals passes its own `stop`
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
    check_settings(config, ranks)  # before ranks connect and weights load
    if ranks.is_main and (high := high_rate(config)):
        log.warning("%s", high)
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
            parts, busy = Parts(config, run, shards, ranks, base), BusyShare()
        with memory_errors(config):
            done = _finished(parts)  # before the student is built: loading a large one takes minutes
            if done is not None:
                return done
            parts.make_student()
            return _run(parts, told, busy, observer, trackers)


def _finished(parts: Parts) -> TrainingResult | None:
    """The result of this training if it is already complete; collective."""
    is_main = parts.ranks.is_main
    done = None
    with main_first_errors(parts.ranks), working():
        if is_main and (found := recorded_training(parts.run)) is not None:
            if found.fingerprint == parts.fingerprint:
                done = found
            else:
                refuse_other_student(parts.run, found, parts.settings)
    done = from_main(done)
    if is_main:
        record_settled(parts.config, parts.run)
    if done is not None:
        log.info("training is complete: %d steps, nothing to do", done.steps)
    return done


def _run(
    parts: Parts,
    stop: StopRequest,
    busy: BusyShare,
    observer: Callable[[Saved], None] | None,
    trackers: Mapping[str, Tracker] | None,
) -> TrainingResult:
    """Resume, take the steps that are left and write the result; collective."""
    config, run, ranks, student = parts.config, parts.run, parts.ranks, parts.student
    at("building the engine")
    with working():
        engine = build_engine(student, config.train, ranks)
    size = PassSize.of(config, engine)
    best = BestStudent(parts, engine, size)
    at("resuming")
    state = _resume(parts, engine, best)
    if ranks.is_main:  # the record of an earlier end; until this training ends, the run must not look finished
        run.training.unlink(missing_ok=True)
    engine.scaling = state.loss_scaling
    if state.step == 0:
        at("checking rows")
        task = get_task(config.task, config.data.answer_type)
        deciding = what_decides(parts.settings, parts.tokenizer, scored=task.name, base=parts.base)
        known = CheckedRows(run.checked_rows, deciding)
        check_all_rows(parts.samples, parts.layout, task, known, ranks)
    fits = state.step == 0 and parts.teacher is not None and config.loss.head_init == "ridge"
    fitted = fit_head(engine, parts.samples, parts.layout, parts.collate, config) if fits else None
    log.info(
        "arm %s: %s parameters%s, %d rows, %d steps of %d samples on %d rank(s), engine %s, %s",
        config.arm,
        f"{sum(getattr(p, 'ds_numel', p.numel()) for p in student.model.parameters()):,}",
        f" ({trained_count(student.model):,} trained)" if student.is_adapted else "",
        len(parts.samples),
        parts.total,
        parts.plan.global_batch_size,
        ranks.world_size,
        engine.name,
        engine.device,
    )
    metrics = MetricsLog(config, run, ranks, first_step=state.step, total=parts.total, own=trackers)
    saver = Saver(
        engine,
        run.checkpoints,
        keep=config.train.save_total_limit,
        total=parts.total,
        in_background=config.train.save_in_background,
        observer=observer,
    )
    with metrics, saver:
        metrics.head_fit(fitted)
        loop = Loop(
            parts=parts, engine=engine, size=size, best=best, metrics=metrics, saver=saver, stop=stop, busy=busy
        )
        try:
            state = loop.run(state)
        except DivergedError:  # raised on all ranks, so a checkpoint in flight can still be published
            saver.settle()
            raise
    result = TrainingResult(
        fingerprint=parts.fingerprint,
        shards=parts.shards_digest,
        embeddings=parts.embeddings_digest,
        steps=state.step,
        seconds=state.seconds,
        tokens=state.tokens,
        best_step=state.best_step or 0,
        best_value=state.best_value,
        metric=choosing_metric(config),
        settings=parts.settings,
    )
    with main_first_errors(ranks):
        if ranks.is_main:
            # A kill during the last save, after publishing, leaves old checkpoints that no later save removes.
            remove_old(run.checkpoints, state, keep=config.train.save_total_limit)
            refuse_link_out(run.training, run.path)
            write_json(run.training, vars(result))
    return result


def _resume(parts: Parts, engine: Engine, best: BestStudent) -> RunState:
    """Load the newest valid checkpoint, or an earlier one from which a lost best student can be recreated.

    That is the checkpoint of the best step or one before it; training from there reaches the same best step.
    """
    ranks, root, accept = parts.ranks, parts.run.checkpoints, parts.config.train.accept_changes
    fresh = RunState(parts.fingerprint, engine.name, ranks.world_size, settings=parts.settings)
    newest = newest_valid(root, ranks)
    best_step = newest[1].best_step if newest else None
    with working():
        intact = from_main(Artefact(parts.run.best, "student").is_intact() if ranks.is_main else None)
    if best_step is None or intact:
        return resume(engine, root, fresh, accept_changes=accept)
    log.warning("the best student (step %d) is missing or damaged; recreating it", best_step)
    state = resume(engine, root, fresh, at_most=best_step, accept_changes=accept)
    if state.step == best_step:
        best.keep(state, best.score(state))
        return resume(engine, root, fresh, accept_changes=accept)
    return state
