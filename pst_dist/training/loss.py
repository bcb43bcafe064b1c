"""The PST loss as sums and counts: the sum of each term, and the one place that divides.

L = w_answer * CE(y | x) + w_rationale * CE(r | x, y) + w_align * D(head(pool(h)), E(r))

arXiv 2404.09170 publishes the idea (answer first; a semantic similarity loss on one unique token) but not the
distance, the pooling or the weights, so each is an option here. Terms are summed on each rank in float32 and divided
once by counts of the whole global batch: the gradient does not depend on how that batch was split.
"""

# Shapes in this file: N supervised tokens, V vocabulary, A aligned spans, E teacher width, G global keys

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pst_dist.arms import ARMS
from pst_dist.config.schema import LossConfig
from pst_dist.kernels.contrastive import info_nce
from pst_dist.kernels.gather import symmetric_info_nce
from pst_dist.kernels.ops import row_distance

TERMS = ("answer", "rationale", "alignment")


@dataclass(frozen=True)
class PSTLossOutput:
    """One forward pass: its share of the global batch's loss, and the terms' sums (never means)."""

    loss: Tensor
    """[] float32 with gradient: the three sums, each times its scale, added together."""
    sums: Tensor
    """[3] float32 without gradient: answer NLL (nats over tokens), rationale NLL, alignment distance over spans."""
    cosine: Tensor
    """[] float32 without gradient: sum over spans of the cosine to the teacher, for the log."""
    spread: Tensor
    """[1 + E] float64 without gradient, when scoring: the sum of the squared cosines, then that of the students' unit
    vectors; empty in training and without spans."""


@dataclass(frozen=True)
class TermWeights:
    """Weights and denominators of the three terms for one global batch."""

    weights: tuple[float, float, float]
    denominator: str = "per_term"

    @classmethod
    def of(cls, loss: LossConfig, arm: str) -> TermWeights:
        """An arm's weights from the config; the prefix arm uses alpha and 1 - alpha."""
        if arm == "prefix":
            return cls((loss.alpha, 1 - loss.alpha, 0.0), loss.denominator)
        align = loss.alignment_weight if ARMS[arm].aligned else 0.0
        return cls((loss.answer_weight, loss.rationale_weight, align), loss.denominator)

    def scales(self, counts: Tensor) -> Tensor:
        """[3] float64: the factor of each sum, given the [3] counts of the global batch.

        A term that is absent from the batch counts as zero, not as 0/0. Raises ValueError for an unknown denominator.
        """
        if self.denominator not in ("per_term", "per_token"):
            raise ValueError(f"unknown denominator {self.denominator!r}: use 'per_term' or 'per_token'")
        counts = counts.double()
        if self.denominator == "per_token":
            tokens = counts[0] + counts[1]
            counts = torch.stack([tokens, tokens, counts[2]])
        weights = torch.tensor(self.weights, dtype=torch.float64, device=counts.device)
        return torch.where(counts > 0, weights / counts.clamp(min=1), torch.zeros_like(counts))


def spread_of(student_AE: Tensor, cosine_A: Tensor) -> Tensor:
    """`PSTLossOutput.spread` of projected students and their cosines."""
    units = F.normalize(student_AE.detach().double(), dim=-1, eps=1e-8)
    return torch.cat([cosine_A.double().square().sum()[None], units.sum(0)])


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] float32 negative log likelihoods in nats, from [N, V] logits of any dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def alignment_distance(
    student_AE: Tensor,
    teacher_AE: Tensor,
    *,
    keys_GE: Tensor,
    key_groups_G: Tensor,
    key_index_A: Tensor,
    capacity: int,
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """([A] float32 distances, [A] cosines without gradient) between projected students and their teachers.

    cosine: 1 - cos. smooth_l1: Huber distance with beta 1 of the unit vectors, summed over E. info_nce:
    cross-entropy of the positive key among all keys, at `loss.temperature`; other rows of the same question are masked
    (van den Oord et al., arXiv 1807.03748, with frozen keys, so no gradient crosses ranks). With `loss.symmetric`,
    half of it is the reverse cross-entropy: each key's own student among the students of all ranks, at most `capacity`
    per rank. That makes the call collective. Raises ValueError for an unknown distance.
    """
    if loss.alignment != "info_nce":
        return row_distance(student_AE, teacher_AE, kind=loss.alignment)
    _, cosine = row_distance(student_AE.detach(), teacher_AE, kind="cosine")
    units = (F.normalize(vectors.float(), dim=-1, eps=1e-8) for vectors in (student_AE, keys_GE))
    candidates = (*units, key_index_A, key_groups_G[key_index_A], key_groups_G)
    if loss.symmetric:
        return symmetric_info_nce(*candidates, temperature=loss.temperature, capacity=capacity), cosine
    return info_nce(*candidates, temperature=loss.temperature), cosine
