"""One optimizer step over a global batch: sum counts over ranks, run the passes, update the weights.

Counts are summed over ranks and micro-batches before the first backward pass, so every gradient is that of the global
batch's loss. A bad step leaves weights and moments unchanged and returns a `BadStep`; `training.bad_steps` decides
what follows. So does a step with a pass that ran out of memory, which returns `TooLarge`; the caller cuts its rows
anew and takes it again.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.device_memory import is_out_of_memory
from pst_dist.distributed.progress import at
from pst_dist.distributed.ranks import gathered, sums_over_ranks
from pst_dist.training.bad_steps import gradient_fault, loss_fault, spike_fault
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.engines.engine import Engine
from pst_dist.training.engines.optimizer import learning_rate_at
from pst_dist.training.loss import TermWeights
from pst_dist.training.memory.pass_size import TooLarge
from pst_dist.training.reporting.step_record import StepRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Totals:
    """One global batch over all ranks, and the flags they exchange at the start of a step."""

    counts: Tensor
    """[3] float64: answer tokens, rationale tokens, aligned spans."""
    tokens: int
    padding: float
    """The share of the computed positions that are padding, 0 … 1."""
    told: int
    """The signal that asked some rank to stop, or 0."""
    busy: int
    """Number of ranks still writing a checkpoint in the background."""


@dataclass(frozen=True)
class BadStep:
    """A step that did not move the weights."""

    fault: str
    """What was wrong, without the step's number."""
    sample_ids: list[str]
    """Samples of the passes whose loss was not finite; all samples of the global batch when every loss was finite."""


def totals_over_ranks(batches: Sequence[PSTBatch], told: int, *, busy: bool = False) -> Totals:
    """The step's counts and flags over all ranks, in one collective; `told` is the stop signal of this rank, or 0."""
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    positions = torch.stack([batch.positions for batch in batches]).sum(0)
    tokens = sum(batch.tokens for batch in batches)
    # SIGINT on any rank takes precedence over SIGTERM on the others: the launcher forwards it to all.
    flags = [float(tokens), float(told == signal.SIGINT), float(told != 0), float(busy)]
    sums = sums_over_ranks(torch.cat([counts, positions, torch.tensor(flags, dtype=torch.float64)]))
    told_by = 0 if not sums[7] else signal.SIGINT if sums[6] else signal.SIGTERM
    return Totals(sums[:3], int(sums[5]), float(sums[4] / sums[3]), told_by, int(sums[8]))


def take_step(
    engine: Engine,
    state: RunState,
    batches: Sequence[PSTBatch],
    totals: Totals,
    weights: TermWeights,
    train: TrainConfig,
    *,
    seed: int,
    total: int,
    watch: bool,
) -> StepRecord | BadStep | TooLarge:
    """Take the step after `state.step`, of `total`, over this rank's micro-batches; collective.

    With `watch` the record contains the norm of each term's gradient at the hidden state. A rank whose pass ran out of
    memory returns before the others; only a single process may then take the step again (`Engine.repeats`).
    """
    step, student = state.step, engine.student
    student.train()
    student.watch_gradients = watch
    scales, rate = weights.scales(totals.counts), learning_rate_at(step, total, train)
    while True:
        # Dropout depends only on (seed, step, rank), so a resumed run draws the same masks as an uninterrupted one.
        torch.manual_seed((seed * 1_000_003 + step) * 65_537 + engine.ranks.rank)
        student.squared_gradients.zero_()
        loss_scale = engine.loss_scale  # moving the weights may change it
        ran = _run_passes(engine, batches, scales, step + 1)
        if isinstance(ran, TooLarge):
            if engine.repeats:
                engine.discard()
            return ran
        passes, cosine = ran
        local = torch.stack(passes).sum(0)
        everything = sums_over_ranks(torch.cat([local.cpu(), cosine.cpu()[None], student.squared_gradients]))
        sums, cosine, squares = everything[:3], everything[3], everything[4:]
        at("optimizer", step + 1)
        fault = loss_fault(sums) or spike_fault(float((sums * scales).sum()), state, train)
        if fault is not None:
            engine.discard()
            break
        norm = engine.step(rate)
        fault = gradient_fault(norm)
        if fault is None or engine.scaling is None or loss_scale < 1:
            break
        # The scaled gradients were too large for float16. The engine has halved its scale, so no row is lost.
        log.info("step %d: float16 gradients overflow; loss scale %g -> %g", step + 1, loss_scale, engine.loss_scale)
    if fault is not None:
        return BadStep(fault, _suspects(batches, passes))
    return StepRecord.of(
        step=step + 1,
        sums=sums,
        counts=totals.counts,
        scales=scales,
        cosine=float(cosine),
        gradients=squares.sqrt() / loss_scale if watch else None,
        grad_norm=norm,
        learning_rate=rate,
        tokens=totals.tokens,
        padding=totals.padding,
    )


def _run_passes(
    engine: Engine, batches: Sequence[PSTBatch], scales: Tensor, step: int
) -> tuple[list[Tensor], Tensor] | TooLarge:
    """Forward and backward passes of this rank: the [3] float64 sums of each, and the sum of the cosines."""
    # Summed on the device: reading them here would sync with it in every pass.
    cosine = torch.zeros((), dtype=torch.float64, device=engine.device)
    passes, started = [], time.monotonic()
    device_scales = scales.float().to(engine.device)
    for index, batch in enumerate(batches):
        try:
            at("forward", step)
            output = engine.forward(batch.to(engine.device), device_scales)
            at("backward", step)
            engine.backward(output.loss, last=index == len(batches) - 1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return TooLarge.of(batch, error)
        passes.append(output.sums.double())
        cosine += output.cosine.double()
    engine.busy_seconds += time.monotonic() - started
    return passes, cosine


def _suspects(batches: Sequence[PSTBatch], passes: Sequence[Tensor]) -> list[str]:
    """`BadStep.sample_ids`, the same on every rank; collective."""
    bad = [not bool(torch.isfinite(sums).all()) for sums in passes]
    told = gathered([(is_bad, batch.sample_ids) for is_bad, batch in zip(bad, batches, strict=True)])
    found = [(is_bad, sample) for rank in told for is_bad, ids in rank for sample in ids]
    any_bad = any(is_bad for is_bad, _ in found)
    return sorted({sample for is_bad, sample in found if is_bad or not any_bad})
