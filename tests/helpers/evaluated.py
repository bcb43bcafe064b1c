"""Runs to evaluate, with known answers, and evaluation folders as `evaluation.evaluate` writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny import ROWS, Tiny, fitted

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.evaluation.scores import score_of
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import Manifest, canonical_json, describe_files, write_json, write_manifest

# The four rows that the student has learnt, and two whose gold answer it cannot know.
WRONG = (
    ReasoningSample(id="w-0", question="Say 140", answer="7", rationales=("never",), answer_type="number"),
    ReasoningSample(id="w-1", question="2 + 3?", answer="6", rationales=("never",), answer_type="number"),
)
LEARNT = tuple(replace(row, id=f"t-{k}") for k, row in enumerate(ROWS))


def make_run(path: Path, arm: str = "pst", *, test=LEARNT + WRONG, validation=(), **evaluation) -> Config:
    """A run directory with a trained student and shards, as the earlier stages leave it."""
    return make_run_of(fitted(arm), path, train=ROWS, test=test, validation=validation, **evaluation)


def make_run_of(tiny: Tiny, path: Path, *, train, test, validation=(), **evaluation) -> Config:
    """The same of any trained student and its rows."""
    config = Config.model_validate(
        {
            **tiny.config.model_dump(),
            "task": "single_eq",
            "output_dir": str(path),
            "evaluate": {"max_new_tokens": 40, "latency_rows": 2, **evaluation},
        }
    )
    tiny.save(path / "best")
    write_shards(
        {"train": list(train), "validation": list(validation), "test": list(test)},
        path / "data" / "shards",
        samples_per_shard=3,
        fingerprint=f"of {len(test)}",
        extra={},
    )
    write_json(
        path / "train.json",
        {"steps": 9, "seconds": 1.5, "tokens": 1234, "best_step": 7, "metric": "answer_nll", "fingerprint": "f" * 64},
    )
    return config


def scored(run, arm, right, *, tokens=3, split="test", questions=None, seed=0, variant=()):
    """An evaluation folder as `evaluation.evaluate` writes it; `right` is a string of 1 and 0, one per row."""
    rows = [
        {
            "id": f"row-{k}",
            "question": (questions or {}).get(k, f"question {k}"),
            "gold": "5",
            "prediction": "5" if mark == "1" else "4",
            "answer_text": " 5" if mark == "1" else " 4",
            "correct": mark == "1",
            "answer_tokens": tokens,
            "complete": True,
        }
        for k, mark in enumerate(right)
    ]
    results = {
        "task": "svamp",
        "arm": arm,
        "variant": list(variant),
        "split": split,
        "seed": seed,
        **score_of(rows),
        "milliseconds_to_answer": {"median": 12.5, "p90": 14.0, "rows": 5},
        "rationale_similarity": None,
    }
    directory = run / "eval" / split
    write_json(directory / "results.json", results)
    write_text(directory / "samples.jsonl", "".join(canonical_json(row) + "\n" for row in rows))
    write_manifest(directory, Manifest("evaluation", arm, describe_files(directory, ["results.json", "samples.jsonl"])))
    return run
