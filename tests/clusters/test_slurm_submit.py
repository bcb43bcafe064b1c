"""Submitting to a real Slurm: what is refused before a job starts, and what reaches the job unchanged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import losses
from slurm_jobs import PST, write_config
from small_run import small_config

from pst_dist.cli.main import run_verb
from pst_dist.clusters.slurm.commands import comment_of
from pst_dist.clusters.slurm.follow import read_jobs
from pst_dist.clusters.slurm.render import render
from pst_dist.clusters.slurm.script import read_words

ROOT = Path(__file__).resolve().parents[2]
real = [pytest.mark.slurm, pytest.mark.encoder, pytest.mark.distributed]


@pytest.mark.timeout(300)
class TestOnARealSlurm:
    pytestmark = real

    def test_what_cannot_start_is_refused_before_anything_is_submitted(
        self, slurm, small_data, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        config = str(write_config(tmp_path, small_data, "run", train__deepspeed="zero1"))
        (tmp_path / "file").write_text("")
        (tmp_path / "bad.json").write_text('{"zero_optimization": {"stage": 9}}')
        for words, code, said in [
            (["nodes=3"], 2, "error[CONFIG] nodes=3, but partition main has 2; ask for at most 2"),
            (["nodes=2", "partition=small", "warn=1"], 2, "error[CONFIG] nodes=2, but partition small has 1"),
            (["gpus=1"], 2, "error[CONFIG] gpus=1, but partition main has none; leave gpus= out"),
            (["partition=night"], 2, "there is no partition 'night'; give partition=, one of main, small"),
            (["verb=train", f"data_dir={tmp_path}/none"], 2, "no finished shards found"),
            (["nodes=2", "train.deepspeed=null"], 2, "2 ranks (nodes=2) need train.deepspeed, and it is not set"),
            ([f"train.deepspeed={tmp_path}/bad.json"], 2, "zero_optimization.stage is 9; use 0, 1, 2 or 3"),
            (["time=00:02:30"], 2, "time=00:02:30 is 2.5 min, but the signal to save comes 120 s before the end"),
            (["time=2", "partition=small", "warn=30"], 2, "but partition small allows at most 1 min"),
            (["partition=small"], 2, "the time limit of partition small is 1 min, but the signal to save"),
            (["partition=small,main", f"student.model_name_or_path={tmp_path}/no"], 4, "error[ENVIRONMENT] student: "),
            ([f"embed.encoder={tmp_path}/no"], 4, "error[ENVIRONMENT] encoder: "),
            ([f"output_dir={tmp_path}/file/run"], 4, "error[ENVIRONMENT]"),
            (["sbatch.begin=yesteryear"], 4, "error[ENVIRONMENT] sbatch failed: "),
        ]:
            assert run_verb(["submit", "slurm", config, *words]) == code, words
            err = capsys.readouterr().err
            assert said in err and err.count("\n") == 1, err
            assert not (tmp_path / "run").exists(), words
        assert not slurm.ask("squeue", "-h").strip()

    def test_a_directory_that_a_waiting_job_will_write_to_is_refused(
        self, slurm, small_data, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        config = str(write_config(tmp_path, small_data, "run"))
        assert run_verb(["submit", "slurm", config, "verb=train", "sbatch.begin=now+1hour", "--no-follow"]) == 0
        number = re.search(r"job (\d+): submitted", capsys.readouterr().out)
        assert number
        try:
            assert run_verb(["submit", "slurm", config]) == 5
            assert f"job {number[1]} already uses this directory; follow it: " in capsys.readouterr().err
        finally:
            slurm.ask("scancel", number[1])

    def test_a_controller_that_is_down_is_noticed_in_seconds(self, slurm, tmp_path, monkeypatch, capsys):
        text = Path(slurm.environment["SLURM_CONF"]).read_text()
        (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", text))
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        assert run_verb(["submit", "slurm", "demo", f"output_dir={tmp_path}/run"]) == 4
        assert "Slurm's controller does not answer" in capsys.readouterr().err

    def test_a_node_that_does_not_see_the_config_is_named_before_training(self, slurm, tmp_path):
        """The nodes are one machine here, so the file is taken away instead."""
        config = tmp_path / "run.yaml"
        config.write_text("")
        script = tmp_path / "train.sbatch"
        text = (ROOT / "cluster" / "train.sbatch").read_text()
        script.write_text(text.replace("if [[ -f $1 ]]; then\n", 'if [[ -f $1 ]]; then\nrm "$1"\n'))
        done = subprocess.run(
            ["sbatch", "--wait", "--nodes=2", f"--output={tmp_path}/log", str(script), str(config)],
            env=slurm.environment | {"PST_PYTHON": sys.executable},
            timeout=120,
        )
        assert done.returncode == 4
        assert "not every node sees this file" in (tmp_path / "log").read_text()

    def test_every_character_of_a_path_arrives_in_slurm_as_it_is(self, slurm, tmp_path):
        base = tmp_path / """50%j #1 "two" 'one' $HOME; é"""
        # Not as a word of the command line, which is YAML: ` #` begins a comment there.
        config = small_config(tmp_path / "data", tmp_path).model_copy(update={"output_dir": str(base)})
        request, _ = read_words(["""name=a "b" 'c' #d \\e"""])
        script = base / "slurm" / "train.sbatch"
        script.parent.mkdir(parents=True)
        script.write_text(render(request, config, base / "slurm" / "config.yaml"))
        done = subprocess.run(
            ["sbatch", "--parsable", "--hold", str(script)],
            env=slurm.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        try:
            shown = slurm.ask("scontrol", "show", "job", number)
            assert """JobName=a "b" 'c' #d \\e-train\n""" in shown
            assert f"{number}|{comment_of(base)}" in slurm.ask("squeue", "--noheader", "--format=%i|%k")
            (job,) = read_jobs(shown)
            assert str(job.output) == f"{base}/slurm/{number}.log"
        finally:
            slurm.ask("scancel", number)

    def test_a_submission_from_inside_a_job_takes_nothing_of_that_job_along(self, slurm, small_data, tmp_path):
        config = write_config(tmp_path, small_data, "run", arm="answer_only", train__max_steps=2)
        outer = {"SLURM_JOB_ID": "999", "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}
        outer |= {"SLURM_CPUS_PER_TASK": "2", "SLURM_GPUS_PER_NODE": "2", "SLURM_TRES_PER_TASK": "cpu:2"}
        outer |= {"SBATCH_TIMELIMIT": "00:10:00", "SBATCH_PARTITION": "small", "SBATCH_EXPORT": "NONE"}
        outer |= {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
        output = tmp_path / "a 50%jobs"
        done = subprocess.run(
            [*PST, "submit", "slurm", str(config), "verb=train", f"output_dir={output}", "sbatch.mem=1000"],
            env=slurm.environment | outer,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        number = re.search(r"job (\d+): submitted", done.stdout)
        assert number and (output / "slurm" / f"{number[1]}.log").is_file(), "a % in a path is no pattern"
        assert "step 2/2" in done.stdout, "its log is followed"
        shown = slurm.ask("scontrol", "show", "job", number[1])
        assert "Partition=main" in shown, shown
        # Slurm's backfill scheduler writes a year where it starts a job without a limit.
        assert "TimeLimit=UNLIMITED" in shown or "TimeLimit=365-00:00:00" in shown, shown
        assert len(losses(output)) == 2

    def test_an_srun_that_fails_is_not_blamed_on_the_disk(self, slurm, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text("")
        done = subprocess.run(
            ["sbatch", "--wait", f"--output={tmp_path}/log", str(ROOT / "cluster" / "train.sbatch"), str(config)],
            # What an outer job of another shape leaves behind, for a script that somebody submits by hand.
            env=slurm.environment | {"PST_PYTHON": sys.executable, "SLURM_MEM_PER_CPU": "1", "SLURM_MEM_PER_NODE": "1"},
            timeout=120,
        )
        log = (tmp_path / "log").read_text()
        assert done.returncode == 4, log
        assert "srun cannot start a process on every node" in log and "sees this file" not in log
