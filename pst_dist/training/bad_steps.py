"""Bad steps, which must not move the weights, and the response: skip the step, roll back, or stop.

A step is bad when its loss or gradient is not finite or, if `train.spike_factor` is set, when its loss is far above
that of recent steps. The decision uses sums over the global batch, which every rank has, and the history in the run's
state, so it is the same on all ranks, in a resumed run and with another number of ranks.
The order of samples does not change. A rollback loads the weights of the newest checkpoint and continues with the batch
after the bad one; the batches in between are skipped, since any of them may have spoilt the weights.
`training.step` and the engines compute a step and leave the weights unchanged when it is bad.
"""

from __future__ import annotations

import enum
import math
import statistics
from dataclasses import replace

from torch import Tensor

from pst_dist.config.schema import TrainConfig
from pst_dist.errors import DivergedError
from pst_dist.student.finite import LOWER_THE_RATE
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.loss import TERMS

MOST_IN_A_ROW = 2
"""Most consecutive bad steps to skip; one more shows that the batches are not the cause."""


class Answer(enum.Enum):
    """The response to a bad step."""

    SKIP = "skip"
    ROLL_BACK = "roll back"
    STOP = "stop"


def loss_fault(sums: Tensor) -> str | None:
    """What is wrong with the [3] sums of a step's terms, in the order of `loss.TERMS`; None when all are finite."""
    bad = [name for name, value in zip(TERMS, sums.tolist(), strict=True) if not math.isfinite(value)]
    return f"the {' and '.join(bad)} loss is not finite" if bad else None


def gradient_fault(norm: float) -> str | None:
    """What is wrong with a step's gradient, judged by its norm; None when it is finite."""
    return None if math.isfinite(norm) else f"the gradient norm is {norm}"


def spike_fault(loss: float, state: RunState, train: TrainConfig) -> str | None:
    """What is wrong with a finite loss that jumps; None without a jump and before `train.spike_window` good steps."""
    recent = state.recent_losses
    if train.spike_factor is None or len(recent) < train.spike_window:
        return None
    usual = statistics.median(recent)
    if loss <= train.spike_factor * usual:
        return None
    return f"the loss {loss:.4g} is over {train.spike_factor:g} times {usual:.4g}, the median of {len(recent)} steps"


def after_good_step(state: RunState, loss: float, train: TrainConfig) -> RunState:
    """The state with this step's loss added to the recent losses, if they are needed."""
    if train.spike_factor is None:
        return replace(state, recent_losses=[]) if state.recent_losses else state
    return replace(state, recent_losses=[*state.recent_losses, loss][-train.spike_window :])


def answer_to(state: RunState, train: TrainConfig) -> Answer:
    """The response to a bad step `state.step + 1`.

    Skips at most `train.skip_bad_steps` steps since the last rollback, and never three in a row.
    """
    since = state.rollbacks[-1][1] if state.rollbacks else 0
    skipped = [step for step in state.skipped_steps if step > since]
    in_a_row = 0
    while state.step - in_a_row in skipped:
        in_a_row += 1
    if len(skipped) < train.skip_bad_steps and in_a_row < MOST_IN_A_ROW:
        return Answer.SKIP
    return Answer.ROLL_BACK if len(state.rollbacks) < train.max_rollbacks else Answer.STOP


def after_skip(state: RunState) -> RunState:
    """The state after skipping a bad step."""
    step = state.step + 1
    return replace(state, step=step, skipped_steps=[*state.skipped_steps, step])


def after_rollback(state: RunState, checkpoint: RunState) -> RunState:
    """The state after a bad step that rolled the weights back to `checkpoint`.

    The best student and the token count stay: the student is on disk, and the tokens were processed.
    """
    step = state.step + 1
    return replace(
        state,
        step=step,
        rollbacks=[*state.rollbacks, [checkpoint.step, step]],
        recent_losses=checkpoint.recent_losses,
        alignment_ratio=checkpoint.alignment_ratio,
    )


def diverged(fault: str, state: RunState, train: TrainConfig) -> DivergedError:
    """The error that stops training at the step after `state.step`."""
    done = []
    if state.skipped_steps:
        done.append(f"earlier skips: {len(state.skipped_steps)}")
    if state.rollbacks:
        done.append(f"earlier rollbacks: {len(state.rollbacks)}")
    so_far = f" ({', '.join(done)})" if done else ""
    options = "" if train.skip_bad_steps or train.max_rollbacks else ", train.skip_bad_steps or train.max_rollbacks"
    return DivergedError(f"step {state.step + 1}: {fault}; no weight was changed{so_far}", f"{LOWER_THE_RATE}{options}")


def diverged_validation(loss: float, step: int) -> DivergedError:
    """The error that stops training when the loss on the validation rows is not finite."""
    return DivergedError(
        f"step {step}: the loss on the validation rows is {loss}; this student is not kept", LOWER_THE_RATE
    )
