"""The golden losses, and the settings of each case that has some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_dist.arms import ARMS

GOLDEN = Path(__file__).resolve().parents[1] / "training" / "golden_losses.txt"
CASES: dict[str, dict[str, Any]] = {arm: {"arm": arm} for arm in ARMS} | {
    "pst-t5": {"student__fresh__architecture": "t5"},
    "pst-llama": {"student__fresh__architecture": "llama"},
    "pst-pure": {"loss__rationale_weight": 0},
    "pst-before": {"layout__semantic_position": "before"},
    "pst-span": {"loss__pooling": "span"},
    "pst-nce": {"loss__alignment": "info_nce"},
    "pst-uncentred": {"loss__centre": False},
    "pst-shuffled": {"loss__control": "shuffle_embeddings"},
    "pst-unaligned": {"loss__alignment_weight": 0},
    "post-shuffled": {"arm": "post_thinking", "loss__control": "shuffle_rationale_tokens"},
}
"""Case -> the changes of `small_config` that it trains with."""


def golden() -> dict[str, list[float]]:
    """Case -> losses of its eight steps, from the text file."""
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    return {words[0]: [float(word) for word in words[1:]] for words in lines}
