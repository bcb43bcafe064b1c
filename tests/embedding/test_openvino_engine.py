"""OpenVINO in torch's place: the same vectors but for rounding, never mixed with torch's, and refused by name."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pst_dist.config.schema import EmbedConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.embed import embed_all
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.encoder_model import check_encoder
from pst_dist.embedding.openvino_engine import check_conversion
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, StaleError
from pst_dist.models.locate import locate_encoder
from pst_dist.storage.manifest import sha256_file

TEXTS = [
    "yes",
    "Two and two are four.",
    "The coin is flipped by Ann. It is heads up. " * 6,
    "word " * 400,
    "½ \u2028 日本",
]


def shards_in(directory: Path) -> ShardSet:
    train = [
        ReasoningSample(
            id=f"row-{i}", question=f"q{i}", answer="1", rationales=(f"Take {i}, then add {i + 1}.",) * (i % 3)
        )
        for i in range(12)
    ]
    splits = {"train": train, "validation": [], "test": []}
    write_shards(splits, directory, samples_per_shard=4, fingerprint="one", extra={}, rebuild=True)
    return ShardSet.open(directory)


# --- what is refused, with or without the package ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "smollm2"}, "runs sentence encoders only"),
        ({"layer": 3}, "runs sentence encoders only"),
        ({"device": "cuda:0", "backend": "ray"}, "runs on the CPU, but embed.device=cuda:0"),
    ],
)
def test_what_openvino_cannot_run_is_refused_before_anything_loads(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_encoder(EmbedConfig(engine="openvino", **settings))


def test_int8_without_openvino_is_no_config():
    with pytest.raises(ConfigError, match=r"embed\.dtype=int8 needs embed\.engine=openvino"):
        EmbedConfig(dtype="int8")


@pytest.mark.parametrize(("dtype", "missing"), [("float32", "openvino"), ("int8", "nncf")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, dtype, missing):
    absent = lambda name, *rest: None if name == missing else object()  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(EnvironmentFault, match=rf"needs {missing}.*pip install 'pst-dist\[openvino\]'"):
        check_encoder(EmbedConfig(engine="openvino", dtype=dtype))


def test_a_conversion_that_computes_something_else_is_refused():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 8)).astype(np.float32)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    check_conversion(exact, exact, "float32")
    turned = exact.copy()
    turned[1] = -turned[1]
    with pytest.raises(InputError, match=r"vectors differ from torch's in int8 \(cosine -1.0000\)"):
        check_conversion(turned, exact, "int8")
    with pytest.raises(InputError, match="cosine nan"):
        check_conversion(exact * np.nan, exact, "int8")


# --- what it computes ---


@pytest.fixture(scope="module")
def torch_vectors() -> np.ndarray:
    return TextEncoder(EmbedConfig(device="cpu")).encode(TEXTS)


@pytest.mark.openvino
@pytest.mark.encoder
@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float32", 0.999999, 1), ("bfloat16", 0.999, 1), ("int8", 0.99, 0.99999)]
)
def test_vectors_are_torchs_within_the_precision_and_the_same_each_time(torch_vectors, dtype, least, most):
    try:
        encoder = TextEncoder(EmbedConfig(engine="openvino", dtype=dtype))
    except EnvironmentFault as fault:
        if dtype != "bfloat16" or "this processor has no bfloat16" not in fault.what:
            raise
        pytest.skip(fault.what)
    vectors = encoder.encode(TEXTS)
    cosines = (vectors.astype(np.float64) * torch_vectors).sum(1)
    assert vectors.dtype == np.float32 and cosines.min() >= least
    assert cosines.min() <= most + 1e-6, "int8 was not used"
    assert np.array_equal(vectors, encoder.encode(TEXTS[::-1])[::-1])
    assert encoder.cosines_to_torch(TEXTS) == pytest.approx(cosines, abs=1e-4)
    assert (encoder.identity["engine"], encoder.identity["dtype"]) == ("openvino", dtype)


@pytest.mark.openvino
@pytest.mark.encoder
def test_a_prompt_that_pooling_leaves_out_and_fewer_numbers_hold(tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(locate_encoder("minilm"), folder)
    changes = {
        "config_sentence_transformers.json": {
            "prompts": {"d": "passage: "},
            "default_prompt_name": "d",
            "truncate_dim": 64,
        },
        "1_Pooling/config.json": {"include_prompt": False},
    }
    for name, keys in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | keys))
    wanted, found = (
        TextEncoder(EmbedConfig(encoder=str(folder), engine=name, device="cpu")) for name in ("torch", "openvino")
    )
    assert found.identity["prompt_tokens_left_out"] > 0 and found.dimension == wanted.dimension
    assert np.abs(found.encode(TEXTS) - wanted.encode(TEXTS)).max() <= 1e-5


@pytest.mark.openvino
@pytest.mark.encoder
def test_embedding_states_its_cosine_and_torchs_vectors_are_never_mixed_in(tmp_path, caplog):
    shards, directory = shards_in(tmp_path / "shards"), tmp_path / "embeddings"
    plain = EmbedConfig(device="cpu")
    assert "cosine_to_torch_float32" not in embed_all(plain, shards, directory).extra
    config = EmbedConfig(engine="openvino", dtype="int8")
    with pytest.raises(StaleError, match="engine 'None', wanted 'openvino'"):
        embed_all(config, shards, directory)
    with caplog.at_level("INFO"):
        manifest = embed_all(config, shards, directory, rebuild=True)
    stated = manifest.extra["cosine_to_torch_float32"]
    assert 0.99 < stated["lowest"] <= stated["mean"] < 1 and stated["rationales"] == 3
    assert f"of openvino in int8 to torch in float32: {stated['mean']:.5f} on average" in caplog.text
    made = {path.name: sha256_file(path) for path in directory.glob("*.safetensors")}
    embed_all(config, shards, directory, rebuild=True)
    assert {path.name: sha256_file(path) for path in directory.glob("*.safetensors")} == made
    with pytest.raises(StaleError, match="engine 'openvino', wanted 'None'"):
        embed_all(plain, shards, directory)


@pytest.mark.openvino
@pytest.mark.encoder
def test_nothing_is_sent_to_the_maker_and_nothing_but_our_lines_is_printed(tmp_path):
    """Both packages would leave the id under which they report in the home folder."""
    program = (
        "from pst_dist.config.schema import EmbedConfig\nfrom pst_dist.embedding.encoder import TextEncoder\n"
        "TextEncoder(EmbedConfig(engine='openvino', dtype='int8'))\n"
    )
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "intel").exists()
