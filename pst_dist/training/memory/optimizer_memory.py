"""Bytes of optimizer state that `train.optim` needs, for the plan."""

from __future__ import annotations

from pst_dist.config.schema import Config
from pst_dist.training.memory.model_size import ModelShape

_ADAM = 8.0
"""Two float32 moments."""
_OF_MATRICES = {"adamw": _ADAM, "muon": 4.0, "adamw_8bit": 2 * (1 + 4 / 256)}
"""Bytes a weight of a hidden matrix: Muon keeps one float32 moment; 8-bit AdamW two of a byte, with a float32 scale for
every 256 (Dettmers et al., arXiv 2110.02861, section 2)."""


def optimizer_bytes(config: Config, shape: ModelShape, trained: int) -> float:
    """Bytes of moments of `trained` parameters in one process; all but the embeddings count as hidden matrices."""
    if config.student.lora.rank:
        hidden = float(trained)
    else:
        hidden = max(0.0, trained - float(shape.vocabulary * shape.hidden_size))
    return _OF_MATRICES[config.train.optim] * hidden + _ADAM * (trained - hidden)
