"""What the loss sees of real embeddings: centred, whitened, averaged over wordings, or another row's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_run import small_config

from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.embedding.targets import Teacher, open_teacher, whitening
from pst_dist.pipeline import make_embeddings, make_shards

pytestmark = pytest.mark.encoder


@pytest.fixture(scope="module")
def worded(tmp_path_factory) -> tuple[Config, EmbeddingStore]:
    """Rows of three wordings each, with their embeddings."""
    folder = tmp_path_factory.mktemp("worded")
    config = small_config(
        folder / "data", folder / "run", data__train="gen:last_letters?rows=40&words=2&wordings=3", data__test=None
    )
    make_shards(config)
    make_embeddings(config)
    return config, EmbeddingStore.open(folder / "data" / "embeddings", ShardSet.open(folder / "data" / "shards"))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_a_vector_is_the_stored_one_or_the_stored_one_around_the_mean(worded):
    _, store = worded
    keys, raw = store.rows("train")
    plain, centred = Teacher(store, centre=False), Teacher(store, centre=True)
    for key, vector in zip(keys[:5], raw, strict=False):
        assert np.array_equal(plain.vector(*key), vector)
        assert np.allclose(centred.vector(*key), unit(vector - store.mean), atol=1e-6)


def test_whitening_evens_out_the_variance_of_the_training_vectors(worded):
    _, store = worded
    centred = store.centred(store.rows("train")[1]).astype(np.float64)
    before = np.linalg.eigvalsh(centred.T @ centred / len(centred))
    white = centred @ whitening(store)
    after = np.linalg.eigvalsh(white.T @ white / len(white))
    rank = 60  # of 96 rows in 384 directions
    assert before[-1] / before[-rank] > 20
    assert after[-1] / after[-rank] < 2 and after[-1] < 1 + 1e-9
    assert np.allclose(whitening(store), whitening(store).T)


def test_a_whitened_vector_is_a_unit_vector_by_that_matrix(worded):
    _, store = worded
    teacher = Teacher(store, centre=True, whiten=True)
    keys, raw = store.rows("train")
    expected = unit(store.centred(raw[:5]).astype(np.float64) @ whitening(store))
    for key, vector in zip(keys, expected, strict=False):
        assert np.allclose(teacher.vector(*key), vector, atol=1e-6)
        assert teacher.vector(*key).dtype == np.float32


def test_rows_that_resemble_one_another_are_further_apart_when_whitened(worded):
    _, store = worded
    keys = [(name, 0) for name, index in store.keys("train") if index == 0]

    def closest(teacher: Teacher) -> float:
        """How like its most similar other row a row is, on the mean."""
        vectors = np.stack([teacher.vector(*key) for key in keys])
        cosines = vectors @ vectors.T - 2 * np.eye(len(keys))
        return float(cosines.max(axis=1).mean())

    raw, centred = closest(Teacher(store, centre=False)), closest(Teacher(store, centre=True))
    assert closest(Teacher(store, centre=True, whiten=True)) < centred - 0.1 < raw - 0.2


def test_the_mean_of_all_rationales_is_the_same_for_each_of_them(worded):
    _, store = worded
    name = store.keys("train")[0][0]
    turns, mean = Teacher(store, centre=True), Teacher(store, centre=True, mean_of_all=True)
    seen = np.stack([turns.vector(name, k) for k in range(3)])
    assert len({row.tobytes() for row in seen}) == 3
    expected = unit(seen.astype(np.float64).mean(0))
    assert all(np.allclose(mean.vector(name, k), expected, atol=1e-6) for k in range(3))


def test_a_config_opens_the_teacher_that_it_describes(worded):
    config, store = worded
    loss = config.loss.model_copy(update={"whiten": True, "rationales": "mean", "control": "shuffle_embeddings"})
    run, shards = run_dir(config), ShardSet.open(Path(run_dir(config).shards))
    teacher = open_teacher(config.model_copy(update={"loss": loss}), run, shards)
    other = Teacher(store, centre=True, whiten=True, mean_of_all=True, shuffle_seed=config.seed)
    key = store.keys("train")[4]
    assert np.array_equal(teacher.vector(*key), other.vector(*key))
    assert not np.allclose(teacher.vector(*key), Teacher(store, centre=True, whiten=True).vector(*key), atol=0.1)
