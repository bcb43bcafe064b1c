"""A causal language model as the encoder: the layer and the pooling that were asked for, alone as in a batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
import zoo
from tiny_gguf import write_gguf

from pst_dist.config.loading import load_config
from pst_dist.config.schema import EmbedConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.embed import embed_all
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.encoder_model import check_encoder
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.embedding.targets import _check_settings
from pst_dist.errors import ConfigError, InputError, StaleError

TEXTS = [
    "two and three make five",
    "How many apples are left when nine of them are eaten? Ten and seven make seventeen.",
    "yes",
    "The answer is said as it was asked for. " * 3,
]


def encoder_of(folder, **settings) -> TextEncoder:
    return TextEncoder(EmbedConfig(encoder=str(folder), device="cpu", **settings))


def expected(folder, text: str, layer: int, pooling: str) -> np.ndarray:
    """The vector as transformers gives it for a text on its own, from the whole model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
    vector = states[-1] if pooling == "last" else states.mean(0)
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("family", zoo.CAUSAL)
def test_vectors_of_a_batch_are_those_of_the_whole_model_on_each_text_alone(family, tmp_path):
    folder = zoo.make(family, tmp_path)
    for layer, pooling in ((1, "last"), (2, "last"), (1, "mean"), (-1, "mean")):
        encoder = encoder_of(folder, layer=layer, pooling=pooling, batch_tokens=4096)
        together = encoder.encode(TEXTS)
        alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
        assert np.allclose(together, alone, atol=2e-6), (layer, pooling)
        for text, vector in zip(TEXTS, together, strict=True):
            assert np.allclose(vector, expected(folder, text, layer, pooling), atol=2e-6), (layer, pooling)
        assert encoder.identity["layer"] == (2 if layer == -1 else layer)
        assert (encoder.identity["pooling"], encoder.identity["layers"]) == (pooling, 2)


def test_the_layers_above_the_one_that_is_read_are_not_kept(tmp_path):
    folder = zoo.make("llama3", tmp_path)
    read = encoder_of(folder, layer=1, pooling="last")._model._model
    assert len(read.layers) == 1 and len(encoder_of(folder, layer=2)._model._model.layers) == 2


def test_layer_and_pooling_have_defaults_of_their_own_and_both_are_part_of_the_identity(tmp_path):
    folder = zoo.make("qwen", tmp_path)
    assert encoder_of(folder, layer=2).identity["pooling"] == "last"
    assert encoder_of(folder, pooling="mean").identity["layer"] == 1, "the middle of two"
    identities = [encoder_of(folder, layer=k, pooling=p).identity for k in (1, 2) for p in ("last", "mean")]
    assert len({json.dumps(one, sort_keys=True) for one in identities}) == 4


def test_a_causal_folder_without_either_stays_the_encoder_that_it_was(tmp_path):
    pytest.importorskip("sentence_transformers")
    folder = zoo.make("gpt2", tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))
    encoder = encoder_of(folder)
    assert encoder.identity["pooling"] == "mean" and "layer" not in encoder.identity
    assert np.allclose(encoder.encode(TEXTS)[0], expected(folder, TEXTS[0], 2, "mean"), atol=1e-5)


def test_a_long_text_keeps_its_end_for_the_last_token_and_its_beginning_for_the_mean(tmp_path):
    folder = zoo.make("llama3", tmp_path)  # with a token before every text, which stays
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    long = "nine apples are eaten and ten are left and two and three make five"
    ids = tokenizer(long)["input_ids"]
    for pooling, kept in (("last", ids[:1] + ids[-7:]), ("mean", ids[:8])):
        encoder = encoder_of(folder, layer=1, pooling=pooling, max_seq_length=8)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            states = model(torch.tensor([kept]), output_hidden_states=True).hidden_states[1][0]
        vector = states[-1] if pooling == "last" else states.mean(0)
        assert np.allclose(encoder.encode([long])[0], (vector / vector.norm()).numpy(), atol=2e-6), pooling
        assert encoder.count_truncated([long, "yes"]) == 1
        assert encoder.identity["max_seq_length"] == 8
        assert encoder.identity["truncation"] == ("left" if pooling == "last" else "right")
    with pytest.raises(InputError, match=r"the encoder's own limit is 256"):
        encoder_of(folder, layer=1, max_seq_length=1000)


