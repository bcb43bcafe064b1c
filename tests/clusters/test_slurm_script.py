"""Slurm: the words of a job and the script that is rendered from them."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from small_run import small_config

from pst_dist.cli.main import run_verb
from pst_dist.clusters.slurm.partitions import seconds_of
from pst_dist.clusters.slurm.render import render, stages, template
from pst_dist.clusters.slurm.script import array_words, cells, read_words
from pst_dist.config.loading import dump_config, load_config
from pst_dist.errors import ConfigError


def test_words_of_the_job_and_of_the_config_are_told_apart():
    request, rest = read_words(
        ["nodes=2", "gpus=a100:8", "time=04:00:00", "train.bf16=true", "sbatch.reservation=night", "arm=pst"]
    )
    assert (request.nodes, request.gpu_count, request.tasks) == (2, 8, 0)
    assert request.options == {"time": "04:00:00", "reservation": "night"}
    assert rest == ["train.bf16=true", "arm=pst"]


@pytest.mark.parametrize(
    "word, said",
    [
        ("nodes=0", "nodes=0 is not a positive whole number"),
        ("gpus=many", "gpus=many is not a number of GPUs"),
        ("time=soon", "time=soon is not a time limit"),
        ("arms=pst", "not a list"),
        ("arms=[pst,pst]", "not a list of distinct values"),
        ("arms=[pts]", "no arm 'pts'"),
        ("seeds=[one]", "'one' is not a whole number"),
    ],
)
def test_a_word_that_slurm_would_not_take_is_refused(word, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_words([word])


def test_ranks_are_for_nodes_without_gpus():
    with pytest.raises(ConfigError, match="ranks= is for nodes without GPUs"):
        read_words(["ranks=2", "gpus=8"])
    assert read_words(["ranks=2", "gpus=0"])[0].ranks == 2


def test_an_array_has_one_task_and_one_folder_for_each_arm_and_seed(tmp_path):
    assert cells(["pst", "prefix"], [3, 5]) == [("pst", 3), ("prefix", 3), ("pst", 5), ("prefix", 5)]
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(tmp_path / "data", tmp_path / "run", arms="[pst, answer_only]")))
    words = [str(path), "train.bf16=true", "arms=[pst,prefix]", "seeds=[3,5]"]
    configs = [load_config(task[0], task[1:]) for task in (array_words(words, index) for index in range(4))]
    assert [(config.arm, config.seed) for config in configs] == cells(["pst", "prefix"], [3, 5])
    assert [Path(config.output_dir).relative_to(tmp_path / "run") for config in configs] == [
        Path("seed-3/pst"),
        Path("seed-3/prefix"),
        Path("seed-5/pst"),
        Path("seed-5/prefix"),
    ]
    assert {config.data_dir for config in configs} == {str(tmp_path / "data")}
    assert all(config.train.bf16 and not config.arms for config in configs)
    with pytest.raises(ConfigError, match="task 4 of the array has no arm or seed"):
        array_words(words, 4)


def test_the_script_carries_what_was_asked_for_and_is_valid_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path / "data", tmp_path / "my run")
    request, _ = read_words(["nodes=4", "gpus=8", "time=1-12", "seeds=[0,1,2]", "parallel=2", "warn=300"])
    script = render(request, config, tmp_path / "my run" / "slurm" / "config.yaml")
    lines = script.splitlines()
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1-12",
        "#SBATCH --array=0-2%2",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
        f'#SBATCH --output="{tmp_path}/my run/slurm/%A_%a.log"',
        f"set -- '{tmp_path}/my run/slurm/config.yaml' 'seeds=[0,1,2]'",
    ):
        assert lines.count(line) == 1, line
    options = [line.split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert len(set(options)) == len(options), "an option given twice"
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last]), "sbatch stops reading options at the first command"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for name in ("ray.sbatch", "stage.sbatch"):
        subprocess.run(["bash", "-n", str(template(name))], check=True)


def test_a_dry_run_prints_the_script_and_needs_no_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [f"output_dir={tmp_path}/run", "nodes=2", "train.max_steps=7", "--dry-run"]
    assert run_verb(["submit", "slurm", "demo", *words]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in printed and printed.startswith("#!/usr/bin/env bash\n")
    waits = "# ---- next job: sbatch --dependency=afterok:PREVIOUS_JOB --kill-on-invalid-dep=yes"
    assert printed.count(waits) == 2, "the training after the data, and the rest after the training"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["name", "output_dir", "sbatch.comment", "partition"])
@pytest.mark.parametrize("hidden", ["\n", "\r", "\x00", "\x1b", "\x85", "\u2028", "\u202e"])
def test_no_value_can_begin_a_line_of_its_own_in_the_script(tmp_path, capsys, place, hidden):
    value = f"{tmp_path}/run{hidden}touch pwned"
    word = json.dumps(value) if place == "output_dir" else value  # a key of the config is read as YAML
    assert run_verb(["submit", "slurm", "demo", f"{place}={word}", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"contains the control character U+{ord(hidden):04X}" in err and err.count("\n") == 1


def test_an_option_cannot_carry_a_command_in_its_name(capsys):
    assert run_verb(["submit", "slurm", "demo", "sbatch.x\ntouch pwned=1", "--dry-run"]) == 2
    assert "is not an option of sbatch" in capsys.readouterr().err


def test_the_script_runs_with_the_words_that_it_was_given_and_no_others(tmp_path):
    """The shell's own view: the template's body is cut off after its arguments are set."""
    base = tmp_path / """a 'b' "c" $(touch pwned) `touch pwned`; touch pwned #"""
    request, _ = read_words(["seeds=[0,1]"])
    config = small_config(tmp_path / "data", tmp_path).model_copy(update={"output_dir": str(base)})
    script = render(request, config, base / "slurm" / "config.yaml")
    head = script[: script.index("back_into_the_queue()")] + "printf '%s\\0' \"$@\"\n"
    done = subprocess.run(["bash"], input=head, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split("\0") == [f"{base}/slurm/config.yaml", "seeds=[0,1]", ""]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], [("data", "", 1, "shard embed"), ("train", "", 2, ""), ("finish", "", 1, "evaluate export report")]),
        (
            ["gpus=a100:8"],
            [
                ("shard", "", 1, "shard"),
                ("embed", "a100:1", 1, "embed"),
                ("train", "a100:8", 2, ""),
                ("finish", "a100:1", 1, "evaluate export report"),
            ],
        ),
        (["gpus=8", "arm=answer_only"], [("data", "", 1, "shard"), ("train", "8", 2, ""), ("finish", "1", 1, None)]),
        (["embed.backend=ray"], [("shard", "", 1, "shard"), ("embed", "", 2, "embed"), ("train", "", 2, ""), None]),
        (["verb=train", "gpus=8"], [("train", "8", 2, "")]),
    ],
)
def test_each_job_has_gpus_and_nodes_only_where_it_uses_them(tmp_path, words, expected):
    request, rest = read_words(["nodes=2", "cpu_partition=cpu", "partition=gpu", *words])
    config = small_config(tmp_path / "data", tmp_path / "run", **dict(word.split("=") for word in rest))
    jobs = stages(request, config)
    assert len(jobs) == len(expected)
    for job, wanted in zip(jobs, expected, strict=True):
        if wanted is None:
            continue
        name, gpus, nodes, verbs = wanted
        script = render(request, config, tmp_path / "config.yaml", job)
        assert (job.name, script.count(f"#SBATCH --gpus-per-node={gpus}\n")) == (name, int(bool(gpus)))
        assert f"#SBATCH --nodes={nodes}\n" in script
        part = "cpu" if request.gpus and not gpus else "gpu"
        assert f"#SBATCH --partition={part}\n" in script
        if verbs:
            assert f"set -- {verbs if ' ' not in verbs else repr(verbs)} {tmp_path}/config.yaml\n" in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    "limit, seconds",
    [("30", 1800), ("2:30", 150), ("04:00:00", 14400), ("1-12", 129600), ("2-1:30", 178200), ("infinite", None)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(limit, seconds):
    assert seconds_of(limit) == seconds
