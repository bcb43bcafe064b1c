"""Identifies the weights that a student starts from, by the digests of their files or by a commit of the hub.

A run records the identity, so that it notices when the base model has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pst_dist.models import adapters
from pst_dist.models.load import load_model_config
from pst_dist.models.locate import WEIGHT_SUFFIXES, ModelPlace
from pst_dist.storage.manifest import digest_of, sha256_file


@functools.lru_cache(maxsize=8)
def base_identity(place: ModelPlace) -> dict[str, Any]:
    """The identity of a model's weights: `sha256`, `revision` and `quantised`, each None where it is unknown.

    `sha256` is that of a GGUF file, or a digest over the names and digests of a folder's weight files; with
    adapters, it covers them and the base. `revision` is the commit of a hub id. `quantised` is the most frequent
    low-bit type of a GGUF file, such as Q4_1.
    """
    return identity_of(place, {path: sha256_file(path) for path in files_of_identity(place)})


def files_of_identity(place: ModelPlace) -> list[Path]:
    """The files whose digests `identity_of` needs: weights in local folders, and adapters."""
    if place.adapters:
        own = [Path(place.adapters[-1]) / name for name in (adapters.CONFIG, adapters.WEIGHTS)]
        return [*files_of_identity(replace(place, adapters=place.adapters[:-1])), *own]
    if place.gguf is not None:
        return [Path(place.target) / place.gguf]
    folder = Path(place.target).expanduser()
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES) if folder.is_dir() else []


def identity_of(place: ModelPlace, sha256: Mapping[Path, str]) -> dict[str, Any]:
    """`base_identity`, given the digests of `files_of_identity`, which several ranks may have computed."""
    if place.adapters:
        below = identity_of(replace(place, adapters=place.adapters[:-1]), sha256)
        own = {name: sha256[Path(place.adapters[-1]) / name] for name in (adapters.CONFIG, adapters.WEIGHTS)}
        return below | {"sha256": digest_of({"base": below, "adapter": own})}
    identity: dict[str, Any] = {"sha256": None, "revision": None, "quantised": None}
    files = files_of_identity(place)
    if place.gguf is not None:
        return identity | {"sha256": sha256[files[0]], "quantised": _quantised_type(files[0])}
    if Path(place.target).expanduser().is_dir():
        return identity | {"sha256": digest_of({path.name: sha256[path] for path in files}) if files else None}
    return identity | {"revision": getattr(load_model_config(place), "_commit_hash", None) or place.revision}


def _quantised_type(file: Path) -> str | None:
    """The most frequent type of a GGUF file's tensors that is not a float; None when all are floats."""
    from collections import Counter

    from gguf import GGUFReader

    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(str(file)).tensors)
    low = [kind for kind, _ in kinds.most_common() if kind not in ("F32", "F16", "BF16", "F64")]
    return low[0] if low else None
