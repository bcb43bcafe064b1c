"""A finished experiment: its table, page and numbers, and outcomes that come from other machines."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from experiments import SMALL, accuracies, pst, write

from pst_dist.experiment.driver import run_experiment
from pst_dist.experiment.outcomes import Outcome
from pst_dist.experiment.pictures import accuracy_picture, cost_picture, curve_picture, sweep_picture
from pst_dist.experiment.results import collect
from pst_dist.experiment.results_page import page_of
from pst_dist.experiment.results_table import table_lines
from pst_dist.experiment.runs import result_of
from pst_dist.experiment.spec import load_experiment, runs_of


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    file = write(tmp_path_factory.mktemp("experiment") / "small.yaml", pairs=[["no alignment", "pre_thinking"]])
    return file, pst(str(file), "jobs=2")


def test_an_experiment_ends_with_a_table_a_page_and_numbers(small):
    file, done = small
    assert done.returncode == 0, done.stderr
    assert "[6/6]" in done.stderr and "no alignment" in done.stdout and "vs answer_only" in done.stdout
    folder = file.with_suffix("")
    found = json.loads((folder / "results.json").read_text())
    assert [group["variant"] for group in found["groups"]] == list(SMALL["variants"])
    assert all(len(group["accuracies"]) == 2 and group["rows"] == 12 for group in found["groups"])
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 6
    (pair,), (_, _, last) = found["pairs"], found["groups"]
    assert pair["variant"] == "no alignment" and pair["test"] in last["tests"]
    page = (folder / "README.md").read_text()
    assert "![accuracy of every variant](accuracy.png)" in page and "## Published" not in page
    assert "| letters | no alignment | pre_thinking | " in page
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("checkpoint-*")) and len(list(folder.rglob("best/model.safetensors"))) == 6


def test_the_page_has_published_numbers_for_real_rows_and_both_ways_of_an_adaptive_student(small):
    experiment = load_experiment(str(small[0]))
    results = collect(experiment, runs_of(experiment))
    ways = {"at once": (0.5, 3, 0), "always thinking": (0.9, 33, 1), "as it chose": (0.85, 12, 0.3)}
    adaptive = {
        way: dict(zip(("accuracy", "tokens", "thinking"), numbers, strict=True)) for way, numbers in ways.items()
    }
    group = replace(results.groups[0], generated=False, adaptive=adaptive)
    page = page_of(replace(results, groups=[group]), ["pst"], [])
    assert "## Published results for comparison" in page and "| Flan-T5 base, 220M, CoT | 50.00 |" in page
    assert "| letters | answer_only | as it chose | 85.00 | 12.0 | 30.0 |" in page
    assert "## Answering at once" not in page_of(results, ["pst"], [])


def test_learning_curves_are_means_over_seeds_of_the_validation_losses_in_the_logs(small):
    file, _ = small
    folder = file.with_suffix("")
    group = json.loads((folder / "results.json").read_text())["groups"][0]
    logs = [folder / "runs" / "letters" / "answer_only" / f"seed-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    rows = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    losses = [{row["step"]: row["validation"]["answer_nll"] for row in one if "validation" in row} for one in rows]
    assert [step for step, _ in group["curve"]] == [3, 6]
    for step, value in group["curve"]:
        assert value == pytest.approx((losses[0][step] + losses[1][step]) / 2)
    page = (folder / "README.md").read_text()
    assert "![loss of an answer token over steps](curves.png)" in page
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    experiment = load_experiment(str(file))
    results = collect(experiment, runs_of(experiment))
    assert curve_picture(replace(results, groups=[replace(one, curve=()) for one in results.groups])) is None


def test_the_page_tells_what_the_most_frequent_answer_gets_and_how_many_outputs_hold_none(small):
    experiment = load_experiment(str(small[0]))
    results = collect(experiment, runs_of(experiment))
    assert results.groups[0].majority == pytest.approx(1 / 12), "no two of its rows have the same answer"
    groups = [replace(group, unparsed=0, majority=0.25) for group in results.groups]
    groups[1] = replace(groups[1], unparsed=6)  # of 12 rows and 2 seeds
    page = page_of(replace(results, groups=groups), ["pst"], [])
    assert "12 test rows, the most frequent answer gives 25.0 %." in page
    header, _, first, second, *_ = page[page.index("| variant | accuracy % | s.e.") :].splitlines()
    assert header.endswith(" | ms | unparsed % |") and first.endswith(" | 0.0 |") and second.endswith(" | 25.0 |")
    assert "Unparsed outputs contain no answer" in page
    groups[1] = replace(groups[1], unparsed=0)
    plain = page_of(replace(results, groups=groups), ["pst"], [])
    assert "nread" not in plain
    other = [replace(group, task="other", majority=0.5) for group in groups]
    both = replace(results, groups=groups + other)
    both = replace(both, experiment=experiment.model_copy(update={"tasks": {"letters": {}, "other": {}}}))
    assert "| the most frequent answer | 25.00 | 50.00 | 37.50 |" in page_of(both, ["pst"], [])
    other[0] = replace(other[0], majority=None)
    assert "| the most frequent answer |" not in page_of(replace(both, groups=groups + other), ["pst"], [])


def test_a_finished_experiment_does_nothing_and_says_the_same(small):
    file, done = small
    again = pst(str(file))
    assert again.returncode == 0 and "6 runs, 0 to do" in again.stderr
    assert again.stdout == done.stdout
    listed = pst(str(file), "--dry-run")
    assert listed.stdout.count("finished") == 6


def test_an_experiment_that_was_moved_is_still_finished(small, tmp_path):
    file, _ = small
    moved = load_experiment(str(file), [f"output_dir={tmp_path / 'moved'}"])
    file.with_suffix("").rename(tmp_path / "moved")
    try:
        assert all(result_of(run.config) for run in runs_of(moved))
    finally:
        (tmp_path / "moved").rename(file.with_suffix(""))


def test_results_of_a_changed_setting_are_not_taken_for_its_own(small):
    file, _ = small
    changed = load_experiment(str(file), ["train.max_steps=7"])
    assert not any(result_of(run.config) for run in runs_of(changed))


def test_pictures_and_page_show_what_is_there(small):
    file, _ = small
    experiment = load_experiment(str(file))
    runs = [run for run in runs_of(experiment) if run.variant != "pre_thinking"]
    results = collect(experiment, runs)
    assert accuracy_picture(results) and cost_picture(results) and sweep_picture(results) is None
    assert not any("vs pre_thinking" in line for line in table_lines(results))
    assert results.groups[1].against("answer_only") is not None
    page = page_of(results, ["pst", "experiment", "small"], [])
    assert "    pst experiment small" in page and ".png" not in page


@pytest.fixture(scope="module")
def shared(small, tmp_path_factory) -> tuple[Path, Path]:
    """The small experiment's outcomes as another machine gave them away, and a copy of its file without any run."""
    file, _ = small
    other = tmp_path_factory.mktemp("other")
    (other / "given").mkdir()
    (other / "given" / "outcomes.jsonl").write_text((file.with_suffix("") / "outcomes.jsonl").read_text())
    return other / "given", write(other / "small.yaml", pairs=[["no alignment", "pre_thinking"]])


