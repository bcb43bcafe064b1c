"""Slurm: the script that is rendered, the refusals before anything starts, and jobs on a real Slurm of two nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import hosts_can_be_made
from run_files import losses
from slurm_cluster import SlurmCluster, run_on_hosts, slurm_cluster, slurm_folder
from small_run import small_config
from waiting import wait_until

from pst_dist.cli.main import run_verb
from pst_dist.clusters.slurm.commands import comment_of
from pst_dist.clusters.slurm.follow import read_jobs
from pst_dist.clusters.slurm.partitions import Partition, check_room, gpus_of, seconds_of
from pst_dist.clusters.slurm.render import render, stages, template
from pst_dist.clusters.slurm.script import array_words, cells, read_words
from pst_dist.config.loading import dump_config, load_config
from pst_dist.errors import ConfigError
from pst_dist.storage.manifest import read_json
from pst_dist.storage.mounts import filesystem_of
from pst_dist.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
PST = (sys.executable, "-m", "pst_dist.cli")
STEPS = 40
real = [pytest.mark.slurm, pytest.mark.encoder, pytest.mark.distributed]


# --- what is asked for ------------------------------------------------------------------------------------------------


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


# --- what Slurm says --------------------------------------------------------------------------------------------------


def test_gpus_of_a_node_are_added_up_over_their_kinds():
    assert gpus_of("gpu:a100:8(S:0-1),gpu:h100:4,nvme:1") == 12
    assert gpus_of("gpu:2") == 2
    assert gpus_of("(null)") == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["nodes=9"], "nodes=9, but partition cpu has 8; ask for at most 8, or another partition of cpu, gpu"),
        (["gpus=1"], "gpus=1, but partition cpu has none"),
        (["gpus=8", "partition=gpu"], "gpus=8, but partition gpu has at most 4 per node"),
        (["partition=tpu"], "there is no partition 'tpu'; give partition=, one of cpu, gpu"),
    ],
)
def test_what_a_partition_can_never_hold_is_refused(words, said):
    partitions = [Partition("cpu", True, True, 8, 0), Partition("gpu", False, True, 2, 4)]
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_room(read_words(words)[0], partitions)
    check_room(read_words(["nodes=2", "gpus=4", "partition=cpu,gpu"])[0], partitions)


def test_states_and_exit_codes_are_read_from_slurm():
    text = """\
JobId=31 ArrayJobId=30 ArrayTaskId=0 JobName=pst-run
   JobState=FAILED Reason=NonZeroExitCode Dependency=(null)
   Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode=6:0
   NodeList=n1
   StdOut=/runs/my run/slurm/30_0.log

JobId=32 ArrayJobId=30 ArrayTaskId=1 JobName=pst-run
   JobState=TIMEOUT Reason=TimeLimit Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:15
   NodeList=n2
   StdOut=/runs/my run/slurm/30_1.log

JobId=30 ArrayJobId=30 ArrayTaskId=2-5 ArrayTaskThrottle=2 JobName=pst-run
   JobState=PENDING Reason=Resources Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   NodeList=(null)
   StdOut=/runs/my run/slurm/30_4294967294.log
