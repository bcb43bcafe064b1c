"""Computes the alignment term's weight from the share of the gradient that it should have (`loss.alignment_share`).

A term of weight w whose gradient has norm w * a at the hidden state, beside others of norm o together, has the share
w * a / (w * a + o). The weight that gives it the share s is s / (1 - s) * o / a. The ratio o / a is a moving average
over the last steps, of its logarithm, because it can change by orders of magnitude in the first steps. The average is
part of the run's state, so the weight is the same after a resume and on any number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pst_dist.config.schema import LossConfig
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.loss import TermWeights
from pst_dist.training.reporting.step_record import StepRecord

_KEPT = 0.7
"""Share of the average that each step keeps: it reaches over about three steps."""
_MOST = math.log(1e4)
"""The logarithm of the largest weight, and minus that of the smallest: a learnt or absent term gets no other."""


def held(weights: TermWeights, loss: LossConfig, state: RunState) -> TermWeights:
    """The weights of the step after `state.step`; those given where no share is held or nothing was measured yet."""
    if loss.alignment_share is None or state.alignment_ratio is None:
        return weights
    logarithm = math.log(loss.alignment_share / (1 - loss.alignment_share)) + state.alignment_ratio
    return replace(weights, weights=(*weights.weights[:2], math.exp(max(-_MOST, min(logarithm, _MOST)))))


def after_measured(state: RunState, record: StepRecord, loss: LossConfig) -> RunState:
    """The state with a good step's gradient norms added to the average, if a share is held."""
    if loss.alignment_share is None:
        return replace(state, alignment_ratio=None) if state.alignment_ratio is not None else state
    norms, weight = record.gradients or {}, record.alignment_weight
    alignment = norms.get("alignment", 0.0) / weight if weight else 0.0
    others = sum(norms.values()) - norms.get("alignment", 0.0)
    if not (alignment > 0 and others > 0):  # a step without aligned samples, or with nothing else to learn
        return state
    found, before = math.log(others / alignment), state.alignment_ratio
    return replace(state, alignment_ratio=found if before is None else _KEPT * before + (1 - _KEPT) * found)
