"""What an experiment's file means: its runs, what wins over what, and the mistakes that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments import SMALL, write

from pst_dist.config.loading import load_config
from pst_dist.errors import ConfigError, InputError
from pst_dist.experiment.spec import Experiment, load_experiment, ready_made_experiments, runs_of


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


def test_the_defaults_are_the_five_arms_and_three_seeds():
    experiment = Experiment(name="x", tasks={"a": {}})
    assert list(experiment.variants) == ["answer_only", "pre_thinking", "prefix", "post_thinking", "pst"]
    assert experiment.seeds == [0, 1, 2] and experiment.path == Path("runs/experiments/x")
