"""What training changed in an encoder, measured on rationales that it was not trained on, and the card that says so."""

# Shapes in this file: n rationales, E encoder width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pst_dist.embedding.contrast import Triplets
from pst_dist.embedding.encoder import TextEncoder


def measure(encoder: TextEncoder, examples: Triplets) -> dict[str, float | int] | None:
    """What the encoder makes of examples that it is not trained on; None without any.

    `to_negative` and `to_others` are the mean cosines of a rationale to its hard negatives and to rationales of other
    rows; `to_positive` to another correct rationale of its question, where there is one.
    """
    rows = examples.rows
    if not rows:
        return None
    anchors_nE = encoder.encode([row.anchor for row in rows])
    firsts_nE = encoder.encode([row.negatives[0] for row in rows])
    paired = [k for k, row in enumerate(rows) if row.positive != row.anchor]
    result: dict[str, float | int] = {"rationales": len(rows), "to_negative": _cosine(anchors_nE, firsts_nE)}
    if len(rows) > 1:
        total = anchors_nE.astype("float64").sum(0)
        result["to_others"] = float((total @ total - len(rows)) / (len(rows) * (len(rows) - 1)))
    if paired:
        result["to_positive"] = _cosine(anchors_nE[paired], encoder.encode([rows[k].positive for k in paired]))
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in result.items()}


def _cosine(one_nE: np.ndarray, other_nE: np.ndarray) -> float:
    """Mean cosine of the rows of two blocks of unit vectors."""
    return float((one_nE.astype("float64") * other_nE.astype("float64")).sum(1).mean())


_NAMES = {
    "to_positive": "another correct rationale of the question",
    "to_negative": "the rationale with another conclusion",
    "to_others": "rationales of other questions",
}


def _changes(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(to what, mean cosine before, after); empty without validation rationales."""
    before, after = report["before"] or {}, report["after"] or {}
    return [(_NAMES[key], f"{before[key]:.3f}", f"{after[key]:.3f}") for key in _NAMES if key in before]


def lines(report: Mapping[str, Any]) -> list[str]:
    """What changed, as a table for a terminal."""
    if report["before"] is None:
        return ["no validation rationales to measure on"]
    rows = [("mean cosine to", "before", "after"), *_changes(report)]
    width = max(len(row[0]) for row in rows)
    return [f"{row[0]:<{width}}  {row[1]:>6}  {row[2]:>6}" for row in rows]


def card(report: Mapping[str, Any], rationales: int) -> str:
    """The text of README.md in the encoder's folder."""
    table = ["| mean cosine on validation rows to | before | after |", "|---|---:|---:|"]
    table += [f"| {' | '.join(row)} |" for row in _changes(report)]
    base = report["base"]
    return "\n".join(
        [
            "---",
            "library_name: sentence-transformers",
            "---",
            "",
            "# A sentence encoder for rationales",
            "",
            f"Trained with `pst encoder train` from {base['encoder']} on {rationales:,} rationales for",
            f"{report['epochs']} epochs ({report['steps']:,} steps of {report['batch_size']}, learning rate",
            f"{report['learning_rate']:g}, seed {report['seed']}), with {report['negatives']} hard negatives for each.",
            f"{report['paired']:,} rationales had another correct one of the same question as their positive.",
            "",
            *(table if report["before"] is not None else ["There were no validation rows to measure on."]),
            "",
            "A lower cosine to a rationale with another conclusion does not show that a student learns more from it.",
            "`pst probe` measures how well the vectors predict the answer. Proof needs a run and its control.",
            "",
            f"Digest of the examples: `{report['examples']}`.",
            "",
        ]
    )
