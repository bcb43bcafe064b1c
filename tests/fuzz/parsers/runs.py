"""Parsers of what a run leaves: results, metrics, outcomes, manifests, checkpoint states."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from .registry import PARSERS, parser, put, written

_RESULTS = {
    "task": "svamp",
    "split": "test",
    "rows": 2,
    "accuracy": 0.5,
    "accuracy_stderr": 0.3,
    "unparsed": 0,
    "incomplete": 0,
    "contains_answer": 0.5,
    "tokens_to_answer": {"mean": 3.0, "median": 3.0, "p95": 4.0},
    "milliseconds_to_answer": {"median": 9.0, "p90": 10.0, "rows": 2},
    "arm": "pst",
    "variant": ["raw"],
    "seed": 0,
    "chance": 0.25,
    "majority": 0.5,
    "rows_per_second": 10.0,
    "rationale_similarity": {"mean": 0.5, "shuffled_mean": 0.1},
    "parameters": 1000,
    "device": "cpu (x86_64)",
    "student": {"digest": "0f", "step": 3},
    "shards": "0f",
    "training": {"steps": 3, "seconds": 1.5, "tokens": 99, "best_step": 3, "best_value": 0.5, "metric": "accuracy"},
}
_TRAINING = {"fingerprint": "0f", "steps": 3, "seconds": 1.5, "tokens": 99, "best_step": 2, "best_value": 0.1}


@parser("results", _RESULTS, {**_RESULTS, "milliseconds_to_answer": None, "rationale_similarity": None}, weight=1.5)
def _results(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.compare import ArmResult, Comparison, cells
    from pst_dist.evaluation.records import check_comparable, check_whole, read_results
    from pst_dist.publish import compare_page, run_page

    path = put(folder, "results.json", content)
    results = read_results(path)
    check_comparable(results, path)
    arm = ArmResult("pst", folder, folder / "eval" / "test", results, [], None, None)
    comparison = Comparison("svamp", "test", 2, "pst", [arm])
    check_whole(results, path)
    pieces = [run_page._headline([results], _TRAINING), run_page._scores([results]), comparison.table(), cells(arm)]
    return [*pieces, compare_page._comparison_headline(comparison), run_page._digests(None, [results])]


@parser("train.json", {**_TRAINING, "metric": "accuracy"}, weight=0.7)
def _training(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.records import read_training
    from pst_dist.publish import run_page

    return run_page._headline([], read_training(put(folder, "train.json", content), whole=True))


@parser(
    "metrics",
    '{"step": 1, "answer_nll": 2.0, "alignment": 0.5, "cosine": 0.1, "gradient_share_answer": 0.4}\n'
    '{"step": 2, "answer_nll": 1.0, "alignment": 0.4, "cosine": 0.2, "gradient_share_alignment": 0.6}\n'
    '{"step": 2, "validation": {"answer_nll": 1.5, "accuracy": 0.5}}\n'
    '{"bad_step": "loss is nan", "outcome": "left out", "samples": ["a"], "step": 3}\n',
)
def _metrics(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.records import read_metrics
    from pst_dist.publish.plots import series, validation_series

    metrics = read_metrics(put(folder, "metrics.jsonl", content))
    names = ("answer_nll", "alignment", "cosine", "gradient_share_answer")
    return [[float(value) for value in series(metrics, name)[1]] for name in names], [
        [float(value) for value in validation_series(metrics, name)[1]] for name in ("answer_nll", "accuracy")
    ]


@parser("curves", PARSERS[-1].seeds[0], weight=0.004)
def _curves(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.records import read_metrics
    from pst_dist.publish.plots import cosine_plot, gradient_plot, loss_plot, validation_plot

    metrics = read_metrics(put(folder, "metrics.jsonl", content))
    pictures = loss_plot(metrics), cosine_plot(metrics), gradient_plot(metrics)
    return pictures, validation_plot(metrics, 2, "accuracy")


_SAMPLE = {"id": "a", "question": "q?", "gold": "7", "correct": True, "prediction": "7", "answer_text": " 7"}


@parser("samples", json.dumps(_SAMPLE) + "\n" + json.dumps({**_SAMPLE, "id": "b", "correct": False}) + "\n")
def _samples(content: bytes, folder: Path) -> object:
    from pst_dist.evaluation.compare import _same_rows
    from pst_dist.evaluation.records import read_rows

    rows = read_rows(put(folder, "samples.jsonl", content))
    return _same_rows(folder, rows, folder, rows)


_OUTCOME = {
    "run": "letters / pst / seed 0",
    "config": {"arm": "pst", "seed": 0, "train": {"max_steps": 3}},
    "shards": "0f",
    "rows": "0f",
    "right": "0110",
    "results": {key: _RESULTS[key] for key in ("arm", "task", "split", "parameters", "unparsed", "device")}
    | {"tokens_to_answer": {"mean": 3.0}, "milliseconds_to_answer": {"median": 9.0}, "chance": 0.2},
}


@parser("outcomes", json.dumps(_OUTCOME) + "\n" + json.dumps({**_OUTCOME, "run": "other"}) + "\n")
def _outcomes(content: bytes, folder: Path) -> object:
    from pst_dist.experiment.outcomes import _read

    return {name: outcome.to_line() for name, outcome in _read(put(folder, "outcomes.jsonl", content)).items()}


def _write_manifest(folder: Path) -> None:
    from pst_dist.storage.manifest import Manifest, write_manifest

    files = {"a.tar": {"bytes": 3, "sha256": "0" * 64}}
    write_manifest(
        folder,
        Manifest(
            "shards", "0f", files, {"schema_version": 1, "samples_per_shard": 2, "counts": {"train": 2}, "shards": []}
        ),
    )


@parser("manifest", written(_write_manifest, "manifest.json"))
def _manifest(content: bytes, folder: Path) -> object:
    from pst_dist.data.shards import ShardSet
    from pst_dist.storage.manifest import read_manifest
    from pst_dist.storage.outputs import refuse_foreign_folder

    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    put(shards, "manifest.json", content)
    refuse_foreign_folder(shards, "shards")
    manifest = read_manifest(shards, "shards")
    return manifest is not None and ShardSet.open(shards, verify=False)


@parser(
    "forged manifest",
    {
        "fingerprint": "0f",
        "files": {"train-000000.tar": {"bytes": 3, "sha256": "0" * 64}},
        "extra": {
            "schema_version": 1,
            "counts": {"train": 2},
            "shards": [
                {
                    "name": "train-000000.tar",
                    "split": "train",
                    "samples": 2,
                    "bytes": 3,
                    "sha256": "0" * 64,
                    "rationales": 1,
                }
            ],
        },
    },
)
def _forged(content: bytes, folder: Path) -> object:
    """A manifest with a correct digest, as anyone who can write to the directory could forge one."""
    from pst_dist.storage.manifest import digest_of

    fields = {"kind": "shards", "fingerprint": "", "files": {}, "extra": {}}
    (folder / "shards").mkdir(exist_ok=True)
    put(folder, "shards/train-000000.tar", b"tar")
    text = content
    with contextlib.suppress(ValueError, RecursionError, TypeError):  # no JSON, or none that has a digest
        fields |= json.loads(content)
        fields["digest"] = digest_of({key: fields[key] for key in ("kind", "fingerprint", "files", "extra")})
        text = (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    return _manifest(text, folder)


@parser("checkpoint state", {"step": 3, "fingerprint": "0f", "settings": {"a": 1}, "engine": "plain", "world_size": 1})
def _state(content: bytes, folder: Path) -> object:
    from pst_dist.storage.json_files import read_typed
    from pst_dist.training.checkpoints.state import RunState

    return read_typed(put(folder, "run_state.json", content), RunState)


@parser("tracker ids", {"wandb": "abc", "mlflow": "def"}, weight=0.3)
def _trackers(content: bytes, folder: Path) -> object:
    from pst_dist.training.reporting.trackers import _IDS, TrackedRun

    put(folder, _IDS, content)
    return TrackedRun(folder, "x", 3).known_id("wandb")
