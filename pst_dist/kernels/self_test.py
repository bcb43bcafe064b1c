"""A quick check before training that a backend agrees with the reference on this device.

Every function runs once on a small problem of odd shapes in float32 and in bfloat16, and is compared with the reference
in float64 on the CPU for the same rounded inputs. If a compiler, driver or GPU gets a kernel wrong, the result is a
slower run and one log line instead of a wrong gradient. The first run on a machine also compiles the kernels (seconds;
Triton caches them on disk).
"""

# Shapes in this file: B sequences, T positions, D student width, N supervised rows, V vocabulary, A spans, E teacher
# width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from pst_dist.kernels.spans import NOWHERE, Spans, Supervised

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error (L2) of a result, by its own dtype."""

PLACES = ((0, 140, 1), (1, 7, 129), (0, 3, 64), (1, 0, 0), (0, 70, 67))
"""Spans (sequence, first position, positions): with one position, none, a whole chunk, and over one and two chunks."""
BATCH, LENGTH, WIDTH, TEACHER_WIDTH, CLASSES = 2, 149, 33, 45, 2501
EPS = 2.0
"""Far above the value in training, so that the gradient of a row shorter than it does not dominate the others."""


def disagreement(
    candidate: ModuleType,
    reference: ModuleType,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> str | None:
    """Describes the first function of `candidate` that is wrong or raises on a device; None if all agree.

    Leaves the global random state, autograd and autocast unchanged.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False):
        for dtype in dtypes:
            for name, check in CHECKS.items():
                kind = str(dtype).removeprefix("torch.")
                truth = check(reference, _Draw(dtype, torch.device("cpu"), exact=True))
                shaped = check(reference, _Draw(dtype, torch.device("cpu")))
                try:
                    found = [result.cpu() for result in check(candidate, _Draw(dtype, device))]
                except Exception as error:  # after any error, the reference can run instead
                    reason = (str(error).strip() or "no message").splitlines()[0]
                    return f"{candidate.name}'s {name} in {kind} raised {type(error).__name__}: {reason}"
                for exact, model, result in zip(truth, shaped, found, strict=True):
                    if (result.shape, result.dtype) != (model.shape, model.dtype):
                        shape = f"{list(result.shape)} {result.dtype} instead of {list(model.shape)} {model.dtype}"
                        return f"{candidate.name}'s {name} in {kind} gave {shape}"
                    error_L2 = _relative_error(result, exact)
                    # Negated, so that a NaN error fails the check.
                    if not error_L2 <= TOLERANCE[result.dtype]:
                        allowed = f"{TOLERANCE[result.dtype]:.0e} are allowed"
                        return f"{candidate.name}'s {name} in {kind} has a relative error of {error_L2:.1e}, {allowed}"
    return None


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@dataclass
class _Draw:
    """Inputs of a check: the same numbers for the candidate and for the reference in float64 (`exact`)."""

    dtype: torch.dtype
    device: torch.device
    exact: bool = False
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu").manual_seed(0))

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values, rounded to `dtype` (the draw's own when None)."""
        drawn = torch.randn(shape, generator=self.generator, device="cpu").to(dtype or self.dtype)
        return drawn.to(self.device, torch.float64 if self.exact else drawn.dtype)

    def indices(self, below: int, *shape: int) -> Tensor:
        """Integers from 0 to below - 1."""
        return torch.randint(below, shape, generator=self.generator, device="cpu").to(self.device)

    def spans(self) -> Spans:
        return Spans.of(PLACES, batch=BATCH, length=LENGTH).to(self.device)


def _span_mean(backend: ModuleType, draw: _Draw) -> tuple[Tensor, ...]:
    spans, hidden_BTD = draw.spans(), draw.values(BATCH, LENGTH, WIDTH)
    hidden_BTD.view(-1, WIDTH)[spans.owner == NOWHERE] = float("nan")
    return (backend.span_mean(hidden_BTD, spans.rows, spans.starts, spans.lengths, spans.longest),)


def _hidden_gradient(backend: ModuleType, draw: _Draw) -> tuple[Tensor, ...]:
    rows = [0, 5, 69, 70, 148, 149, 297]
    supervised = Supervised.of(rows, rows, positions=BATCH * LENGTH).to(draw.device)
    spans, base_BTD = draw.spans(), draw.values(BATCH, LENGTH, WIDTH)
    parts = {
        "rows_gradient_ND": draw.values(len(rows), WIDTH),
        "rows_upstream": draw.values(1, dtype=torch.float32)[0],
        "slots_R": supervised.slots,
        "spans_gradient_AD": draw.values(len(spans), WIDTH, dtype=torch.float32) * 30,
        "lengths_A": spans.lengths,
        "owner_R": spans.owner,
    }
    return tuple(backend.hidden_gradient(base_BTD, base_BTD=base, **parts) for base in (base_BTD, None))


def _softmax_nll(backend: ModuleType, draw: _Draw) -> tuple[Tensor, ...]:
    logits_CV, targets_C = _scores(draw)
    alone_C = backend.softmax_nll(logits_CV, targets_C, None)
    learnt_C = backend.softmax_nll(logits_CV, targets_C, draw.values(5, dtype=torch.float32))
    return alone_C, learnt_C, logits_CV


def _contrastive_nll(backend: ModuleType, draw: _Draw) -> tuple[Tensor, ...]:
    scores_CG, own_C = _scores(draw)
    key_groups_G, weights_C = draw.indices(3, CLASSES), draw.values(5, dtype=torch.float32)
    nll_C = backend.contrastive_nll(scores_CG, own_C, key_groups_G[own_C], key_groups_G, weights_C)
    return nll_C, scores_CG


def _scores(draw: _Draw) -> tuple[Tensor, Tensor]:
    """(logits of five rows, targets); targets have about a third of the probability, so that errors in them show."""
    logits_CV, targets_C = draw.values(5, CLASSES) * 4, draw.indices(CLASSES, 5)
    return logits_CV.scatter(1, targets_C[:, None], 16.0), targets_C


def _row_distance(backend: ModuleType, draw: _Draw) -> tuple[Tensor, ...]:
    student_AE, teacher_AE = _row_pairs(draw)
    kinds = ("cosine", "smooth_l1")
    return tuple(result for kind in kinds for result in backend.row_distance(student_AE, teacher_AE, kind, EPS))


def _row_distance_gradient(backend: ModuleType, draw: _Draw) -> tuple[Tensor, ...]:
    student_AE, teacher_AE = _row_pairs(draw)
    upstream_A = draw.values(6, dtype=torch.float32)
    gradients = []
    for kind in ("cosine", "smooth_l1"):
        *_, statistics_A3 = backend.row_distance(student_AE, teacher_AE, kind, EPS)
        gradients.append(backend.row_distance_gradient(student_AE, teacher_AE, statistics_A3, upstream_A, kind, EPS))
    return tuple(gradients)


def _row_pairs(draw: _Draw) -> tuple[Tensor, Tensor]:
    """Six students and teachers, including a zero teacher, a student shorter than EPS and an opposite pair."""
    student_AE, teacher_AE = draw.values(6, TEACHER_WIDTH), draw.values(6, TEACHER_WIDTH, dtype=torch.float32)
    teacher_AE[0] = 0
    student_AE[1] *= 0.125
    student_AE[2, 7], teacher_AE[2, 7] = 32, -32
    return student_AE, teacher_AE


CHECKS: dict[str, Callable[[ModuleType, _Draw], tuple[Tensor, ...]]] = {
    "span_mean": _span_mean,
    "hidden_gradient": _hidden_gradient,
    "softmax_nll": _softmax_nll,
    "contrastive_nll": _contrastive_nll,
    "row_distance": _row_distance,
    "row_distance_gradient": _row_distance_gradient,
}
"""The checks by the function they test; `row_distance_gradient` also needs `row_distance`."""
