"""Experiments: what a file means, real runs in workers that are told to stop or killed, and what the results say."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from waiting import wait_until

from pst_dist.config.loading import load_config
from pst_dist.data.tasks.registry import TASKS
from pst_dist.errors import ConfigError, DivergedError, InputError, PstError
from pst_dist.evaluation.statistics import Difference, mcnemar, paired, standard_error
from pst_dist.experiment.checks import check_runs
from pst_dist.experiment.driver import run_experiment
from pst_dist.experiment.outcomes import Outcome
from pst_dist.experiment.pictures import accuracy_picture, cost_picture, curve_picture, sweep_picture
from pst_dist.experiment.published import PUBLISHED, PUBLISHED_TASKS
from pst_dist.experiment.results import Pair, Results, collect
from pst_dist.experiment.results_page import _controls, page_of
from pst_dist.experiment.results_table import table_lines
from pst_dist.experiment.runs import result_of
from pst_dist.experiment.spec import Experiment, load_experiment, ready_made_experiments, runs_of

SMALL = {
    "name": "small",
    "settings": {
        "task": "last_letter_concatenation",
        "data": {"test": "gen:last_letters?rows=12&words=2", "validation_size": 8},
        "student.fresh": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
        "train": {"max_steps": 6, "global_batch_size": 8, "per_device_train_batch_size": 8, "eval_steps": 3},
        "train.report_to": "none",
        "evaluate": {"latency_rows": 1, "explain_rows": 0, "max_new_tokens": 12},
    },
    "tasks": {"letters": {"data.train": "gen:last_letters?rows=40&words=2"}},
    "variants": {
        "answer_only": {"arm": "answer_only"},
        "pre_thinking": {"arm": "pre_thinking"},
        "no alignment": {"arm": "pst", "loss.alignment_weight": 0},
    },
    "seeds": [0, 1],
}


def write(path: Path, **changes) -> Path:
    """The small experiment's file, its output beside it."""
    tree = SMALL | {"output_dir": str(path.with_suffix(""))} | changes
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def pst(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pst_dist.cli", "experiment", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


# What a file means


def test_every_combination_is_one_run_and_seeds_come_last(tmp_path):
    file = write(tmp_path / "e.yaml", vary={"data.max_rows": [16, 24]})
    runs = runs_of(load_experiment(str(file)))
    assert len(runs) == 1 * 2 * 3 * 2
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6
    assert runs[0].name == "letters / answer_only / max_rows 16 / seed 0"
    assert len({run.config.output_dir for run in runs}) == 12
    assert [run.config.data.max_rows for run in runs[:6]] == [16] * 3 + [24] * 3


def test_runs_with_the_same_rows_share_their_data_and_others_do_not(tmp_path):
    file = write(tmp_path / "e.yaml", vary={"data.max_rows": [16, 24]})
    folders = {}
    for run in runs_of(load_experiment(str(file))):
        folders.setdefault(run.config.data.max_rows, set()).add(run.config.data_dir)
    assert [len(found) for found in folders.values()] == [1, 1]
    assert not folders[16] & folders[24]


def test_tasks_with_the_same_rows_share_the_data_of_the_first(tmp_path):
    rows = {"data.train": "gen:last_letters?rows=40&words=2"}
    wide, other = {"student.fresh.hidden_size": 64}, {"data.train": "gen:last_letters?rows=41&words=2"}
    file = write(tmp_path / "e.yaml", tasks={"a": rows, "b": rows | wide, "c": other})
    folders = {run.task: Path(run.config.data_dir).name for run in runs_of(load_experiment(str(file)))}
    assert folders["b"] == folders["a"] and folders["a"].startswith("a-")
    assert folders["c"] != folders["a"] and folders["c"].startswith("c-")


def test_a_task_may_have_only_some_of_the_variants_and_seeds(tmp_path):
    rows = {"data.train": "gen:last_letters?rows=40&words=2"}
    tasks = {"all": rows, "some": rows | {"variants": ["pre_thinking"], "seeds": [1]}}
    file = str(write(tmp_path / "e.yaml", tasks=tasks))
    names = [run.name for run in runs_of(load_experiment(file))]
    assert names[:3] == [f"all / {variant} / seed 0" for variant in SMALL["variants"]]
    assert names[3:6] == [f"all / {variant} / seed 1" for variant in SMALL["variants"]]
    assert names[6:] == ["some / pre_thinking / seed 1"]
    # Seeds of the command line restrict further; those that a task does not name are not added.
    assert not [run for run in runs_of(load_experiment(file, ["seeds=[0]"])) if run.task == "some"]
    assert runs_of(load_experiment(file, ["seeds=[1]"]))[-1].config.arm == "pre_thinking"


def test_a_variant_wins_over_its_task_the_task_over_the_settings_and_the_command_line_over_all(tmp_path):
    tasks = {"a": {"data.train": "gen:last_letters?rows=40", "train.max_steps": 5}}
    variants = {"x": {"arm": "pst"}, "y": {"arm": "pst", "train.max_steps": 4}}
    file = write(tmp_path / "e.yaml", tasks=tasks, variants=variants, seeds=[3])
    steps = [run.config.train.max_steps for run in runs_of(load_experiment(str(file)))]
    assert steps == [5, 4]
    told = runs_of(load_experiment(str(file), ["train.max_steps=2", "seeds=[7]"]))
    assert [(run.config.train.max_steps, run.seed) for run in told] == [(2, 7), (2, 7)]


def test_a_map_of_columns_is_one_value_and_replaces_that_of_the_config(tmp_path):
    tasks = {"a": {"config": "svamp", "data": {"columns": {"question": "q"}}}}
    (run, *_) = runs_of(load_experiment(str(write(tmp_path / "e.yaml", tasks=tasks, settings={}))))
    assert load_config("svamp").data.columns != run.config.data.columns == {"question": "q"}


def test_an_overlay_in_the_file_lies_over_every_tasks_config_and_under_the_experiments_own_keys(tmp_path):
    tasks = {"a": {"config": "svamp", "train.num_train_epochs": 2}, "b": {"config": "addsub"}}
    settings = {"train.learning_rate": 1e-4}
    file = write(tmp_path / "e.yaml", tasks=tasks, settings=settings, seeds=[0], overlays=["+paper_gpt2"])
    runs = runs_of(load_experiment(str(file), ["data.root=here"]))
    plain = load_config("addsub", ["+paper_gpt2"])
    for run in runs:
        assert run.config.train.global_batch_size == plain.train.global_batch_size == 8
        assert run.config.train.learning_rate == 1e-4
        assert run.config.train.num_train_epochs == (2 if run.task == "a" else plain.train.num_train_epochs)


def test_a_recipe_on_the_command_line_wins_over_the_file_and_a_key_over_the_recipe(tmp_path):
    """`pst experiment twelve +paper_t5` once trained the published students for the 200 steps of small ones."""
    runs = runs_of(load_experiment("twelve", ["+paper_t5", "data.root=here", "train.num_train_epochs=3"]))
    for run in runs[:5]:
        plain = load_config("single_eq", ["+paper_t5", "data.root=here"])
        assert run.config.train == plain.train.model_copy(update={"num_train_epochs": 3})
        assert (run.config.data.max_rows, run.config.evaluate.max_rows) == (None, None)
        assert run.config.arm in {"answer_only", "pre_thinking", "prefix", "post_thinking", "pst"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": {"a": {"arm": "psst"}}}, "task letters, variant a: arm"),
        ({"variants": {"a": {"output_dir": "x"}}}, "variants.a.output_dir"),
        ({"variants": {"a b": {}, "a-b": {}}}, "would share a directory"),
        ({"seeds": [1, 1]}, "contains a duplicate"),
        ({"tasks": {}}, "tasks is empty"),
        ({"name": "a/b"}, "may only contain letters"),
        ({"sedes": [0]}, "did you mean 'seeds'"),
        ({"vary": {"data.max_rows": []}}, "has no values"),
        ({"settings": {"train.lr": 1}}, "train.lr"),
        ({"pairs": [["no alignment", "pst"]]}, "there is no variant 'pst'"),
        ({"tasks": {"a": {"variants": ["pst"]}}}, "tasks.a.variants: there is no variant 'pst'"),
        ({"tasks": {"a": {"variants": "answer_only"}}}, "tasks.a.variants is not a list of labels of variants"),
        ({"tasks": {"a": {"seeds": [True]}}}, "tasks.a.seeds is not a list of whole numbers"),
        ({"tasks": {"a": {"seeds": [5]}}}, "no task is run with any of the seeds"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, changes, said):
    file = write(tmp_path / "e.yaml", **changes)
    with pytest.raises(ConfigError) as caught:
        runs_of(load_experiment(str(file)))
    assert said in str(caught.value)


def test_a_file_that_is_not_there_names_the_ready_made_ones():
    with pytest.raises(InputError, match="letters"):
        load_experiment("nowhere")


@pytest.mark.parametrize("name", ready_made_experiments())
def test_every_ready_made_experiment_gives_valid_runs(name):
    experiment = load_experiment(name, ["data.root=somewhere"])
    assert experiment.question and runs_of(experiment)


# What the results say


def test_errors_and_means_are_those_worked_out_by_hand():
    assert standard_error(np.array([1.0, 0.0, 1.0, 0.0])) == pytest.approx((1 / 3) ** 0.5 / 2)
    arm = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    base = np.array([[1, 0, 0, 0], [0, 0, 1, 0]], dtype=bool)
    test = paired("base", arm, base)
    assert test.difference == pytest.approx((1 + 2) / 8) and test.seeds == 2


def test_one_seed_is_the_paired_bootstrap_over_rows_and_mcnemar():
    generator = np.random.default_rng(0)
    base = generator.random((1, 400)) < 0.4
    arm = base ^ (generator.random((1, 400)) < 0.2)
    test = paired("base", arm, base)
    only_arm, only_base = int((arm & ~base).sum()), int((~arm & base).sum())
    assert test.p == mcnemar(only_arm, only_base)
    differences = arm[0].astype(int) - base[0].astype(int)
    half = 1.96 * standard_error(differences)
    assert test.low == pytest.approx(test.difference - half, abs=0.01)
    assert test.high == pytest.approx(test.difference + half, abs=0.01)


def test_seeds_that_disagree_widen_the_interval_and_ones_that_agree_do_not():
    generator = np.random.default_rng(1)
    base = generator.random((3, 300)) < 0.3
    steady = base | (generator.random((3, 300)) < 0.15)
    shaky = base.copy()
    shaky[0] |= generator.random(300) < 0.6
    narrow, wide = paired("b", steady, base), paired("b", shaky, base)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert narrow.p < 0.01 < wide.p


def test_equal_variants_do_not_differ():
    right = np.random.default_rng(2).random((3, 50)) < 0.5
    test = paired("b", right, right)
    assert (test.difference, test.low, test.high, test.p) == (0, 0, 0, 1)


def test_the_published_tables_have_a_number_for_each_of_the_twelve_tasks():
    assert set(PUBLISHED_TASKS) == set(TASKS) - {"arithmetic", "proportion"}
    assert {len(values) for values in PUBLISHED.values()} == {12}
    averages = {"GPT-2 small, 124M, CoT": 22.7, "Flan-T5 base, 220M, FT": 39.5}
    for name, average in averages.items():
        assert np.mean(PUBLISHED[name]) == pytest.approx(average, abs=0.6)


# Real runs


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


def test_a_warning_of_one_of_many_runs_says_which(tmp_path):
    variants = {"all words": {"arm": "post_thinking", "loss.rationale_weight": 10_000, "train.logging_steps": 2}}
    done = pst(str(write(tmp_path / "e.yaml", variants=variants, seeds=[0])), "jobs=1")
    assert done.returncode == 0, done.stderr
    assert "letters / all words / seed 0: step 2: the rationale term contributes" in done.stderr


def test_runs_that_train_the_same_are_trained_once(tmp_path):
    variants = {
        "own": {"arm": "pre_thinking"},
        "given": {"arm": "pre_thinking", "evaluate.rationale": "teacher"},
        "other": {"arm": "pre_thinking", "train.learning_rate": 3e-4},
    }
    file = write(tmp_path / "e.yaml", variants=variants, seeds=[0])
    experiment = load_experiment(str(file), ["jobs=1"])
    own, given, other = runs_of(experiment)
    assert (own.alike, given.alike, other.alike) == ((), (own.config.output_dir,), ())
    results, error = run_experiment(experiment, ["pst"])
    assert error is None and len(results.groups) == 3
    records = [json.loads((Path(run.config.output_dir) / "train.json").read_text()) for run in (own, given, other)]
    assert records[0] == records[1] != records[2]  # to the second of training time
    assert not (Path(given.config.output_dir) / "checkpoints").exists()


def test_a_run_that_fails_is_named_and_keeps_no_other(tmp_path):
    variants = {"good": {"arm": "answer_only"}, "bad": {"arm": "answer_only", "train.learning_rate": 1e30}}
    file = write(tmp_path / "e.yaml", variants=variants, seeds=[0])
    results, error = run_experiment(load_experiment(str(file), ["jobs=1"]), ["pst"])
    assert isinstance(error, DivergedError)
    assert [group.variant for group in results.groups] == ["good"]
    assert list(results.failures) == ["letters / bad / seed 0"]
    assert "## Failed runs" in (tmp_path / "e" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss.rationale_weight": 0}, r"loss\.rationale_weight is 0"),
        ({"task": "last_letters"}, r"no task 'last_letters'"),
        ({"train.deepspeed": "zero4"}, r"no profile 'zero4'"),
        ({"data.test": None}, r"there are no test rows"),
        ({"student.model_name_or_path": "./nowhere"}, r"nowhere"),
    ],
)
def test_what_the_last_run_would_fail_on_is_refused_before_the_first(tmp_path, changes, said):
    variants = {"good": {"arm": "answer_only"}, "bad": {"arm": "pre_thinking"} | changes}
    file = write(tmp_path / "e.yaml", variants=variants, seeds=[0])
    with pytest.raises(PstError, match=said) as raised:
        run_experiment(load_experiment(str(file), ["jobs=1"]), ["pst"])
    assert "task letters, variant bad: " in str(raised.value)
    assert not (tmp_path / "e" / "data").exists() and not (tmp_path / "e" / "runs").exists()
    # With Ray, students are loaded on its nodes, which may have what this machine lacks.
    runs = runs_of(load_experiment(str(file), ["backend=ray"]))
    if "task" in changes or "data.test" in changes:
        with pytest.raises(PstError, match=said):
            check_runs(runs, here=False)
    else:
        check_runs(runs, here=False)


def test_a_dry_run_lists_the_runs_and_then_what_one_of_them_would_fail_on(tmp_path):
    variants = {"good": {"arm": "answer_only"}, "bad": {"arm": "pst", "loss.layer": 3}}
    done = pst(str(write(tmp_path / "e.yaml", variants=variants, seeds=[0])), "--dry-run")
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 2
    assert "task letters, variant bad: loss.layer=3: the student has layers 1 to 1" in done.stderr


TWO = {name: SMALL["variants"][name] for name in ("answer_only", "no alignment")}
LONG = ("train.max_steps=300", "train.eval_steps=300", "train.save_steps=20", "seeds=[0]", "jobs=2")


def start(file: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pst_dist.cli", "experiment", str(file), *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def workers_of(pid: int) -> list[int]:
    """Children of the driver that train, the oldest first; the resource tracker of multiprocessing is none."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        line = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in line:
            found.append(int(child))
    return found


def accuracies(file: Path) -> list[list[float]]:
    groups = json.loads((file.with_suffix("") / "results.json").read_text())["groups"]
    return [group["accuracies"] for group in groups]


@pytest.mark.slow
def test_told_to_stop_all_runs_save_and_a_killed_worker_is_replaced(tmp_path):
    file = write(tmp_path / "e.yaml", variants=TWO)
    folder = file.with_suffix("")

    def checkpoints() -> int:
        return len(list(folder.glob("runs/letters/*/seed-0/checkpoints/checkpoint-*")))

    first = start(file)
    wait_until(lambda: checkpoints() >= 2, "two checkpoints", seconds=180)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert "every run has saved" in said
    second = start(file)
    try:
        wait_until(lambda: checkpoints() >= 3 and len(workers_of(second.pid)) == 2, "more checkpoints", seconds=180)
        os.kill(workers_of(second.pid)[0], signal.SIGKILL)
        out, said = second.communicate(timeout=300)
    finally:
        if second.poll() is None:
            second.kill()
    assert second.returncode == 0, said
    assert "its process was killed by SIGKILL; restarting it" in said
    assert "2 runs, 2 to do" in said and "no alignment" in out
    undisturbed = write(tmp_path / "u.yaml", variants=TWO)
    done = pst(str(undisturbed), *LONG)
    assert done.returncode == 0, done.stderr
    assert accuracies(file) == accuracies(undisturbed)


@pytest.mark.slow
def test_workers_save_and_end_when_the_driver_is_killed(tmp_path):
    file = write(tmp_path / "e.yaml", variants={"answer_only": {"arm": "answer_only"}})
    driver = start(file)
    wait_until(lambda: list(tmp_path.rglob("checkpoint-*/manifest.json")), "a checkpoint", seconds=180)
    workers = workers_of(driver.pid)
    driver.kill()
    driver.communicate(timeout=60)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the workers' end")
    again = pst(str(file), *LONG)
    assert again.returncode == 0, again.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_the_results_are_the_same(small, tmp_path):
    file, _ = small
    other = write(tmp_path / "ray.yaml", seeds=[0])
    done = pst(str(other), "on=ray")
    assert done.returncode == 0, done.stderr
    assert [own[:1] for own in accuracies(file)] == accuracies(other)


def test_the_defaults_are_the_five_arms_and_three_seeds():
    experiment = Experiment(name="x", tasks={"a": {}})
    assert list(experiment.variants) == ["answer_only", "pre_thinking", "prefix", "post_thinking", "pst"]
    assert experiment.seeds == [0, 1, 2] and experiment.path == Path("runs/experiments/x")


def test_the_worker_does_not_answer_for_a_parent_that_is_gone():
    """A worker whose parent died before it could ask to be told ends at once."""
    from multiprocessing import Pipe

    from pst_dist.experiment.workers import _serve

    ours, theirs = Pipe()
    started = time.monotonic()
    _serve(theirs, None, 1, os.getppid() + 1)
    assert time.monotonic() - started < 60
    ours.close()


def test_the_page_says_where_a_control_proves_nothing():
    variants = {
        "pst": {"arm": "pst"},
        "shuffled": {"arm": "pst", "loss.control": "shuffle_embeddings"},
        "unaligned": {"arm": "pst", "loss": {"alignment_weight": 0}},
        "post": {"arm": "post_thinking"},
    }
    experiment = Experiment(name="e", tasks={"t": {}}, variants=variants)

    def page(*found: tuple[str, str, float, float]) -> str:
        pairs = []
        for one, other, low, high in found:
            test = Difference(other, difference=(low + high) / 2, low=low, high=high, p=0.5, seeds=3)
            pairs.append(Pair("t", (), one, test))
        return " ".join(_controls(Results(experiment, [], pairs, [])))

    clear, same = ("pst", "shuffled", 0.01, 0.2), ("pst", "unaligned", -0.03, 0.05)
    said = page(clear, same, ("pst", "post", -0.1, 0.1))
    assert "In 1 of the 2 pairs" in said and "is inconclusive" in said
    assert "pst against unaligned, +1.00 points (-3.00 to +5.00)" in said and "shuffled" not in said
    assert page(clear) == "The arm and its control differ measurably."
    assert page(("pst", "post", -0.1, 0.1)) == "", "another arm is no control"
