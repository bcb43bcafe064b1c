"""How similar the student's rationales are to the teacher's: the cosine of their sentence embeddings, and a baseline.

The training mean is subtracted from the vectors before they are compared, because raw sentence embeddings of
rationales for one task are nearly parallel. The baseline compares each rationale with the teacher's for other rows.
"""

# Shapes in this file: R rows with a rationale, E encoder width

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet
from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.evaluation.decoder import Decoder
from pst_dist.storage.manifest import MANIFEST
from pst_dist.student.contexts import Decoded

log = logging.getLogger(__name__)


def compare_rationales(
    config: Config,
    run: RunDir,
    decoder: Decoder,
    shards: ShardSet | None,
    samples: Sequence[ReasoningSample],
    decoded: Sequence[Decoded],
    rows: list[dict[str, Any]],
    *,
    in_shards: bool = True,
) -> dict[str, Any] | None:
    """Add rationales for the first evaluate.explain_rows rows to `rows`, and compare them with the teacher's.

    Returns {"mean", "shuffled_mean", "rows"}, or None if the arm writes no rationale, fewer than two rows have one on
    both sides, there are no embeddings, or their encoder is not available here. The teacher's vectors are the stored
    ones, or for samples that are not in the shards are computed here. Raises StaleError or IntegrityError when the
    embeddings do not belong to `shards`.
    """
    count = config.evaluate.explain_rows
    if not decoder.student.format.writes_rationale or not count:
        return None
    written = decoder.rationales(samples[:count], decoded[:count])
    for row, sample, rationale in zip(rows, samples, written, strict=False):
        row["rationale"] = rationale
        row["teacher_rationale"] = sample.rationales[0] if sample.rationales else None
    compared = [k for k, text in enumerate(written) if text and samples[k].rationales]
    if len(compared) < 2 or shards is None or not (run.embeddings / MANIFEST).is_file():
        return None
    pair = _vectors(config, run, shards, [written[k] for k in compared], [samples[k] for k in compared], in_shards)
    if pair is None:
        return None
    own, others = likeness(*pair)
    for k, value in zip(compared, own.tolist(), strict=True):
        rows[k]["similarity"] = value
    return {"mean": float(own.mean()), "shuffled_mean": others, "rows": len(compared)}


def _vectors(
    config: Config, run: RunDir, shards: ShardSet, texts: list[str], samples: list[ReasoningSample], in_shards: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """([R, E] of the texts, [R, E] of the teacher's first rationales), both centred; None without the encoder."""
    from pst_dist.embedding.encoder import TextEncoder
    from pst_dist.embedding.store import EmbeddingStore

    store = EmbeddingStore.open(run.embeddings, shards)
    try:
        encoder = TextEncoder(config.embed)
    except (EnvironmentFault, InputError) as error:  # the other scores do not need it
        log.warning("cannot compare rationales with the teacher's: %s", error)
        return None
    if encoder.identity != store.identity:
        log.warning("cannot compare rationales with the teacher's: the embeddings come from another encoder")
        return None
    if in_shards:
        teacher_RE = np.stack([store.vector(sample.id, 0) for sample in samples])
    else:
        teacher_RE = encoder.encode([sample.rationales[0] for sample in samples])
    return store.centred(encoder.encode(texts)), store.centred(teacher_RE)


def likeness(student_RE: np.ndarray, teacher_RE: np.ndarray) -> tuple[np.ndarray, float]:
    """([R] cosine of each row to its own teacher vector, mean cosine to those of all other rows); R is at least 2."""
    cosines = _unit(student_RE) @ _unit(teacher_RE).T
    own, count = np.diagonal(cosines), len(cosines)
    return own, float((cosines.sum() - own.sum()) / (count * (count - 1)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
