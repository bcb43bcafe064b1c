"""The teacher's vectors as the loss is to see them: centred, or (a control) those of another row."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from pst_dist.config import Config
from pst_dist.embeddings import EmbeddingStore
from pst_dist.errors import StaleError
from pst_dist.layout import ARMS
from pst_dist.rundir import RunDir
from pst_dist.shards import ShardSet

log = logging.getLogger(__name__)


class Teacher:
    """Vectors by sample id and rationale index, [E] float32 of unit length."""

    def __init__(self, store: EmbeddingStore, *, centre: bool, shuffle_seed: int | None) -> None:
        self.store, self.centre = store, centre
        self.dimension = store.dimension
        self.digest = store.manifest.digest
        self._stand_in: dict[tuple[str, int], tuple[str, int]] = {}
        if shuffle_seed is not None:
            keys, _ = store.rows("train")
            self._stand_in = another_row(keys, seed=shuffle_seed)

    def vector(self, sample_id: str, rationale: int) -> np.ndarray:
        """[E] float32; raises StaleError when the sample has no embedding."""
        raw = self.store.vector(*self._stand_in.get((sample_id, rationale), (sample_id, rationale)))
        return self.store.centred(raw[None])[0] if self.centre else raw


def another_row(keys: list[tuple[str, int]], *, seed: int) -> dict[tuple[str, int], tuple[str, int]]:
    """A map without fixed points: each key to the next one of a shuffled circle."""
    order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(keys))
    return {keys[here]: keys[there] for here, there in zip(order, np.roll(order, -1), strict=True)}


def _check_settings(config: Config, store: EmbeddingStore, directory: Path) -> None:
    """Refuse vectors made with another prefix, length or precision than the config now says."""
    wanted = {"prefix": config.embed.prefix, "max_seq_length": config.embed.max_seq_length, "dtype": config.embed.dtype}
    for name, value in wanted.items():
        # An unset prefix or length is the encoder's own, which only the encoder knows.
        if value and store.identity[name] != value:
            raise StaleError(
                f"made with {name}={store.identity[name]!r}, the config says {value!r}",
                "run `pst embed --rebuild`, or undo the change",
                path=directory,
            )


def open_teacher(config: Config, run: RunDir, shards: ShardSet) -> Teacher | None:
    """The vectors that an arm aligns with, or None for an arm without alignment.

    A `pst` run with alignment_weight 0 keeps its semantic token and needs no embeddings: that is a control.
    """
    if not ARMS[config.arm].aligned or config.loss.alignment_weight == 0:
        return None
    store = EmbeddingStore.open(Path(run.embeddings), shards, encoder=config.embed.encoder)
    _check_settings(config, store, Path(run.embeddings))
    shuffled = config.loss.control == "shuffle_embeddings"
    return Teacher(store, centre=config.loss.centre, shuffle_seed=config.seed if shuffled else None)
