"""Names the controls and ablations of a config, for results, pages and model cards."""

from __future__ import annotations

from pst_dist.arms import ARMS
from pst_dist.config.schema import Config


def variant_of(config: Config) -> list[str]:
    """What sets a run apart from its arm's plain form: the controls and ablations, in words."""
    words = {"shuffle_embeddings": "shuffled embeddings", "shuffle_rationale_tokens": "shuffled rationale tokens"}
    variant = [words[config.loss.control]] if config.loss.control in words else []
    arm = ARMS[config.arm]
    if arm.aligned and config.loss.alignment_weight == 0:
        variant.append("no alignment")
    if arm.needs_rationale and config.loss.rationale_weight == 0:
        variant.append("no rationale tokens")
    if arm.aligned and config.layout.semantic_position == "before":
        variant.append("semantic token before")
    if arm.aligned and config.loss.alignment_weight > 0 and not config.loss.centre:
        variant.append("not centred")
    if arm.aligned and config.loss.alignment_weight > 0:
        loss = config.loss
        variant += ["whitened"] if loss.whiten else []
        variant += [f"layer {loss.layer}"] if loss.layer is not None else []
        variant += ["mean of all rationales"] if loss.rationales == "mean" else []
        variant += ["fitted head"] if loss.head_init == "ridge" else []
        variant += [f"alignment share {loss.alignment_share:g}"] if loss.alignment_share is not None else []
    if not arm.answers_first and config.evaluate.rationale != "own":
        variant.append(f"given {config.evaluate.rationale} rationales")
    if arm.needs_rationale and config.data.wrong_rationales:
        variant.append(f"{100 * config.data.wrong_rationales:g} % wrong rationales")
    return variant
