"""From rows to report as a user runs it, and again after a stage's artefact was deleted."""

import shutil
from pathlib import Path

import pytest
from small_run import small_config

from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import expand_arms
from pst_dist.config.schema import Config
from pst_dist.errors import LockedError
from pst_dist.pipeline import make_embeddings, make_shards, run_all
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import read_json, sha256_file

pytestmark = pytest.mark.encoder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Config, list[Path]]:
    """Two arms through every stage."""
    root = tmp_path_factory.mktemp("run")
    config = small_config(root / "data", root / "run", arms="[pst, answer_only]", train__report_to="tensorboard")
    return config, run_all(config)


def test_every_stage_leaves_its_artefact(finished):
    config, pages = finished
    root = Path(config.output_dir)
    for arm in ("pst", "answer_only"):
        for name in (
            "config.resolved.yaml",
            "command.txt",
            "environment.json",
            "metrics.jsonl",
            "train.json",
            "best/model.safetensors",
            "eval/test/results.json",
            "eval/test/samples.jsonl",
            "export/model.safetensors",
            "export/README.md",
            "report.html",
        ):
            assert (root / arm / name).is_file(), f"{arm}/{name}"
    assert pages[-1] == root / "report.html" and pages[-1].is_file()
    assert list((root / "pst" / "tensorboard").iterdir())


def test_both_arms_are_scored_on_the_same_rows(finished):
    config, _ = finished
    ids = []
    for arm in expand_arms(config):
        lines = (Path(arm.output_dir) / "eval" / "test" / "samples.jsonl").read_text().splitlines()
        ids.append(sorted(load_line(line)["id"] for line in lines))
    assert ids[0] == ids[1] and len(ids[0]) == 12


def load_line(line: str) -> dict:
    import json

    return json.loads(line)


def test_a_later_verb_needs_only_the_run_directory(finished):
    config, _ = finished
    arm = expand_arms(config)[0]
    assert load_config(arm.output_dir) == arm
    assert load_config(config.output_dir) == config


@pytest.mark.parametrize("stage", ["best", "eval", "export", "embeddings"])
def test_a_deleted_stage_is_made_again_and_the_others_are_not(finished, stage):
    config, _ = finished
    root, data = Path(config.output_dir), Path(config.data_dir)
    place = data / "embeddings" if stage == "embeddings" else root / "pst" / stage
    weights = root / "pst" / "best" / "model.safetensors"
    watched = {
        path: path.stat().st_mtime_ns
        for path in (*data.rglob("*.tar"), *root.rglob("*.safetensors"), *root.rglob("results.json"))
        if not path.is_relative_to(place)
    }
    digest, score = sha256_file(weights), read_json(root / "pst" / "eval" / "test" / "results.json")["accuracy"]
    shutil.rmtree(place)
    run_all(config)
    assert place.is_dir()
    assert sha256_file(weights) == digest
    assert read_json(root / "pst" / "eval" / "test" / "results.json")["accuracy"] == score
    again = [str(path) for path, stamp in watched.items() if path.stat().st_mtime_ns != stamp]
    if stage == "eval":
        # The model card shows the scores and their timing, so the export follows a new evaluation.
        again.remove(str(root / "pst" / "export" / "model.safetensors"))
    assert again == [], "these stages were complete"


def test_running_again_without_a_change_touches_nothing_but_the_pages(finished):
    config, _ = finished
    root = Path(config.output_dir)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    run_all(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_complete_data_that_a_colleague_holds_is_used_without_a_lock_and_left_untouched(small_data, tmp_path):
    """A lock file needs the right to write, which a shared data directory does not give."""
    config = small_config(small_data, tmp_path / "run")

    def times() -> dict[Path, int]:
        """Of all but the notes beside the data, which other tests may not have left yet."""
        return {path: path.stat().st_mtime_ns for path in small_data.rglob("*") if not path.name.startswith(".")}

    before = times()
    with directory_lock(small_data), directory_lock(small_data / "embeddings"):
        assert make_shards(config).kind == "shards" and make_embeddings(config).kind == "embeddings"
        with pytest.raises(LockedError):
            make_embeddings(config, rebuild=True)
    assert times() == before


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("task", ["coin_flip", "date_understanding", "svamp", "gsm8k"])
def test_real_rows_go_from_files_to_a_report(task, shared_data, tmp_path):
    config = load_config(
        task,
        [
            f"data.root={shared_data}",
            f"output_dir={tmp_path}/run",
            "arms=[pst, answer_only]",
            "data.max_rows=64",
            "student.fresh.hidden_size=32",
            "student.fresh.num_layers=1",
            "student.fresh.num_heads=2",
            "train.max_steps=4",
            "train.num_train_epochs=1",
            "train.num_threads=1",
            "evaluate.max_rows=8",
            "evaluate.max_new_tokens=8",
            "evaluate.latency_rows=1",
            "evaluate.explain_rows=2",
        ],
    )
    pages = run_all(config)
    assert all(page.is_file() for page in pages)
    results = read_json(tmp_path / "run" / "pst" / "eval" / "test" / "results.json")
    assert results["rows"] == 8 and 0 <= results["accuracy"] <= 1