def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path):
    pytest.importorskip("gguf")
    folder = zoo.make("llama3", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    file = write_gguf(model, folder / "tokenizer.json", tmp_path / "tiny.gguf")
    encoder = encoder_of(file, layer=1)
    vectors = encoder.encode(TEXTS)
    tokenizer = encoder._tokenizer
    with torch.no_grad():
        for text, vector in zip(TEXTS, vectors, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            state = model(ids, output_hidden_states=True).hidden_states[1][0, -1]
            assert np.allclose(vector, (state / state.norm()).numpy(), atol=1e-4)
    assert encoder.identity["encoder"] == "tiny.gguf" and list(encoder.identity["weights_sha256"]) == ["tiny.gguf"]


def test_what_cannot_be_read_so_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"embed.layer=3: the encoder has layers 1 to 2"):
        check_encoder(EmbedConfig(encoder=str(zoo.make("gpt2", tmp_path / "gpt2")), layer=3))
    with pytest.raises(ConfigError, match=r"is not a causal language model \(T5ForConditionalGeneration\)"):
        check_encoder(EmbedConfig(encoder=str(zoo.make("t5", tmp_path / "t5")), layer=1))
    with pytest.raises(ConfigError, match=r"a sentence-transformers model, which has a pooling of its own"):
        check_encoder(EmbedConfig(pooling="last"))
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"is not a causal language model \(BertModel\)"):
        check_encoder(EmbedConfig(encoder=str(tmp_path / "bert"), layer=1))
    lacking = zoo.make("qwen", tmp_path / "lacking")
    from safetensors.torch import load_file, save_file

    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"cannot load the encoder: 1 of its weights are missing"):
        encoder_of(lacking, layer=1)


def test_shards_are_embedded_by_it_and_the_store_refuses_another_layer(tmp_path):
    folder = zoo.make("llama2", tmp_path / "model")
    rows = [ReasoningSample(id=f"r{k}", question=f"q{k}", answer="1", rationales=(f"{k} and {k}",)) for k in range(5)]
    splits = {"train": rows[:3], "validation": rows[3:4], "test": rows[4:]}
    write_shards(splits, tmp_path / "shards", samples_per_shard=2, fingerprint="one", extra={}, rebuild=True)
    shards = ShardSet.open(tmp_path / "shards")
    config = EmbedConfig(encoder=str(folder), device="cpu", layer=-2, pooling="last")
    manifest = embed_all(config, shards, tmp_path / "embeddings")
    assert manifest.extra["encoder"]["layer"] == 1 and manifest.extra["encoder"]["pooling"] == "last"
    store = EmbeddingStore.open(tmp_path / "embeddings", shards, encoder=str(folder))
    assert np.allclose(store.vector("r3"), encoder_of(folder, layer=1).encode(["3 and 3"])[0], atol=2e-6)

    def wanted(**embed):
        words = [f"embed.{name}={value}" for name, value in embed.items()]
        return load_config(None, ["data.train=gen:last_letters?rows=4&seed=0", f"embed.encoder={folder}", *words])

    for same in ({"layer": -2}, {"layer": 1, "pooling": "last"}, {}):
        _check_settings(wanted(**same), store, tmp_path)
    for key, value in (("layer", 2), ("layer", -1), ("pooling", "mean")):
        with pytest.raises(StaleError, match=f"made with {key}="):
            _check_settings(wanted(**{key: value}), store, tmp_path)
    with pytest.raises(StaleError, match=r"layer 1, wanted 2|layer '1', wanted '2'"):
        embed_all(config.model_copy(update={"layer": 2}), shards, tmp_path / "embeddings")


ON_RAY = """
import sys
from pathlib import Path
from pst_dist.clusters.ray.embed import embed_with_ray
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.embed import embed_all

if __name__ == "__main__":
    base = Path(sys.argv[1])
    actors = RayConfig(num_actors=1)
    config = EmbedConfig(encoder=str(base / "model"), device="cpu", layer=1, backend="ray", ray=actors)
    embed_all(config, ShardSet.open(base / "shards"), base / "ray", executor=embed_with_ray)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_actors_write_the_same_bytes(tmp_path):
    folder = zoo.make("llama3", tmp_path / "model")
    rows = [ReasoningSample(id=f"r{k}", question=f"q{k}", answer="1", rationales=(f"{k} and {k}",)) for k in range(6)]
    splits = {"train": rows[:4], "validation": rows[4:5], "test": rows[5:]}
    write_shards(splits, tmp_path / "shards", samples_per_shard=2, fingerprint="one", extra={}, rebuild=True)
    embed_all(
        EmbedConfig(encoder=str(folder), device="cpu", layer=1), ShardSet.open(tmp_path / "shards"), tmp_path / "local"
    )
    (tmp_path / "on_ray.py").write_text(ON_RAY)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "on_ray.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    names = [path.name for path in sorted((tmp_path / "local").glob("*")) if path.name != ".lock"]
    for name in names:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name
    assert len(names) == 4 + 2