def test_outcomes_of_another_machine_give_the_same_page_without_a_run(small, shared):
    (file, _), (given, other) = small, shared
    ours = json.loads((file.with_suffix("") / "results.json").read_text())
    results, error = run_experiment(load_experiment(str(other)), ["pst"], beside=[given])
    assert error is None and results.elsewhere == 6 and not results.missing
    theirs = json.loads((other.with_suffix("") / "results.json").read_text())
    assert theirs["groups"] == ours["groups"] and theirs["pairs"] == ours["pairs"]
    assert not (other.with_suffix("") / "runs").exists()
    assert "The outcomes of 6 of 6 runs come from earlier calls" in (other.with_suffix("") / "README.md").read_text()
    again = (other.with_suffix("") / "outcomes.jsonl").read_text()
    assert again == (given / "outcomes.jsonl").read_text()


def test_the_accuracy_of_a_run_is_the_share_of_its_right_rows(small, shared):
    given, _ = shared
    lines = [json.loads(line) for line in (given / "outcomes.jsonl").read_text().splitlines()]
    groups = json.loads((small[0].with_suffix("") / "results.json").read_text())["groups"]
    expected = sorted(line["right"].count("1") / 12 for line in lines)
    assert expected == pytest.approx(sorted(value for group in groups for value in group["accuracies"]))


def test_only_the_seeds_that_nobody_has_are_run_and_on_the_same_rows(shared, tmp_path):
    given, _ = shared
    file = write(tmp_path / "more.yaml", variants={"answer_only": {"arm": "answer_only"}}, seeds=[0, 2])
    done = pst(str(file), "--with", str(given))
    assert done.returncode == 0, done.stderr
    assert "2 runs, 1 to do" in done.stderr
    assert [len(own) for own in accuracies(file)] == [2]
    assert not (file.with_suffix("") / "runs" / "letters" / "answer_only" / "seed-0").exists()


