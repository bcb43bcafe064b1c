"""Embeds one shard: a pure function of encoder and shard, so it may run anywhere and any number of times.

It writes one `.safetensors` file, whose bytes `embedding.vector_file` defines, and returns a summary, from which
`embedding.embed` computes the mean and the manifest without reading the vectors again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.data.shards import ShardInfo, read_shard
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.vector_file import ShardVectors, read_vectors, write_vectors
from pst_dist.errors import IntegrityError
from pst_dist.storage.manifest import sha256_file

log = logging.getLogger(__name__)

# Shapes in this file: n rationales of a shard, E encoder width
FRACTION_BITS = 36
"""`fixed_point_sums` are in units of two to the power of minus this."""


@dataclass(frozen=True, eq=False)
class EmbeddedShard:
    """Summary of one finished embedding file, a few kilobytes, so that it need not be read again."""

    file: str
    bytes: int
    sha256: str
    """Of the whole file."""
    rows: int
    truncated: int
    sums: np.ndarray
    """[E] int64, the sum of its vectors in units of 2^-36; see `fixed_point_sums`."""
    encoded: bool
    """False when a complete file of this shard and encoder already existed."""


def embed_shard(
    encoder: TextEncoder,
    shards_directory: Path,
    shard: ShardInfo,
    target: Path,
    *,
    advance: Callable[[int], None] | None = None,
) -> EmbeddedShard:
    """Write the embedding file of one shard to `target`, unless it is there already, and return its summary.

    `advance` receives the number of texts of each encoded batch. Raises IntegrityError, and writes no file, when the
    shard differs from its manifest or a vector is zero or not finite.
    """
    path = shards_directory / shard.name
    check_shard(path, shard)
    samples = read_shard(path)
    keys = [(sample.id, k) for sample in samples for k in range(len(sample.rationales))]
    content = _current(target, encoder.identity, shard, keys)
    if content is not None:
        return _summary(target, content, encoded=False)
    texts = [rationale for sample in samples for rationale in sample.rationales]
    try:
        vectors = encoder.encode(texts, advance=advance)
    except IntegrityError as error:
        raise IntegrityError(f"{shard.name}: {error.what}", error.remedy, path=path) from error
    if vectors.shape != (len(keys), encoder.dimension):
        raise IntegrityError(f"{len(keys)} rationales gave vectors of shape {vectors.shape}", path=path)
    content = ShardVectors(keys, vectors, encoder.identity, shard.sha256, encoder.count_truncated(texts))
    write_vectors(target, content)
    return _summary(target, content, encoded=True)


def check_shard(path: Path, shard: ShardInfo) -> None:
    """Raise IntegrityError when a shard is missing or differs from its manifest."""
    if not path.is_file() or sha256_file(path) != shard.sha256:
        raise IntegrityError("shard is missing or differs from its manifest", "run `pst shard`", path=path)


def _current(
    path: Path, identity: dict[str, Any], shard: ShardInfo, keys: list[tuple[str, int]]
) -> ShardVectors | None:
    """The content of a complete file made from this shard by this encoder; otherwise None."""
    if not path.is_file():
        return None
    try:
        content = read_vectors(path)
    except IntegrityError as error:
        log.warning("embed: %s", error)
        return None
    found = (content.identity, content.shard_sha256, content.keys)
    return content if found == (identity, shard.sha256, keys) else None


def _summary(target: Path, content: ShardVectors, *, encoded: bool) -> EmbeddedShard:
    sums = fixed_point_sums(content.vectors)
    size, digest = target.stat().st_size, sha256_file(target)
    return EmbeddedShard(target.name, size, digest, len(content.keys), content.truncated, sums, encoded)


def fixed_point_sums(vectors: np.ndarray) -> np.ndarray:
    """[E] int64: the sums of n unit vectors [n, E] in units of 2^-36, each element rounded before it is added.

    Unlike floating-point sums, integer sums do not depend on order and grouping. So the mean has the same bits however
    many actors there are and whichever finishes first. Elements of 2^-12 and more are multiples of 2^-36 in float32 and
    lose nothing; smaller ones lose at most 2^-37. An int64 holds the sum of 2^26 rows.
    """
    total = np.zeros(vectors.shape[1], dtype=np.int64)
    for start in range(0, len(vectors), 4096):  # in blocks, so that the float64 copy stays small
        block = vectors[start : start + 4096].astype(np.float64)
        total += np.rint(np.ldexp(block, FRACTION_BITS)).astype(np.int64).sum(axis=0)
    return total
