"""Parsers of shards and embeddings."""

from __future__ import annotations

from pathlib import Path

from .registry import parser, put, written


def _write_shard(folder: Path) -> None:
    from pst_dist.data.sample import ReasoningSample
    from pst_dist.data.shard_tar import write_shard

    samples = [
        ReasoningSample(id=name, question=f"{name}?", answer="7", rationales=("3 + 4",), source="x:1") for name in "ab"
    ]
    write_shard(folder / "shard.tar", samples)


@parser("shard", written(_write_shard, "shard.tar"))
def _shard(content: bytes, folder: Path) -> object:
    from pst_dist.data.shard_tar import read_shard

    return read_shard(put(folder, "train-000000.tar", content))


@parser(
    "sample",
    {"id": "a", "question": "q?", "answer": "7", "rationales": ["r"], "answer_type": "text"}
    | {"choices": [], "source": ""},
)
def _sample(content: bytes, folder: Path) -> object:
    from pst_dist.data.shard_tar import parse_sample

    return parse_sample(content, "shard.tar")


def _write_vectors(folder: Path) -> None:
    import numpy as np

    from pst_dist.embedding.vector_file import ShardVectors, write_vectors

    vectors = np.array([[1, 0], [0, 1]], dtype="float32")
    content = ShardVectors(
        keys=[("a", 0), ("b", 0)], vectors=vectors, identity={"dimension": 2}, shard_sha256="0f", truncated=0
    )
    write_vectors(folder / "vectors.safetensors", content)


@parser("vectors", written(_write_vectors, "vectors.safetensors"))
def _vectors(content: bytes, folder: Path) -> object:
    from pst_dist.embedding.vector_file import read_vectors

    return read_vectors(put(folder, "train-000000.safetensors", content))


@parser(
    "answer format",
    {
        "arm": "pst",
        "prompt": "Q: {question}",
        "answer_marker": " so",
        "max_length": 64,
        "semantic_position": "after",
        "semantic_tokens": 1,
    },
    weight=0.7,
)
def _format(content: bytes, folder: Path) -> object:
    from pst_dist.storage.json_files import read_typed
    from pst_dist.student.answer_format import AnswerFormat

    return read_typed(put(folder, "pst.json", content), AnswerFormat).problem()
