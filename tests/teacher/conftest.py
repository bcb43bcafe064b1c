"""A real llama.cpp server of a tiny model for the tests of the teacher: noise as replies, but the real protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    """A tiny Llama as a GGUF file."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    import zoo
    from tiny_gguf import write_gguf

    from pst_dist.models.load import load_language_model
    from pst_dist.models.locate import locate_model

    folder = zoo.make("llama3", tmp_path_factory.mktemp("tiny-gguf") / "llama3")
    model = load_language_model(locate_model(str(folder)))
    model.config.max_position_embeddings = 4096  # the server's limit; its rotary embeddings have none
    return write_gguf(model, folder / "tokenizer.json", folder.parent / "tiny.gguf")


@pytest.fixture(scope="session")
def server(tiny_gguf):
    """The URL of a llama.cpp server."""
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    from pst_dist.publish.gguf.server import serving

    with serving(tiny_gguf, slots=4, context=4096) as url:
        yield url


@pytest.fixture
def rows(tmp_path) -> Path:
    """Six questions with gold answers."""
    file = tmp_path / "rows.jsonl"
    lines = [{"question": f"What is {n} + {n + 1}?", "answer": 2 * n + 1} for n in range(1, 7)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
