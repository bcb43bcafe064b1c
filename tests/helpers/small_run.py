"""A small real run for tests: rows of an embedded task, their shards and MiniLM embeddings, and configs over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.pipeline import make_embeddings, make_shards


def small_config(data: Path, output: Path, **changes: Any) -> Config:
    """Eight steps of a tiny student over 40 generated rows, with every step logged; `a__b=1` sets a.b."""
    base = {
        "task": "last_letter_concatenation",
        "output_dir": str(output),
        "data_dir": str(data),
        "data.train": "gen:last_letters?rows=40&seed=0&words=2",
        "data.test": "gen:last_letters?rows=12&seed=0&words=2",
        "data.validation_size": 8,
        "shards.samples_per_shard": 16,
        "student.fresh.hidden_size": 32,
        "student.fresh.num_layers": 1,
        "student.fresh.num_heads": 2,
        "train.max_steps": 8,
        "train.global_batch_size": 8,
        "train.per_device_train_batch_size": 4,
        "train.learning_rate": "1e-2",
        # Adam divides by the root of tiny squares; this keeps rounding from being blown up where engines are compared.
        "train.adam_epsilon": "1e-6",
        "train.logging_steps": 1,
        "train.eval_steps": 4,
        "train.report_to": "none",
        "train.num_threads": 1,
        "evaluate.latency_rows": 2,
        "evaluate.explain_rows": 4,
        "evaluate.max_new_tokens": 24,
    }
    base |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"{key}={'null' if value is None else value}" for key, value in base.items()])


def make_small_data(data: Path) -> Path:
    """Shards and embeddings of the small run below `data`."""
    config = small_config(data, data / "unused")
    make_shards(config)
    make_embeddings(config)
    return data
