"""The teacher's vectors as the loss uses them: centred, whitened, averaged, or (a control) those of another row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, expand_arms
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.errors import StaleError

log = logging.getLogger(__name__)

_WHITEN_ROWS = 65_536
_SHRINKAGE = 0.01


class Teacher:
    """Vectors by sample id and rationale index, [E] float32 of unit length."""

    def __init__(
        self,
        store: EmbeddingStore,
        *,
        centre: bool,
        shuffle_seed: int | None = None,
        whiten: bool = False,
        mean_of_all: bool = False,
    ) -> None:
        """`mean_of_all` returns the mean of a sample's vectors for every rationale index; `whiten` needs `centre`."""
        self.store, self.centre, self.mean_of_all = store, centre, mean_of_all
        self.dimension = store.dimension
        self.digest = store.manifest.digest
        self._stand_in: dict[tuple[str, int], tuple[str, int]] = {}
        self._of_sample: dict[str, list[int]] = {}
        self._whitening = whitening(store) if whiten else None
        if shuffle_seed is not None:
            self._stand_in = another_row(store.keys("train"), seed=shuffle_seed)
        if mean_of_all:
            for split in store.splits:
                for name, index in store.keys(split):
                    self._of_sample.setdefault(name, []).append(index)

    def vector(self, sample_id: str, rationale: int) -> np.ndarray:
        """[E] float32; raises IntegrityError when the sample has no embedding."""
        return self.vectors([(sample_id, rationale)])[0]

    def vectors(self, keys: Sequence[tuple[str, int]]) -> np.ndarray:
        """[n, E] float32, the vectors of n rationales in order; raises as `vector`."""
        if self._whitening is not None or self._of_sample:
            return np.stack([self._blended(*key) for key in keys])
        raw = self.store.vectors([self._stand_in.get(key, key) for key in keys] if self._stand_in else keys)
        return self.store.centred(raw) if self.centre else raw

    def _blended(self, sample_id: str, rationale: int) -> np.ndarray:
        """[E] float32: whitened, or the mean of all vectors of a sample, or both."""
        name, index = self._stand_in.get((sample_id, rationale), (sample_id, rationale))
        raw = self.store.vectors([(name, k) for k in self._of_sample.get(name, [index])])
        seen = self.store.centred(raw) if self.centre else raw
        if self._whitening is None and len(seen) == 1:
            return seen[0]
        if self._whitening is not None:
            seen = seen.astype(np.float64) @ self._whitening
            seen /= np.linalg.norm(seen, axis=-1, keepdims=True).clip(1e-30)
        mean = seen.mean(0, dtype=np.float64)
        return (mean / max(float(np.linalg.norm(mean)), 1e-30)).astype(np.float32)


def whitening(store: EmbeddingStore) -> np.ndarray:
    """[E, E] float64 W such that centred training vectors times W have about the same variance in every direction.

    W = (C + s * mean(diag C) * I)^(-1/2) with C their covariance (Kessy, Lewin and Strimmer, "Optimal whitening and
    decorrelation", The American Statistician 72 (2018), 309-314), from the first 65,536 of them in shard order. The
    shrinkage s = 0.01 limits the amplification of directions with almost no variance.
    """
    centred = store.centred(store.first_rows("train", _WHITEN_ROWS)).astype(np.float64)
    covariance = centred.T @ centred / max(1, len(centred))
    values, directions = np.linalg.eigh(covariance)
    values = values.clip(0) + _SHRINKAGE * max(float(values.mean()), 1e-30)
    return (directions / np.sqrt(values)) @ directions.T


def another_row(keys: list[tuple[str, int]], *, seed: int) -> dict[tuple[str, int], tuple[str, int]]:
    """A map without fixed points: each key to the next one in a shuffled cycle."""
    order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(keys))
    return {keys[here]: keys[there] for here, there in zip(order, np.roll(order, -1), strict=True)}


def _check_settings(config: Config, store: EmbeddingStore, directory: Path) -> None:
    """Refuse vectors made with a prefix, length, width, precision, layer or pooling other than the config's."""
    embed = config.embed
    names = ("prefix", "max_seq_length", "truncate_dim", "dtype", "layer", "pooling")
    wanted: dict[str, Any] = {name: getattr(embed, name) for name in names}
    layers = store.identity.get("layers")
    if embed.layer is not None and embed.layer < 0 and layers is not None:
        wanted["layer"] = layers + 1 + embed.layer
    for name, value in wanted.items():
        # An unset prefix, length, width, layer or pooling means the encoder's own, which is unknown here.
        made_with = store.identity.get(name)
        if value and made_with != value:
            raise StaleError(
                f"the embeddings were made with {name}={made_with!r}, but the config has {value!r}",
                "run `pst embed --rebuild`, or undo the change",
                path=directory,
            )


def open_teacher(config: Config, run: RunDir, shards: ShardSet) -> Teacher | None:
    """The vectors that an arm aligns with, or None for an arm without alignment.

    As a control, a `pst` run with alignment_weight 0 keeps its semantic token and needs no embeddings.
    """
    if not ARMS[config.arm].aligned or config.loss.alignment_weight == 0:
        return None
    store = EmbeddingStore.open(Path(run.embeddings), shards, encoder=config.embed.encoder)
    _check_settings(config, store, Path(run.embeddings))
    shuffled = config.loss.control == "shuffle_embeddings"
    return Teacher(
        store,
        centre=config.loss.centre,
        shuffle_seed=config.seed if shuffled else None,
        whiten=config.loss.whiten,
        mean_of_all=config.loss.rationales == "mean",
    )


def needs_embeddings(config: Config) -> bool:
    """Whether any arm of this config aligns with the teacher's embeddings."""
    return config.loss.alignment_weight > 0 and any(ARMS[arm.arm].aligned for arm in expand_arms(config))
