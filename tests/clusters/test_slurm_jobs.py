"""Jobs that run on a real Slurm of two nodes: stopped, resumed, cancelled, as an array, from rows to a report."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from hosts import hosts_can_be_made
from run_files import losses
from slurm_cluster import run_on_hosts, slurm_folder
from slurm_jobs import STEPS, ended, lines_until, start_submit, wait_for_step, write_config
from small_run import small_config

from pst_dist.config.loading import load_config
from pst_dist.storage.manifest import read_json
from pst_dist.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
real = [pytest.mark.slurm, pytest.mark.encoder, pytest.mark.distributed]


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
