"""The weight of the alignment term from the share of the gradient that it is to have (`loss.alignment_share`).

A term of weight w whose gradient has norm w * a at the hidden state, beside others of norm o together, has the share
w * a / (w * a + o). The weight that gives it the share s is s / (1 - s) * o / a. Both norms are moving averages over
the steps so far; they are part of the run's state, so a resumed run and any number of ranks hold the same weight.
"""

from __future__ import annotations

from dataclasses import replace

from pst_dist.config.schema import LossConfig
from pst_dist.training.loss import TermWeights
from pst_dist.training.metrics import StepRecord
from pst_dist.training.state import RunState

_KEPT = 0.9
"""Share of the averages that each step keeps: they reach over about ten steps."""
_BOUNDS = (1e-4, 1e4)
"""A term whose gradient vanishes, because it is learnt or absent, gets no weight beyond these."""


def held(weights: TermWeights, loss: LossConfig, state: RunState) -> TermWeights:
    """The weights of the step after `state.step`; those given where no share is held or nothing was measured yet."""
    if loss.alignment_share is None or not state.alignment_norms:
        return weights
    others, alignment = state.alignment_norms
    low, high = _BOUNDS
    wanted = loss.alignment_share / (1 - loss.alignment_share) * others
    weight = min(max(wanted, low * alignment), high * alignment) / alignment
    return replace(weights, weights=(*weights.weights[:2], weight))


def after_measured(state: RunState, record: StepRecord, loss: LossConfig) -> RunState:
    """The state with a good step's gradient norms added to the averages, if a share is held."""
    if loss.alignment_share is None:
        return replace(state, alignment_norms=[]) if state.alignment_norms else state
    norms, weight = record.gradients or {}, record.alignment_weight
    alignment = norms.get("alignment", 0.0) / weight if weight else 0.0
    if not alignment > 0:  # a step without aligned samples
        return state
    found = (sum(norms.values()) - norms["alignment"], alignment)
    before = state.alignment_norms or found
    kept = [_KEPT * old + (1 - _KEPT) * new for old, new in zip(before, found, strict=True)]
    return replace(state, alignment_norms=kept)