"""
    failed, late, waiting = read_jobs(text)
    assert (failed.line, failed.result) == ("job 30_0: failed on n1, exit code 6", 6)
    assert str(failed.output) == "/runs/my run/slurm/30_0.log"
    assert late.result == 75, "after a time limit the same command goes on"
    assert not waiting.ended and waiting.line == "job 30_[2-5]: pending (Resources)"


def test_the_file_system_of_a_folder_is_that_of_its_deepest_mount():
    mounts = "overlay / overlay rw 0 0\ntmpfs /tmp tmpfs rw 0 0\nserver:/x /tmp/my\\040disk nfs4 rw 0 0\n"
    assert filesystem_of(Path("/tmp/runs/a"), mounts) == "tmpfs"
    assert filesystem_of(Path("/tmp/my disk/a"), mounts) == "nfs4"
    assert filesystem_of(Path("/tmpfs"), mounts) == "overlay"


def test_without_slurm_there_is_one_line_and_exit_code_4(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_verb(["submit", "slurm", "demo", f"output_dir={tmp_path}/run"]) == 4
    assert capsys.readouterr().err.startswith("pst: error[ENVIRONMENT] sbatch is not on this machine's PATH; run this")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "script, code, said",
    [
        ("sys.exit(75)", 75, None),
        ("sys.exit(2)", 2, None),
        ("sys.exit(0)", 0, None),
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL, which is mostly the kernel when memory runs out"),
        ("raise RuntimeError('broken')", 1, "ended with exit code 1; see its lines above"),
    ],
)
def test_torchrun_ends_with_the_exit_code_of_its_ranks_and_names_the_one_that_said_nothing(script, code, said):
    torchrun = [sys.executable, "-m", "pst_dist.torchrun", "--standalone", "--nproc-per-node=1", "--no-python"]
    done = subprocess.run(
        [*torchrun, sys.executable, "-c", f"import os, sys; {script}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("pst: ")]
    assert len(lines) == (said is not None), done.stderr
    assert all(line.startswith("pst: rank 0 (process ") and said in line for line in lines)


# --- jobs that run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster(2) as cluster:
        yield cluster


def write_config(folder: Path, data: Path, name: str, **changes) -> Path:
    """A small run as a file, as a user has it."""
    settings = {"train__max_steps": STEPS, "train__eval_steps": 1000, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(small_config(data, folder / name, **settings)))
    return path


def start_submit(slurm: SlurmCluster, *words: str | Path) -> subprocess.Popen:
    """`pst submit slurm …` as a process, its lines on one pipe."""
    command = [*PST, "submit", "slurm", *map(str, words)]
    return subprocess.Popen(
        command, env=slurm.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def lines_until(process: subprocess.Popen, pattern: str, seen: list[str]) -> str:
    """Read a followed job's lines until one matches; bounded by the test's own time limit."""
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            return found[1] if found.groups() else found[0]
    pytest.fail(f"no line matches {pattern!r} in:\n{''.join(seen)}")


def ended(process: subprocess.Popen, seen: list[str]) -> int:
    """The exit code of a followed job, its last lines added to `seen`; bounded by the test's own time limit."""
    rest, _ = process.communicate()
    seen.append(rest)
    return process.returncode


def wait_for_step(run: Path, step: int) -> None:
    """Until a run has logged that many steps."""
    wait_until(lambda: len(losses(run)) >= step, f"step {step} of {run}", seconds=120)


