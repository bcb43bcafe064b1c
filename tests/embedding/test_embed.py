"""Embedding shards: equal bytes, no work done twice, and what is damaged or stale made again."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from embedded import CPU, digests, inodes, make_shards, minilm_folder, sample
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pst_dist.config.schema import EmbedConfig
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet
from pst_dist.embedding import embed
from pst_dist.embedding.embed import embed_all
from pst_dist.embedding.embed_shard import embed_shard, fixed_point_sums
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.embedding.vector_file import read_vectors
from pst_dist.errors import DataError, InputError, IntegrityError, StaleError
from pst_dist.storage.manifest import sha256_file

needs_encoder = pytest.mark.encoder


# --- one shard, one file ---


@needs_encoder
def test_a_shards_file_holds_a_unit_vector_for_each_rationale(finished, encoder):
    shards, directory = finished
    content = read_vectors(directory / "train-000000.safetensors")
    assert content.keys == [("row-1", 0), ("row-2", 0), ("row-2", 1)]
    texts = [sample(1, 1).rationales[0], *sample(2, 2).rationales]
    assert np.abs(content.vectors - encoder.encode(texts)).max() <= 1e-6
    assert content.shard_sha256 == sha256_file(shards.directory / "train-000000.tar")
    assert list(load_file(directory / "train-000000.safetensors")) == ["vectors"]  # a stock reader reads it
    assert read_vectors(directory / "validation-000000.safetensors").vectors.shape == (0, 384)


@needs_encoder
def test_the_same_shard_gives_the_same_bytes_and_is_not_encoded_twice(finished, encoder, tmp_path, monkeypatch):
    shards, directory = finished
    shard = shards.shards("train")[0]
    assert embed_shard(encoder, shards.directory, shard, tmp_path / "a.safetensors").encoded
    assert sha256_file(tmp_path / "a.safetensors") == sha256_file(directory / "train-000000.safetensors")
    monkeypatch.setattr(encoder, "encode", None)  # calling it would fail
    found = embed_shard(encoder, shards.directory, shard, tmp_path / "a.safetensors")
    assert (found.rows, found.encoded, found.sha256) == (3, False, sha256_file(tmp_path / "a.safetensors"))
    assert np.allclose(found.sums / 2.0**36, read_vectors(tmp_path / "a.safetensors").vectors.sum(axis=0), atol=1e-6)


class BrokenEncoder(TextEncoder):
    """The real encoder with a fault put into its raw output."""

    def __init__(self, fault) -> None:
        super().__init__(CPU)
        self._fault = fault

    def _encode_rows(self, rows):
        vectors = super()._encode_rows(rows)
        return self._fault(vectors) if hasattr(self, "_fault") else vectors


@needs_encoder
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_vectors_that_are_zero_or_not_finite_are_never_written(finished, tmp_path, value):
    def spoil(vectors):
        vectors[-1, :] = value
        return vectors

    shards, _ = finished
    with pytest.raises(IntegrityError, match=r"train-000000\.tar.*zero or not finite for 'Take"):
        embed_shard(BrokenEncoder(spoil), shards.directory, shards.shards("train")[0], tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


@needs_encoder
def test_a_wrong_number_of_vectors_is_never_written(finished, encoder, tmp_path, monkeypatch):
    shards, _ = finished
    real = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts, **kw: real(texts, **kw)[:-1])
    with pytest.raises(IntegrityError, match=r"3 rationales gave vectors of shape \(2, 384\)"):
        embed_shard(encoder, shards.directory, shards.shards("train")[0], tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


@needs_encoder
def test_a_shard_that_is_not_the_promised_one_is_not_encoded(copied, encoder, tmp_path):
    shards, _ = copied
    shard = shards.shards("train")[0]
    path = shards.directory / shard.name
    path.write_bytes(path.read_bytes().replace(b"Take 1", b"Take 2"))
    with pytest.raises(IntegrityError, match="shard is missing or differs from its manifest"):
        embed_shard(encoder, shards.directory, shard, tmp_path / "a.safetensors")


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 40))
def test_sums_are_exact_in_any_grouping_and_close_to_the_true_ones(seed, rows):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, 5)).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    cut, order = int(rng.integers(0, rows + 1)), rng.permutation(rows)
    whole, parts = fixed_point_sums(vectors), [vectors[order][:cut], vectors[order][cut:]]
    assert np.array_equal(whole, fixed_point_sums(parts[0]) + fixed_point_sums(parts[1]))
    exact = [sum(Fraction(float(x)) for x in column) for column in vectors.T]
    for ours, true in zip(whole, exact, strict=True):
        assert abs(Fraction(int(ours), 2**36) - true) <= Fraction(rows, 2**37)


# --- all shards ---


@needs_encoder
def test_everything_again_is_a_no_op_and_elsewhere_gives_the_same_bytes(copied, tmp_path):
    shards, directory = copied
    before, files = digests(directory), inodes(directory)
    embed_all(CPU, shards, directory)
    assert inodes(directory) == files
    embed_all(CPU, shards, tmp_path / "elsewhere")
    assert digests(tmp_path / "elsewhere") == before


@needs_encoder
def test_complete_embeddings_are_recognised_without_loading_the_encoder(copied, tmp_path, monkeypatch):
    shards, directory = copied
    folder = Path(minilm_folder(tmp_path / "minilm"))
    config = EmbedConfig(encoder=str(folder), device="cpu")
    made = embed_all(config, shards, directory, rebuild=True)
    loads: list[EmbedConfig] = []
    load = embed.TextEncoder
    monkeypatch.setattr(embed, "TextEncoder", lambda *words, **named: loads.append(words[0]) or load(*words, **named))

    def again(config: EmbedConfig = config) -> int:
        loads.clear()
        assert embed_all(config, shards, directory) == made
        return len(loads)

    assert again() == 0
    assert again(config.model_copy(update={"device": None})) == 0, "where it runs does not matter"
    record = directory.with_name(".embeddings.encoder.json")
    for damage in (
        lambda: record.unlink(),
        lambda: record.write_text("[]"),
        lambda: record.write_text(record.read_text().replace('"truncate_dim": null', '"truncate_dim": 64')),
        lambda: record.write_text(re.sub('"transformers": "[^"]*"', '"transformers": "4.0"', record.read_text())),
    ):
        damage()
        assert (again(), again()) == (1, 0), "loaded once, and remembered again"
    with pytest.raises(StaleError, match="prefix '', wanted 'query: '"):
        again(config.model_copy(update={"prefix": "query: "}))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if weights[name].ndim == 2)
    save_file(weights | {name: weights[name] * 1.5}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StaleError, match="made by weights_sha256"):
        again()


@needs_encoder
def test_only_rewritten_shards_are_encoded_again_and_those_that_are_gone_are_dropped(copied):
    shards, directory = copied
    before = inodes(directory)
    train = [sample(i, rationales=i % 3) for i in range(8)]  # was 9 rows in 3 shards
    train[5] = sample(5, 2, wording="Now otherwise. ")
    shards = make_shards(shards.directory, train, fingerprint="two")
    with pytest.raises(StaleError, match=r"do not match the shards: train-000001\.tar \(1 in all\).*pst embed"):
        EmbeddingStore.open(directory, shards)
    embed_all(CPU, shards, directory)
    after = inodes(directory)
    assert before.keys() - after.keys() == {"train-000002.safetensors"}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"train-000001.safetensors", "statistics.safetensors"}
    assert EmbeddingStore.open(directory, shards).manifest.extra["rows"] == 7 + 2


@needs_encoder
def test_another_encoder_is_refused_by_name_and_rebuilt_when_asked(copied):
    shards, directory = copied
    before = digests(directory)
    other = EmbedConfig(device="cpu", prefix="query: ")
    with pytest.raises(StaleError, match="prefix '', wanted 'query: '; run again with --rebuild"):
        embed_all(other, shards, directory)
    assert digests(directory) == before
    embed_all(other, shards, directory, rebuild=True)
    assert EmbeddingStore.open(directory, shards).identity["prefix"] == "query: "


@needs_encoder
def test_a_rebuild_drops_what_killed_runs_left_and_no_file_of_somebody_else(copied):
    shards, directory = copied
    others = [directory / "model.safetensors", directory / ".weights.partial"]
    leftovers = [directory / "train-000099.safetensors", directory / ".train-000000.safetensors.0123abcd.partial"]
    for path in [*others, *leftovers]:
        path.write_bytes(b"mine")
    embed_all(CPU, shards, directory, rebuild=True)
    assert [path.is_file() for path in others] == [True, True]
    assert [path.exists() for path in leftovers] == [False, False]
    assert EmbeddingStore.open(directory, shards).manifest.extra["rows"] > 0


@needs_encoder
def test_a_damaged_file_is_refused_by_readers_and_alone_made_again(copied):
    shards, directory = copied
    before, files = digests(directory), inodes(directory)
    path = directory / "test-000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"test-000000\.safetensors.*sha256 differs"):
        EmbeddingStore.open(directory, shards)
    embed_all(CPU, shards, directory)
    assert digests(directory) == before
    after = inodes(directory)
    assert {name for name in after if after[name] != files[name]} == {path.name, "statistics.safetensors"}


def _embed_slowly(shards: ShardSet, directory: Path) -> None:
    forward = TextEncoder._encode_rows
    TextEncoder._encode_rows = lambda self, rows: time.sleep(0.4) or forward(self, rows)
    embed_all(CPU, shards, directory)


@needs_encoder
def test_a_killed_run_goes_on_where_it_was(finished, tmp_path):
    shards, reference = finished
    directory = tmp_path / "embeddings"
    process = multiprocessing.get_context("fork").Process(target=_embed_slowly, args=(shards, directory))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(directory.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    done = inodes(directory)
    assert 2 <= len(done) < 5 and not (directory / "manifest.json").exists()
    with pytest.raises(InputError, match="no finished embeddings here; run `pst embed` first"):
        EmbeddingStore.open(directory, shards)
    embed_all(CPU, shards, directory)
    assert digests(directory) == digests(reference)
    assert {name: inodes(directory)[name] for name in done} == done


def test_rows_without_any_rationale_leave_nothing_to_embed(tmp_path):
    write_shards({"train": [sample(1, 0)]}, tmp_path / "shards", samples_per_shard=4, fingerprint="f", extra={})
    with pytest.raises(DataError, match="no sample has a rationale"):
        embed_all(CPU, ShardSet.open(tmp_path / "shards"), tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


@needs_encoder
def test_vectors_with_too_many_numbers_are_stale_once_the_folder_shortens_them(copied, tmp_path):
    shards, directory = copied
    folder = minilm_folder(tmp_path / "minilm", config_sentence_transformers={"truncate_dim": 64})
    from sentence_transformers import SentenceTransformer

    if SentenceTransformer(str(folder), device="cpu", local_files_only=True).truncate_dim is None:
        pytest.skip("this sentence-transformers does not read truncate_dim from the folder")
    config = EmbedConfig(encoder=folder, device="cpu")
    made_by = json.loads((directory / "manifest.json").read_text())["extra"]["encoder"]
    assert made_by["dimension"] == 384
    with pytest.raises(StaleError, match="rebuild"):
        embed_all(config, shards, directory)
    assert embed_all(config, shards, directory, rebuild=True).extra["encoder"]["dimension"] == 64
    assert EmbeddingStore.open(directory, shards).dimension == 64


@needs_encoder
def test_embedding_says_how_many_rationales_it_truncates_and_the_manifest_keeps_it(tmp_path, caplog):
    shards = make_shards(tmp_path / "shards", [sample(0, 2), sample(1, 1, wording="word " * 20)])
    folder = minilm_folder(tmp_path / "short", sentence_bert_config={"max_seq_length": 16})
    with caplog.at_level("WARNING"):
        manifest = embed_all(EmbedConfig(encoder=folder, device="cpu"), shards, tmp_path / "embeddings")
    assert "1 of 5 rationales exceed the encoder's 16 tokens and lose their end" in caplog.text
    assert (manifest.extra["truncated"], manifest.extra["encoder"]["max_seq_length"]) == (1, 16)
