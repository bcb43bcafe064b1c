"""An encoder and finished embeddings that several files read, made once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from embedded import CPU, make_shards

from pst_dist.data.shards import ShardSet
from pst_dist.embedding.embed import embed_all
from pst_dist.embedding.encoder import TextEncoder


@pytest.fixture(scope="session")
def encoder() -> TextEncoder:
    return TextEncoder(CPU)


@pytest.fixture(scope="session")
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