@pytest.fixture(scope="module")
def undisturbed(slurm, small_data, tmp_path_factory) -> tuple[Path, str]:
    """The run directory of a two-node job that nobody disturbs, and what `pst submit slurm` said of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, small_data, "run", train__deepspeed="zero1")
    seen: list[str] = []
    assert ended(start_submit(slurm, config, "verb=train", "nodes=2", "time=00:10:00"), seen) == 0, "".join(seen)
    return folder / "run", "".join(seen)


@pytest.mark.timeout(300)
class TestOnARealSlurm:
    pytestmark = real

    def test_two_nodes_follow_the_loss_curve_of_one_process(self, undisturbed, small_data, tmp_path):
        run, said = undisturbed
        plain = small_config(small_data, tmp_path / "plain", train__max_steps=STEPS, train__eval_steps=1000)
        train(plain)
        # Rounding differs between one process and two, and forty steps of Adam carry it on.
        assert losses(run)[:8] == pytest.approx(losses(tmp_path / "plain")[:8], abs=1e-5)
        assert losses(run) == pytest.approx(losses(tmp_path / "plain"), abs=1e-3) and len(losses(run)) == STEPS
        assert "on 2 rank(s), engine zero1" in said
        for line in ("#SBATCH --nodes=2", "#SBATCH --time=00:10:00", "script: ", "submitted; log: "):
            assert line in said
        assert re.search(r"job \d+: running on n\[1-2\]\n(.*\n)*job \d+: completed on n\[1-2\], exit code 0\n$", said)

    def test_a_job_told_to_stop_goes_back_into_the_queue_and_on_from_its_checkpoint(
        self, slurm, undisturbed, small_data, tmp_path
    ):
        config = write_config(tmp_path, small_data, "run", train__deepspeed="zero1")
        seen: list[str] = []
        job = start_submit(slurm, config, "verb=train", "nodes=2")
        number = lines_until(job, r"job (\d+): submitted", seen)
        wait_for_step(tmp_path / "run", 5)
        slurm.ask("scancel", "--signal=USR1", "--batch", number)  # what Slurm itself does before the time limit
        step = lines_until(job, r"stopped by a signal: saved after step (\d+) of", seen)
        lines_until(job, r"pending, start 2", seen)
        slurm.start_again_now(number)
        assert ended(job, seen) == 0, "".join(seen) + slurm.last_words()
        said = "".join(seen)
        assert 5 <= int(step) < STEPS
        assert f"job {number}: saved, going back into the queue" in said
        assert f"resumed step {step} from" in said
        assert f"job {number}: completed on n[1-2], exit code 0" in said
        assert losses(tmp_path / "run") == losses(undisturbed[0]), "a stop must not be seen in the losses"

    def test_ctrl_c_stops_following_and_a_failing_jobs_exit_code_comes_through(self, slurm, small_data, tmp_path):
        diverging = {"train__learning_rate": "1e18", "train__max_grad_norm": 0}
        config = write_config(tmp_path, small_data, "run", **diverging)
        seen: list[str] = []
        job = start_submit(slurm, config, "verb=train")
        number = lines_until(job, r"job (\d+): submitted", seen)  # early: such a job runs for a second or two
        job.send_signal(signal.SIGINT)
        assert ended(job, seen) == 130
        assert f"follow it: pst submit slurm --follow {number}, cancel it: scancel {number}" in seen[-1]
        again = start_submit(slurm, "--follow", number)
        assert ended(again, seen) == 6, "diverged"
        assert "error[DIVERGED]" in seen[-1] and f"job {number}: failed on n1, exit code 6" in seen[-1]

    def test_a_cancelled_job_saves_and_does_not_come_back(self, slurm, small_data, tmp_path):
        config = write_config(tmp_path, small_data, "run", train__max_steps=100_000)
        seen: list[str] = []
        job = start_submit(slurm, config, "verb=train")
        number = lines_until(job, r"job (\d+): submitted", seen)
        wait_for_step(tmp_path / "run", 5)
        slurm.ask("scancel", number)
        assert ended(job, seen) == 130, "".join(seen)
        assert "stopped by a signal: saved after step" in "".join(seen)
        shown = slurm.ask("scontrol", "show", "job", number)
        assert "JobState=CANCELLED" in shown and "Restarts=0" in shown

    def test_an_array_trains_each_arm_and_seed_in_its_own_folder(self, slurm, small_data, tmp_path):
        config = write_config(tmp_path, small_data, "run", train__max_steps=4)
        seen: list[str] = []
        assert ended(start_submit(slurm, config, "verb=train", "arms=[pst,answer_only]", "seeds=[1]"), seen) == 0, (
            "".join(seen)
        )
        for index, arm in enumerate(("pst", "answer_only")):
            saved = load_config(str(tmp_path / "run" / "seed-1" / arm))
            assert (saved.arm, saved.seed, saved.data_dir) == (arm, 1, str(small_data))
            assert read_json(Path(saved.output_dir) / "train.json")["steps"] == 4
            assert re.search(rf"^\d+_{index}: arm {arm}: ", seen[-1], re.MULTILINE)
            assert re.search(rf"^job \d+_{index}: completed", seen[-1], re.MULTILINE)
        plain = small_config(small_data, tmp_path / "plain", seed=1, train__max_steps=4, train__eval_steps=1000)
        train(plain)
        assert losses(tmp_path / "run" / "seed-1" / "pst") == losses(tmp_path / "plain")

    @pytest.mark.timeout(900)  # three jobs with a Python each, or five
    def test_one_command_goes_from_rows_to_a_report(self, slurm, tmp_path):
        config = write_config(tmp_path, tmp_path / "data", "run", train__max_steps=4, evaluate__max_rows=4)
        seen: list[str] = []
        assert ended(start_submit(slurm, config, "time=00:10:00"), seen) == 0, "".join(seen)
        said = "".join(seen)
        data, train_job, finish = re.findall(r"job (\d+) \(.*\): submitted", said)
        assert f"job {train_job} (train): submitted after {data}; log: {tmp_path}/run/slurm/{train_job}.log" in said
        assert f"job {finish} (evaluate export report): submitted after {train_job}" in said
        assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "export").is_dir()
        assert read_json(tmp_path / "run" / "eval" / "test" / "results.json")["rows"] == 4
        order = re.findall(r"job (\d+): completed on n\d, exit code 0", said)
        assert order == [data, train_job, finish]
        assert "shards: " in said and "step 4/4" in said, "every log is followed"

    def test_when_the_first_job_fails_nothing_is_left_waiting(self, slurm, tmp_path):
        config = write_config(tmp_path, tmp_path / "data", "run")
        seen: list[str] = []
        words = [f"data.train={tmp_path}/nothing.jsonl"]
        assert ended(start_submit(slurm, config, *words), seen) == 2, "".join(seen)
        data, *others = re.findall(r"job (\d+) \(.*\): submitted", "".join(seen))
        assert f"job {data}: failed on n1, exit code 2" in "".join(seen)
        for job in others:
            assert f"job {job}: cancelled, exit code 130" in "".join(seen)

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


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.encoder
@pytest.mark.timeout(900)
@pytest.mark.skipif("PST_TEST_RAY_ON_SLURM" not in os.environ, reason="takes minutes: set PST_TEST_RAY_ON_SLURM=1")
def test_ray_on_slurm_embeds_and_trains_on_two_hosts_and_gives_the_drivers_exit_code(small_data, tmp_path):
    with slurm_folder() as folder:
        if not hosts_can_be_made():
            pytest.skip("needs network namespaces (root and iproute2): Ray's nodes want addresses of their own")
        data = tmp_path / "data"
        shutil.copytree(small_data / "shards", data / "shards")
        config = write_config(tmp_path, data, "run", train__deepspeed="zero1", train__max_steps=8)
        script = f"{ROOT}/cluster/ray.sbatch"
        follow = "pst_dist.cli submit slurm --follow"

        def job(options: str, verb: str, *words: str) -> list[str]:
            sbatch = f"sbatch --parsable --output={tmp_path}/log {options} {script} {verb} {config} {' '.join(words)}"
            return ["bash", "-c", f"export PST_PYTHON={sys.executable}; {sys.executable} -m {follow} $({sbatch})"]

        # One node is enough to see that a driver's refusal is not lost on the way.
        jobs = [
            job("--nodes=2", "embed", "embed.ray.num_actors=2"),
            job("--nodes=2", "train", "train.ray.num_workers=2", "train.ray.placement_strategy=STRICT_SPREAD"),
            job("--nodes=1", "embed", "data_dir=/nowhere"),
        ]
        done = run_on_hosts(folder, *jobs, timeout=800)
        log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else done.stderr
    assert re.findall(r"^exit code (\d+)", done.stdout, re.MULTILINE) == ["0", "0", "2"], log
    assert "Ray actors" in log and "error[INPUT] /nowhere/shards" in log
    assert "on 2 rank(s), engine zero1" in log and read_json(tmp_path / "run" / "train.json")["steps"] == 8
    train(small_config(data, tmp_path / "plain", train__max_steps=8, train__eval_steps=1000))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    made = sorted(path.name for path in (data / "embeddings").iterdir() if not path.name.startswith("."))
    for name in made:
        assert (data / "embeddings" / name).read_bytes() == (small_data / "embeddings" / name).read_bytes(), name
    assert len(made) == 6, "four shards, their statistics and the manifest"
