"""A few rows as shards, what identifies the files of their embeddings, and MiniLM with other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pst_dist.config.schema import EmbedConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet
from pst_dist.models.locate import locate_encoder
from pst_dist.storage.manifest import sha256_file

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


def minilm_folder(path: Path, **changes: dict) -> str:
    """A copy of MiniLM with keys of its JSON files changed."""
    shutil.copytree(locate_encoder("minilm"), path)
    for name, keys in changes.items():
        file = path / ("1_Pooling/config.json" if name == "pooling" else f"{name}.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return str(path)
