"""The bytes of one embedding file: safetensors with one float32 tensor and one metadata key.

safetensors detects a truncated file but not a changed one, so the metadata contains the tensor's digest, together with
the encoder and the shard it comes from. `embedding.embed` decides what is computed and when.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.errors import IntegrityError
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.manifest import canonical_json

EMBED_AGAIN = "run `pst embed`"
STATISTICS = "statistics.safetensors"
"""The file with the centring mean, in the same folder as the shards' files."""
_UNIT_TOLERANCE = 1e-3
_META = "pst"  # one metadata key only: safetensors writes several in no fixed order

# Shapes in this file: n rationales of a shard, E encoder width


@dataclass(frozen=True)
class ShardVectors:
    """The content of one embedding file."""

    keys: list[tuple[str, int]]
    """(sample id, rationale index) of each row."""
    vectors: np.ndarray
    """[n, E] float32, unit rows, mapped from the file."""
    identity: dict[str, Any]
    """Identity of the encoder that made them (`TextEncoder.identity`)."""
    shard_sha256: str
    """SHA-256 of the tar they were made from."""
    truncated: int
    """Number of rationales that were longer than the encoder's limit."""


def write_vectors(path: Path, content: ShardVectors) -> None:
    """Write one embedding file atomically; equal content gives equal bytes."""
    write_tensor(
        path,
        "vectors",
        content.vectors,
        {
            "encoder": content.identity,
            "shard_sha256": content.shard_sha256,
            "keys": content.keys,
            "truncated": content.truncated,
        },
    )


def write_tensor(path: Path, name: str, tensor: np.ndarray, meta: dict[str, Any]) -> None:
    """Write one tensor as float32, with its digest and `meta` in the header."""
    from safetensors.numpy import save

    tensor = np.ascontiguousarray(tensor, dtype="<f4")
    header = {_META: canonical_json({**meta, "tensor_sha256": hashlib.sha256(tensor.data).hexdigest()})}
    with atomic_path(path) as partial:
        partial.write_bytes(save({name: tensor}, metadata=header))


def read_vectors(path: Path, *, verify: bool = True) -> ShardVectors:
    """Map one embedding file; raises IntegrityError when it is not a valid one.

    `verify` compares the vectors with their digest and requires unit vectors, so that a resumed run can trust a file
    that a killed run left without a manifest.
    """
    meta, vectors = read_tensor(path, "vectors", verify=verify)
    try:
        content = ShardVectors(
            keys=[(str(key), int(k)) for key, k in meta["keys"]],
            vectors=vectors,
            identity=dict(meta["encoder"]),
            shard_sha256=str(meta["shard_sha256"]),
            truncated=int(meta["truncated"]),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise IntegrityError(f"not an embedding file: {error!r}", EMBED_AGAIN, path=path) from error
    if vectors.shape != (len(content.keys), content.identity.get("dimension")):
        raise IntegrityError(f"{len(content.keys)} keys, vectors of shape {vectors.shape}", EMBED_AGAIN, path=path)
    if verify:
        good = np.abs(np.einsum("ne,ne->n", vectors, vectors) - 1) <= _UNIT_TOLERANCE  # NaN compares false
        if not good.all():
            row = int(np.argmin(good))
            raise IntegrityError(f"row {row} ({content.keys[row][0]}) is not a unit vector", EMBED_AGAIN, path=path)
    return content


def read_tensor(path: Path, name: str, *, verify: bool = True) -> tuple[dict[str, Any], np.ndarray]:
    """Metadata and the one float32 tensor of a file, mapped and read-only; raises IntegrityError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as stream:
            meta = json.loads((stream.metadata() or {}).get(_META, "null"))
            entry = stream.get_slice(name)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        with path.open("rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")  # length of the header, the header, then the tensor
        if dtype != "F32" or not isinstance(meta, dict) or path.stat().st_size != start + 4 * int(np.prod(shape)):
            raise ValueError(f"{name!r} is {dtype} {shape}, not a single float32 tensor")
        empty = 0 in shape
        tensor = np.empty(shape, np.float32) if empty else np.memmap(path, "<f4", "r", offset=start, shape=shape)
    except (SafetensorError, OSError, ValueError, ArithmeticError, RecursionError) as error:
        raise IntegrityError(f"not an embedding file: {error}", EMBED_AGAIN, path=path) from error
    if verify and hashlib.sha256(tensor.data).hexdigest() != meta.get("tensor_sha256"):
        raise IntegrityError("the vectors do not match their digest", EMBED_AGAIN, path=path)
    return meta, tensor
