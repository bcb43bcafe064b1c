"""One optimizer step in numbers: each loss term raw and weighted, with the norm of its gradient at the hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pst_dist.training.loss import TERMS

LEARNT = 0.05
"""Nats per token, or distance: a term below this counts as learnt."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step over the global batch."""

    step: int
    """Steps done, including this one."""
    raw: dict[str, float]
    """Mean of each present term: nats per token, distance per sample."""
    weighted: dict[str, float]
    """Each present term's share of the loss; the shares sum to it."""
    cosine: float | None
    """Mean cosine to the teacher; None without alignment."""
    gradients: dict[str, float] | None
    """Norm of each present term's gradient at the hidden state; None when not measured."""
    grad_norm: float
    """Global gradient norm over all parameters, before clipping."""
    learning_rate: float
    tokens: int
    """Tokens of all sequences over all ranks, without padding."""
    padding: float
    """The share of the positions computed over all ranks that is padding, 0 … 1."""

    @classmethod
    def of(
        cls,
        *,
        step: int,
        sums: Tensor,
        counts: Tensor,
        scales: Tensor,
        cosine: float,
        gradients: Tensor | None,
        grad_norm: float,
        learning_rate: float,
        tokens: int,
        padding: float,
    ) -> StepRecord:
        """From [3] sums, counts, scales and gradient norms in the order of `loss.TERMS`."""
        present = [index for index, count in enumerate(counts.tolist()) if count > 0]
        return cls(
            step=step,
            raw={TERMS[k]: float(sums[k] / counts[k]) for k in present},
            weighted={TERMS[k]: float(sums[k] * scales[k]) for k in present},
            cosine=cosine / float(counts[2]) if counts[2] else None,
            gradients=None if gradients is None else {TERMS[k]: float(gradients[k]) for k in present},
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            padding=padding,
        )

    @property
    def loss(self) -> float:
        """The weighted total."""
        return sum(self.weighted.values())

    @property
    def alignment_weight(self) -> float | None:
        """The weight of the alignment term in this step; None without the term."""
        raw = self.raw.get("alignment")
        return self.weighted["alignment"] / raw if raw else None

    def gradient_shares(self) -> dict[str, float]:
        """Each term's norm over the sum of norms, 0 … 1."""
        total = sum((self.gradients or {}).values())
        return {name: value / total for name, value in (self.gradients or {}).items()} if total > 0 else {}

    def unbalanced(self) -> dict[str, float]:
        """Shares of unlearnt terms that make under 1 % or over 99 % of the gradient; empty for a single such term."""
        to_learn = {name: share for name, share in self.gradient_shares().items() if self.raw[name] > LEARNT}
        return {name: share for name, share in to_learn.items() if len(to_learn) > 1 and not 0.01 <= share <= 0.99}

    def row(self) -> dict[str, Any]:
        """The JSON line, without clock-dependent fields."""
        row: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "padding": self.padding,
        }
        names = {"answer": "answer_nll", "rationale": "rationale_nll", "alignment": "alignment"}
        row |= {names[name]: value for name, value in self.raw.items()}
        row |= {f"weighted_{name}": value for name, value in self.weighted.items()}
        if self.cosine is not None:
            row["cosine"] = self.cosine
        row |= {f"gradient_{name}": value for name, value in (self.gradients or {}).items()}
        row |= {f"gradient_share_{name}": value for name, value in self.gradient_shares().items()}
        return row
