"""The dry run: finds what a run would fail on, all of it at once, and writes nothing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import zoo
from small_run import small_config

from pst_dist.diagnostics.dry_run import dry_run
from pst_dist.distributed.ranks import Ranks
from pst_dist.errors import ConfigError
from pst_dist.pipeline import run_all
from pst_dist.training.early_checks import check_settings


def lines(config, level=None):
    return [finding.line() for finding in dry_run(config).findings if level in (None, finding.level)]


def test_a_run_that_can_start_has_no_problem_and_nothing_is_written(small_data, tmp_path):
    config = small_config(small_data, tmp_path / "run", data_dir=str(tmp_path / "run" / "own"))
    found = dry_run(config)
    assert found.exit_code == 0 and not [one for one in found.findings if one.level == "problem"]
    text = "\n".join(one.line() for one in found.findings)
    assert "no bad rows" in text and "nothing is cut" in text and "to do: shards" in text
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_told_at_once(tmp_path, small_data):
    missing = {"student__model_name_or_path": tmp_path / "none", "data__train": tmp_path / "gone.jsonl"}
    found = dry_run(small_config(small_data, tmp_path / "run", **missing))
    assert found.exit_code == 2
    told = "\n".join(one.line() for one in found.findings if one.level == "problem")
    assert str(tmp_path / "none") in told and "gone.jsonl" in told


def test_rationales_that_lose_their_end_are_counted(small_data, tmp_path):
    # A busy machine may have other warnings, of the memory that is left.
    warned = "\n".join(lines(small_config(small_data, tmp_path / "run", layout__max_length=60), "warning"))
    assert warned.count("lose their end; raise layout.max_length") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16")
def test_a_precision_that_training_would_refuse_is_refused_before_the_first_stage(small_data, tmp_path):
    config = small_config(small_data, tmp_path / "run", train__fp16=True)
    (problem,) = lines(config, "problem")
    assert "train.fp16 needs a GPU" in problem
    with pytest.raises(ConfigError, match=r"train\.fp16 needs a GPU"):
        run_all(config)
    assert not (tmp_path / "run").exists()


STAGE_3 = '{"zero_optimization": {"stage": 3}}'


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss__layer": 2}, r"loss\.layer=2: the student has layers 1 to 1"),
        ({"loss__layer": -2}, r"loss\.layer=-2: the student has layers 1 to 1"),
        ({"train__metric_for_best_model": "accuracy", "train__deepspeed": "zero3"}, r"decodes on each rank"),
        ({"train__metric_for_best_model": "accuracy", "train__deepspeed": "mine.json"}, r"decodes on each rank"),
        ({"train__padding_free": True, "student__fresh__architecture": "t5"}, r"padding_free is for causal students"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_first_stage(small_data, tmp_path, changes, said):
    if changes.get("train__deepspeed") == "mine.json":
        (tmp_path / "mine.json").write_text(STAGE_3)
        changes = changes | {"train__deepspeed": str(tmp_path / "mine.json")}
    config = small_config(small_data, tmp_path / "run", **changes)
    assert any(re.search(said, problem) for problem in lines(config, "problem"))
    with pytest.raises(ConfigError, match=said):
        run_all(config)
    assert not (tmp_path / "run").exists()


def test_several_ranks_without_an_engine_for_them_are_refused_before_the_first_stage(small_data, tmp_path):
    config = small_config(small_data, tmp_path / "run")
    check_settings(config, Ranks(rank=0, world_size=1, local_rank=0))
    with pytest.raises(ConfigError, match=r"2 ranks but train\.deepspeed is not set"):
        check_settings(config, Ranks(rank=0, world_size=2, local_rank=0))


def test_a_rate_for_random_weights_is_a_warning_for_a_pretrained_student(small_data, tmp_path):
    base = str(zoo.make("gpt2", tmp_path / "base"))
    keys = {"student__model_name_or_path": base, "train__learning_rate": "2e-3", "embed__encoder": "minilm"}
    (warned,) = lines(small_config(small_data, tmp_path / "run", **keys), "warning")
    assert "train.learning_rate=0.002 is high" in warned and warned.endswith("train.learning_rate=0.0001")


def test_a_finished_run_is_recognised(small_data, tmp_path):
    config = small_config(small_data, tmp_path / "run")
    run_all(config)
    text = "\n".join(lines(config))
    assert "found: shards" in text and "trained; kept if made from the same inputs" in text


@pytest.mark.parametrize(("word", "code"), [("train.max_steps=1", 0), ("data.test_size=0", 2)])
def test_the_command_ends_with_the_code_of_the_run(word, code, tmp_path):
    words = ["run", "demo", "--dry-run", f"output_dir={tmp_path / 'run'}", "data.test=null", "data.test_size=10"]
    words.append(word)
    done = subprocess.run([sys.executable, "-m", "pst_dist.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == ("the run can start" if code == 0 else "1 problem(s): the run would fail")
    assert not (tmp_path / "run").exists()