def test_runs_with_other_settings_or_rows_are_not_put_beside_ours(shared, tmp_path):
    given, _ = shared
    one = {"answer_only": {"arm": "answer_only"}}
    file = write(tmp_path / "e.yaml", variants=one)
    done = pst(str(file), "train.max_steps=7", "train.eval_steps=2", "--with", str(given))
    assert done.returncode == 3
    assert "train.max_steps=6 (here 7), train.eval_steps=3 (here 2)" in done.stderr and "Traceback" not in done.stderr
    lines = [json.loads(line) for line in (given / "outcomes.jsonl").read_text().splitlines()]
    (tmp_path / "forged").mkdir()
    forged = [line | {"shards": "0" * 64} if line["run"].endswith("answer_only / seed 1") else line for line in lines]
    (tmp_path / "forged" / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in forged))
    done = pst(str(file), "--with", str(tmp_path / "forged"), "--collect")
    assert done.returncode == 3 and "answer_only / seed 1 was run on different rows" in done.stderr


def test_outcomes_of_rows_in_another_folder_are_the_same_runs(shared, tmp_path):
    given, other = shared
    lines = [json.loads(line) for line in (given / "outcomes.jsonl").read_text().splitlines()]
    for line in lines:
        line["config"]["data"]["root"] = "/data/of/another/machine"
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results, _ = run_experiment(load_experiment(str(other)), ["pst"], beside=[tmp_path], only_collect=True)
    assert results.elsewhere == 6 and not results.missing


def assert_alike(one, other) -> None:
    """Equal but for what another processor's rounding does to resampled ends of intervals."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    else:
        assert one == (pytest.approx(other, abs=0.002) if isinstance(other, float) else other)


PAGES = sorted(path.parent for path in (Path(__file__).parents[2] / "docs" / "results").glob("*/outcomes.jsonl"))


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_page_in_the_docs_is_what_its_command_makes_of_its_outcomes(folder, tmp_path):
    (line,) = [row for row in (folder / "README.md").read_text().splitlines() if row.startswith("    pst experiment ")]
    _, _, name, *words = shlex.split(line)
    experiment = load_experiment(name, [*words, f"output_dir={tmp_path}"])
    results, _ = run_experiment(experiment, ["pst"], beside=[folder], only_collect=True)
    written = json.loads((folder / "results.json").read_text())
    again = json.loads((tmp_path / "results.json").read_text())
    for part in ("groups", "pairs"):
        assert_alike(again[part], written[part])
    assert [run.name for run in results.missing] == written["missing"]


def test_outcomes_under_the_old_name_of_a_count_give_the_same_outcome():
    line = (
        next(folder for folder in PAGES if folder.name == "rows").joinpath("outcomes.jsonl").read_text().split("\n")[0]
    )
    raw = json.loads(line)
    old = {**raw, "results": {**raw["results"], "parse_failures": raw["results"]["unparsed"]}}
    del old["results"]["unparsed"]
    assert Outcome.from_line(json.dumps(old), Path("outcomes.jsonl")).to_line() == line


BROKEN = {
    "no JSON": lambda whole: "{",
    "no dict": lambda whole: "[]",
    "cut": lambda whole: json.dumps({"run": whole["run"]}),
    "another arm": lambda whole: json.dumps(whole | {"config": {"arm": "psst"}}),
    "no results": lambda whole: json.dumps(whole | {"results": {}}),
    "no bits": lambda whole: json.dumps(whole | {"right": "012"}),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_file_that_holds_no_outcomes_is_refused_with_its_line(shared, tmp_path, broken):
    given, _ = shared
    file = write(tmp_path / "e.yaml")
    assert pst(str(file), "--with", str(tmp_path)).returncode == 2
    whole = (given / "outcomes.jsonl").read_text().splitlines()[0]
    (tmp_path / "outcomes.jsonl").write_text(whole + "\n" + BROKEN[broken](json.loads(whole)) + "\n")
    done = pst(str(file), "--with", str(tmp_path), "--dry-run")
    assert done.returncode == 3 and "outcomes.jsonl:2:" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_the_results_are_the_same(small, tmp_path):
    file, _ = small
    other = write(tmp_path / "ray.yaml", seeds=[0])
    done = pst(str(other), "on=ray")
    assert done.returncode == 0, done.stderr
    assert [own[:1] for own in accuracies(file)] == accuracies(other)
