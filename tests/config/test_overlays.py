"""Sets of keys that go over any config: the published recipe on the twelve tasks, and a run of it without the hub."""

from pathlib import Path

import pytest
import yaml
from small_run import make_small_data, small_config

from pst_dist.arms import ARMS
from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.config.locate import overlays
from pst_dist.data.tasks import TASKS
from pst_dist.errors import ConfigError, InputError
from pst_dist.pipeline import run_all
from pst_dist.storage.manifest import read_json, read_lines
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.module import build_student
from pst_dist.training.trainer import train

TWELVE = list(TASKS)[:12]
RECIPE = {
    "learning_rate": 3e-4,
    "weight_decay": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0,
    "max_grad_norm": 0,
    "global_batch_size": 8,
    "num_train_epochs": 20,
    "max_steps": None,
}
"""Fine-tune-CoT's custom_train.py and src/custom/model.py: torch's AdamW, whose weight decay is 0.01, and no more."""


@pytest.mark.parametrize(("name", "prompt"), [("paper_t5", "{question}"), ("paper_gpt2", "{question} ###")])
@pytest.mark.parametrize("task", TWELVE)
def test_the_published_recipe_fits_every_task(task, name, prompt):
    plain, config = load_config(task), load_config(task, [f"+{name}"])
    assert {key: getattr(config.train, key) for key in RECIPE} == RECIPE
    assert (config.layout.prompt, config.layout.answer_marker, config.layout.max_length) == (prompt, " -->", 512)
    assert config.evaluate.max_rows is None, "accuracy is over all test rows"
    assert (config.data, config.task) == (plain.data, task)


def test_bfloat16_on_a_cpu_changes_how_a_student_computes_and_nothing_of_what_it_learns(tmp_path):
    """Also of one that starts from named weights: the overlay stands beside +minilm."""
    plain, config = load_config("svamp", ["+minilm"]), load_config("svamp", ["+minilm", "+cpu_bf16"])
    assert config.train == plain.train.model_copy(update={"bf16": True})
    assert config.student == plain.student.model_copy(update={"attn_implementation": "eager"})
    data, first = make_small_data(tmp_path / "data"), {}
    for name, keys in (("exact", {}), ("coarse", {"train__bf16": "true", "student__attn_implementation": "eager"})):
        train(small_config(data, tmp_path / name, **keys))
        first[name] = read_lines(tmp_path / name / "metrics.jsonl")[0]["loss"]
    assert first["coarse"] == pytest.approx(first["exact"], rel=0.01) and first["coarse"] != first["exact"]


@pytest.mark.parametrize("model", "google/flan-t5-small google/flan-t5-large google-t5/t5-base".split())
def test_the_size_is_one_word(model):
    config = load_config("svamp", ["+paper_t5", f"student.model_name_or_path={model}", "train.num_train_epochs=2"])
    assert (config.student.model_name_or_path, config.train.num_train_epochs) == (model, 2)


def test_single_keys_win_wherever_they_stand_and_later_overlays_over_earlier_ones(tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  learning_rate: 1.0e-5\nlayout:\ndata:\n  columns: {question: q}\n")
    words = ["train.global_batch_size=4", "+paper_t5", f"+{tmp_path / 'mine.yaml'}"]
    config = load_config("svamp", words)
    assert (config.train.global_batch_size, config.train.learning_rate) == (4, 1e-5)
    assert config.layout.prompt == "{question}", "an empty section changes nothing"
    assert config.data.columns == {"question": "q"}, "a mapping that is a value is replaced whole"


def test_a_mistake_in_an_overlay_is_told_with_its_file_and_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  learning_rate: fast\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: train\.learning_rate: input should be a valid number"):
        load_config("svamp", [f"+{path}"])
    path.write_text("train:\n  seed: 1\n  learning_rat: 1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: unknown key 'train\.seed'"):
        load_config("svamp", [f"+{path}"])
    with pytest.raises(InputError, match=r"did you mean \+paper_t5\?"):
        load_config("svamp", ["+paper-t5"])


def test_overlays_are_listed_with_what_they_are_for(capsys):
    assert run_verb(["config", "--list"]) == 0
    printed = capsys.readouterr().out
    for name, summary in overlays().items():
        assert f"+{name}" in printed and summary in printed and len(summary) < 121
    assert run_verb(["config", "svamp", "--seed", "3", "+paper_gpt2", "output_dir=x"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["layout"]["prompt"], shown["output_dir"]) == (3, "{question} ###", "x")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny T5 and a tiny GPT-2 with tokenizers of their own, as a hub model would lie in a folder."""
    made = {}
    for kind in ("t5", "gpt2"):
        config = small_config(Path("unused"), Path("unused"), student__fresh__architecture=kind, layout__max_length=512)
        tokenizer = build_tokenizer(config.student, [])
        made[kind] = tmp_path_factory.mktemp(kind) / "model"
        build_student(config, tokenizer, None).model.save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
    return made


@pytest.mark.encoder
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize("arm", ["pst", "pre_thinking"])
def test_the_recipe_runs_from_rows_to_scores_with_a_folder_in_the_hubs_place(arm, kind, folders, small_data, tmp_path):
    small = ["train.num_train_epochs=1", "train.report_to=none", "evaluate.max_new_tokens=8", "train.num_threads=1"]
    rows = [f"data_dir={small_data}", "data.train=gen:last_letters?rows=40&seed=0&words=2", "data.validation_size=8"]
    rows += ["data.test=gen:last_letters?rows=12&seed=0&words=2", "shards.samples_per_shard=16"]
    rows += ["data.split_file=null", "data.teacher_completions=null", "data.keep=all", "data.columns=null"]
    student = f"student.model_name_or_path={folders[kind]}"
    out = tmp_path / "run"
    words = [f"+paper_{kind}", f"arm={arm}", student, f"output_dir={out}", *rows, *small]
    run_all(load_config("last_letter_concatenation", words))
    results = read_json(out / "eval" / "test" / "results.json")
    assert results["rows"] == 12 and read_json(out / "train.json")["steps"] == 4
    settings = read_json(out / "export" / "pst.json")
    assert settings["prompt"] == ("{question}" if kind == "t5" else "{question} ###")
    assert settings["arm"] == arm and ARMS[arm].needs_rationale
