"""The store: vectors joined by id and digest, and files that are not what the manifest promises refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from embedded import sample
from safetensors.numpy import save

from pst_dist.embedding.store import EmbeddingStore, VectorFile
from pst_dist.embedding.vector_file import ShardVectors, read_vectors, write_vectors
from pst_dist.errors import InputError, IntegrityError, StaleError
from pst_dist.storage.manifest import Manifest

needs_encoder = pytest.mark.encoder


@needs_encoder
def test_vectors_are_found_by_id_and_rationale(finished, encoder):
    store = EmbeddingStore.open(finished[1], finished[0], encoder="minilm")
    assert store.dimension == 384 and store.identity == encoder.identity
    for number, k in ((2, 1), (8, 0), (100, 0)):
        text = sample(number, k + 1).rationales[k]
        assert np.abs(store.vector(f"row-{number}", k) - encoder.encode([text])[0]).max() <= 1e-6
    for key in (("row-0", 0), ("row-1", 1), ("row-50", 0), ("nobody", 0)):
        with pytest.raises(IntegrityError, match=f"no embedding for rationale {key[1]} of '{key[0]}'"):
            store.vector(*key)


@needs_encoder
def test_rows_of_a_split_come_in_shard_order_and_the_mean_is_that_of_train(finished):
    store = EmbeddingStore.open(finished[1], finished[0])
    keys, vectors = store.rows("train")
    assert keys == [(f"row-{i}", k) for i in range(9) for k in range(i % 3)]
    assert vectors.shape == (9, 384) and vectors.dtype == np.float32
    assert np.allclose(store.mean, np.mean([store.vector(*key) for key in keys], axis=0), atol=1e-7)
    assert store.mean.dtype == np.float32 and store.mean.shape == (384,)
    assert store.rows("validation")[0] == [] and store.rows("validation")[1].shape == (0, 384)
    assert len(store.rows("test")[0]) == 2
    with pytest.raises(InputError, match="no split 'dev'"):
        store.rows("dev")


def test_centring_subtracts_the_mean_and_keeps_rows_of_zeros():
    manifest = Manifest("embeddings", "f", {}, {"encoder": {"dimension": 2}})
    store = EmbeddingStore(manifest, np.array([0.6, 0.0], dtype=np.float32), {})
    # (1, 0) - mean points along x; (0.6, 0.8) - mean along y; nothing stays nothing; the mean itself has no direction.
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 0], [0.6, 0]], dtype=np.float32)
    centred = store.centred(vectors)
    assert np.allclose(centred, [[1, 0], [0, 1], [0, 0], [0, 0]], atol=1e-6) and centred.dtype == np.float32
    assert np.allclose(store.centred(vectors[0]), [1, 0])


def in_use() -> tuple[int, int]:
    """How many files and maps this process holds."""
    return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())


def test_thousands_of_files_are_neither_kept_open_nor_mapped(tmp_path):
    identity = {"dimension": 4}
    angles = np.linspace(0, 1, 3000, dtype=np.float64)
    vectors = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], axis=1).astype(np.float32)
    files = []
    before = in_use()
    for number in range(1500):
        path = tmp_path / f"train-{number:06d}.safetensors"
        rows = slice(2 * number, 2 * number + 2)
        keys = [(f"r{i}", 0) for i in range(3000)[rows]]
        write_vectors(path, ShardVectors(keys, vectors[rows], identity, "s", 0))
        files.append(VectorFile.of(path, read_vectors(path)))
    manifest = Manifest("embeddings", "f", {}, {"encoder": identity})
    store = EmbeddingStore(manifest, np.zeros(4, np.float32), {"train": files})
    keys, everything = store.rows("train")
    assert np.array_equal(everything, vectors) and keys[2999] == ("r2999", 0)
    assert all(np.array_equal(store.vector(f"r{i}"), vectors[i]) for i in range(0, 3000, 7))
    after = in_use()
    assert after[0] - before[0] < 20 and after[1] - before[1] < 200


def test_a_file_that_is_exchanged_while_it_is_in_use_is_noticed(tmp_path):
    path = tmp_path / "train-000000.safetensors"
    content = ShardVectors([("r", 0)], np.array([[1, 0]], np.float32), {"dimension": 2}, "s", 0)
    write_vectors(path, content)
    manifest = Manifest("embeddings", "f", {}, {"encoder": {"dimension": 2}})
    files = {"train": [VectorFile.of(path, read_vectors(path))]}
    store = EmbeddingStore(manifest, np.zeros(2, np.float32), files)
    assert store.vector("r").tolist() == [1, 0]
    write_vectors(path, replace(content, vectors=np.array([[0, 1]], np.float32)))
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        store.vector("r")
    path.unlink()
    with pytest.raises(IntegrityError, match="cannot be read: No such file"):
        store.vector("r")


@needs_encoder
def test_embeddings_by_another_encoder_are_refused_with_both_names(finished):
    with pytest.raises(StaleError, match=r"by encoder 'minilm', but the config asks for 'org/other'.*pst embed"):
        EmbeddingStore.open(finished[1], finished[0], encoder="org/other")


def rewrite(directory: Path, name: str, **changes) -> None:
    """Replace one file by another well-formed one and let the manifest promise it: only the content is wrong."""
    path = directory / name
    old = read_vectors(path)
    write_vectors(path, type(old)(**{**old.__dict__, "vectors": np.array(old.vectors), **changes}))
    _promise(directory, name)


def _promise(directory: Path, name: str) -> None:
    from pst_dist.storage.manifest import describe_files, read_manifest, write_manifest

    manifest = read_manifest(directory, "embeddings")
    assert manifest is not None
    files = {**manifest.files, **describe_files(directory, [name])}
    write_manifest(directory, Manifest(manifest.kind, manifest.fingerprint, files, manifest.extra))


NAME = "train-000000.safetensors"


@needs_encoder
def test_rows_under_the_wrong_ids_are_refused(copied):
    shards, directory = copied
    rewrite(directory, NAME, keys=[("row-2", 0), ("row-1", 0), ("row-2", 1)])
    with pytest.raises(StaleError, match=r"do not match the rationales of train-000000\.tar"):
        EmbeddingStore.open(directory, shards)


@needs_encoder
def test_a_row_too_few_is_refused(copied):
    shards, directory = copied
    old = read_vectors(directory / NAME)
    rewrite(directory, NAME, vectors=np.array(old.vectors[:2]))
    with pytest.raises(IntegrityError, match=r"3 keys, vectors of shape \(2, 384\)"):
        EmbeddingStore.open(directory, shards)


@needs_encoder
@pytest.mark.parametrize("value", [np.nan, 0.0, 2.0])
def test_a_row_that_is_no_unit_vector_is_refused_by_its_id(copied, value):
    shards, directory = copied
    vectors = np.array(read_vectors(directory / NAME).vectors)
    vectors[1] *= value
    rewrite(directory, NAME, vectors=vectors)
    with pytest.raises(IntegrityError, match=r"row 1 \(row-2\) is not a unit vector"):
        EmbeddingStore.open(directory, shards)


@needs_encoder
def test_a_file_of_another_encoder_among_the_others_is_refused(copied):
    shards, directory = copied
    identity = {**read_vectors(directory / NAME).identity, "prefix": "other"}
    rewrite(directory, NAME, identity=identity)
    with pytest.raises(IntegrityError, match="by an encoder other than the manifest's"):
        EmbeddingStore.open(directory, shards)


@needs_encoder
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle",
        save({"vectors": np.zeros((3, 384), np.float16)}),
        save({"vectors": np.zeros((3, 384), np.float32)}),
        save({"vectors": np.zeros((3, 384), np.float32), "more": np.zeros(3, np.float32)}, {"pst": "{}"}),
        save({"vectors": np.zeros((3, 384), np.float32)}, {"pst": '{"keys": 7}'}),
    ],
)
def test_a_file_that_is_not_one_of_ours_is_refused(copied, content):
    shards, directory = copied
    (directory / NAME).write_bytes(content)
    _promise(directory, NAME)
    with pytest.raises(IntegrityError, match=r"train-000000\.safetensors"):
        EmbeddingStore.open(directory, shards)
