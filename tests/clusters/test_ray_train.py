"""A whole run as one job of a real Ray cluster: killed, stopped, taken up again, and the same losses in the end.

One head with dashboard and token serves the file. The job is submitted by `pst submit ray`; one of its ranks is killed
and the job stopped half-way; Ray's own `ray job submit` goes on from there. What came of it is compared with two ranks
that torchrun started and nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray_head import RayHead, ray_head
from run_files import curve
from small_run import small_config

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config
from pst_dist.config.schema import Config
from pst_dist.storage.manifest import read_json
from pst_dist.training.trainer import train

pytest.importorskip("ray", reason="needs ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.encoder,
    pytest.mark.timeout(1500),  # of which the first test, that waits for everything, needs a minute on a free machine
]
STEPS = 40
SETTINGS = {
    "embed__ray__num_actors": 1,
    "train__deepspeed": "zero2",
    "train__ray__num_workers": 2,
    "train__max_steps": STEPS,
    "train__save_steps": 2,
    "train__eval_steps": 20,
    "train__learning_rate": "3e-3",
}
PST = (sys.executable, "-m", "pst_dist.cli")
WHEEL = "pst_spy-1.0-py3-none-any.whl"
SPY = """\
import json, os, time
from ray.train.v2._internal.execution.callback import ReportCallback, WorkerCallback

class Spy(ReportCallback, WorkerCallback):
    def after_report(self, training_report, metrics):
        with open(os.environ["PST_SPY"], "a") as stream:
            stream.write(json.dumps([metrics[0], len(metrics), training_report.checkpoint is not None]) + "\\n")

    def after_init_train_context(self):
        from pst_dist.training.reporting.metrics import MetricsLog
        step = MetricsLog.step
        MetricsLog.step = lambda *args, **kwargs: (time.sleep(0.4), step(*args, **kwargs))
"""
"""A callback of Ray Train that a user brings along as a pip package: it notes what Ray hears, in the controller, and
slows the ranks down, so that there is time to kill one and to stop the job."""


@dataclass
class Told:
    """What came of the job, as seen from outside."""

    submitted: str
    """Output of the submission and the first follower, which was interrupted."""
    interrupted: int
    followed: str
    """Output of the second follower."""
    ended: int
    snapshot: dict
    """Ray's own list of checkpoints, while it trained again."""
    steps_when_stopped: int
    plain: subprocess.CompletedProcess
    """Ray's own command, which went on."""
    run: Path
    data: Path
    heard: list[tuple[dict, int, bool]]
    """Of each report: metrics, number of ranks, whether it came with a checkpoint."""
    waiting: str
    """Output of the submission of a job for which there is no room."""


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("ray"), cpus=3) as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A directory as a user has one: a config, and things that must not be sent."""
    folder = tmp_path_factory.mktemp("project")
    run = folder / "out" / "run"
    (folder / "my.yaml").write_text(dump_config(small_config(folder / "out" / "data", run, **SETTINGS)))
    (folder / ".rayignore").write_text(".git\nout\n")
    for name in (".git/objects", "runs/old.bin", "out/keep"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for the cluster")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        info = "pst_spy-1.0.dist-info"
        wheel.writestr("pst_spy.py", SPY)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pst-spy\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in ("pst_spy.py", f"{info}/RECORD")))
    return folder


def wait_for(what: Callable[[], object], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ray_checkpoints(run: Path) -> dict:
    """Ray's own list of checkpoints; empty before the first one and while Ray is writing the list."""
    try:
        snapshot = json.loads((run / "checkpoint_manager_snapshot.json").read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return snapshot if snapshot["checkpoint_results"] else {}


@contextlib.contextmanager
def started(command: list[str], log: Path, head: RayHead, folder: Path) -> Iterator[subprocess.Popen]:
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env=head.environment,
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            # A test run in the background of a script ignores SIGINT, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def told(head, project, tmp_path_factory) -> Told:
    logs = tmp_path_factory.mktemp("logs")
    run, data = project / "out" / "run", project / "out" / "data"
    where = f"address={head.dashboard}"
    # The token is found though nobody says that there is one to be sent.
    submit = [*PST, "submit", "ray", "my.yaml", where, "name=whole"]
    submit += [f"pip=['${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{WHEEL}']", "env.PIP_NO_INDEX=1"]
    submit += ["env.RAY_TRAIN_CALLBACKS=pst_spy.Spy", f"env.PST_SPY={logs}/heard"]
    roomless = [*PST, "submit", "ray", "my.yaml", where, "name=roomless", "cpus=64", f"output_dir={run}-roomless"]
    with started(submit, logs / "1", head, project) as first:
        wait_for(lambda: "Running entrypoint" in (logs / "1").read_text() or first.poll() is not None)
        first.send_signal(signal.SIGINT)
        interrupted = first.wait(120)
    again = [*PST, "submit", "ray", "--follow", "whole", where]
    with started(roomless, logs / "3", head, project), started(again, logs / "2", head, project) as second:
        gone = lambda: second.poll() is not None  # noqa: E731
        wait_for(lambda: (run / "checkpoints" / "checkpoint-4").is_dir() or gone())
        victims = head.processes("ray::RayTrainWorker")
        assert len(victims) == 2, (logs / "2").read_text()[-3000:]
        os.kill(victims[0], signal.SIGKILL)
        wait_for(lambda: "resumed step" in (logs / "2").read_text() or gone())
        wait_for(lambda: re.search(r"(?s)resumed step.*\nstep \d+/", (logs / "2").read_text()) or gone())
        # Ray's controller hears of a checkpoint up to seconds after it was saved, and rewrites its list in place.
        wait_for(lambda: ray_checkpoints(run) or gone())
        snapshot = ray_checkpoints(run)
        head.post("/api/jobs/whole/stop")
        ended = second.wait(240)
        wait_for(lambda: "waiting" in (logs / "3").read_text(), 60)
        head.post("/api/jobs/roomless/stop")
    stopped_at = max(int(path.name[11:]) for path in (run / "checkpoints").glob("checkpoint-*"))
    plain = subprocess.run(
        shlex.split(f"ray job submit --address {head.dashboard} --working-dir . -- pst run my.yaml on=ray"),
        env=head.environment,
        cwd=project,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Told(
        (logs / "1").read_text(),
        interrupted,
        (logs / "2").read_text(),
        ended,
        snapshot,
        stopped_at,
        plain,
        run,
        data,
        [json.loads(line) for line in (logs / "heard").read_text().splitlines()],
        (logs / "3").read_text(),
    )


@pytest.fixture(scope="module")
def undisturbed(small_data, tmp_path_factory) -> Path:
    """The same run on two ranks of torchrun, and beside it a short one without ZeRO."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    configs = [small_config(small_data, output, **SETTINGS), plain_config(small_data, output.with_name("zero0"))]
    path = output.parent / "configs.json"
    path.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"
    done = subprocess.run(
        [sys.executable, *torchrun.split(), str(Path(__file__).parents[1] / "helpers" / "ranks.py"), str(path)],
        env=environment | {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def plain_config(data: Path, output: Path) -> Config:
    return small_config(data, output, train__deepspeed="zero0", train__save_steps=4)


def test_a_submission_shows_what_it_sends_and_ctrl_c_only_ends_the_following(told):
    assert "command   python -m pst_dist.cli run my.yaml on=ray" in told.submitted
    assert "sent      3 files" in told.submitted  # the config, .rayignore and the wheel
    assert told.interrupted == 130 and "no longer following job whole: the job keeps running" in told.submitted


def test_the_job_embeds_on_actors_and_trains_on_workers_and_its_lines_arrive_as_they_are(told):
    lines = told.followed.splitlines()
    assert any(re.fullmatch(r"embed: 4 shards on 1 Ray actors?", line) for line in lines)
    assert any(line.startswith("arm pst: ") and "on 2 rank(s), engine zero2, cpu" in line for line in lines)
    assert any(re.match(rf"step \d+/{STEPS}  loss \d", line) for line in lines)


def test_a_killed_rank_is_started_again_from_the_newest_checkpoint(told):
    assert len(re.findall(r"lost ranks? [01]", told.followed)) == 1
    (resumed,) = re.findall(r"resumed step (\d+) from", told.followed)
    following = re.search(rf"(?s)resumed step {resumed} .*?\nstep (\d+)/", told.followed)
    assert int(resumed) >= 4 and int(following[1]) == int(resumed) + 1


def test_ray_is_told_of_checkpoints_where_they_lie_and_keeps_no_copy(told):
    results = told.snapshot["checkpoint_results"]
    for result in results:
        step = result["metrics"]["step"]
        assert result["checkpoint_dir_name"] == f"checkpoints/checkpoint-{step}"
        assert result["metrics"]["total"] == STEPS and result["metrics"]["loss"] > 0
    assert len(results) >= 1
    # Nothing of Ray's is left in the run directory but its list, and nothing of the checkpoints elsewhere.
    left = {path.name for path in told.run.iterdir() if path.name.startswith(("checkpoint_", ".validate"))}
    assert left == {"checkpoint_manager_snapshot.json"}


def test_rays_own_result_is_the_run_directory_and_names_checkpoints_that_exist(told):
    from ray.train import Result

    result = Result.from_path(told.run)
    assert Path(result.path) == told.run and result.metrics["step"] == STEPS
    assert Path(result.checkpoint.path) == told.run / "checkpoints" / f"checkpoint-{STEPS}"
    listed = {Path(checkpoint.path) for checkpoint, _ in result.best_checkpoints}
    assert listed and all(path.is_dir() for path in listed)


def test_ray_hears_the_metrics_of_every_logged_step_through_a_users_pip_package(told):
    logged = {}
    for metrics, ranks, with_checkpoint in told.heard:
        assert ranks == 2
        for row in [] if with_checkpoint else [*metrics.get("earlier", []), metrics]:
            if "loss" in row:
                logged[row["step"]] = row
    (resumed,) = map(int, re.findall(r"resumed step (\d+) from", told.followed))
    # A killed rank takes what Ray had not heard yet along.
    assert sorted(logged)[0] == 1 and set(range(resumed + 1, told.steps_when_stopped + 1)) <= logged.keys()
    losses = {row["step"]: row["loss"] for row in curve(told.run)}
    assert all(row["loss"] == pytest.approx(losses[step]) for step, row in logged.items())
    assert all(row["learning_rate"] > 0 and row["answer_nll"] > 0 for row in logged.values())
    assert sum(with_checkpoint for _, _, with_checkpoint in told.heard) >= 2


def test_a_job_without_room_says_for_what_it_waits(told):
    assert "job roomless: waiting (its driver needs 64 CPU, the cluster has 3)" in told.waiting


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:{}"])
def test_a_job_is_found_through_every_kind_of_address(told, head, project, address):
    command = [*PST, "submit", "ray", "--status", "whole", f"address={address.format(head.client_port)}"]
    for _ in range(3):
        found = subprocess.run(command, env=head.environment, cwd=project, capture_output=True, text=True, timeout=240)
        if "Initialization failure from server" not in found.stderr:  # a client's own server, late on a busy machine
            break
    assert (found.returncode, found.stdout) == (130, "job whole: stopped, exit code 130\n"), found.stderr


def test_a_stopped_job_saves_first(told):
    assert "error[PREEMPTED] stopped by a signal: saved after step" in told.followed
    (saved,) = re.findall(r"saved after step (\d+) of", told.followed)
    assert int(saved) == told.steps_when_stopped < STEPS
    assert told.ended == 130 and told.followed.splitlines()[-1] == "job whole: stopped, exit code 130"


def test_rays_own_command_goes_on_to_the_losses_of_an_undisturbed_run(told, undisturbed):
    output = told.plain.stdout + told.plain.stderr
    assert told.plain.returncode == 0, output[-3000:]
    assert f"resumed step {told.steps_when_stopped} from" in output
    ours, theirs = curve(told.run), curve(undisturbed)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1)) == [row["step"] for row in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6), f"step {one['step']}"
        assert one["tokens"] == two["tokens"]
    same = ("fingerprint", "shards", "embeddings", "steps", "best_step")
    one, two = read_json(told.run / "train.json"), read_json(undisturbed / "train.json")
    assert {key: one[key] for key in same} == {key: two[key] for key in same}
    assert one["best_value"] == pytest.approx(two["best_value"], abs=1e-6)


def test_one_rank_goes_on_where_two_were(undisturbed, small_data):
    """What train.ray.min_workers rests on: ranks that are fewer after a loss."""
    two, one = undisturbed.with_name("zero0"), undisturbed.with_name("fewer")
    shutil.copytree(two, one)
    shutil.rmtree(one / "checkpoints" / "checkpoint-8")
    (one / "train.json").unlink()
    train(plain_config(small_data, one))
    assert [row["step"] for row in curve(one)] == list(range(1, 9))
    for single, pair in zip(curve(one), curve(two), strict=True):
        assert single["loss"] == pytest.approx(pair["loss"], abs=1e-5)


def test_the_whole_pipeline_was_one_job(told):
    assert read_json(told.run / "eval" / "test" / "results.json")["rows"] == 12
    assert (told.run / "report.html").is_file() and (told.run / "export" / "model.safetensors").is_file()


def test_a_diverged_training_is_not_tried_again_and_its_exit_code_comes_through(told, head, project):
    words = [f"output_dir={project}/out/diverged", "train.learning_rate=1e18", "train.max_grad_norm=0"]
    words.append("train.ray.num_workers=1")
    done = subprocess.run(
        [*PST, "submit", "ray", "my.yaml", f"address={head.dashboard}", "verb=train", *words],
        env={key: value for key, value in head.environment.items() if key != "RAY_AUTH_MODE"},
        cwd=project,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 6, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(re.findall(r"(?m)^arm pst: ", done.stdout)) == 1
    (refusal,) = re.findall(r"(?m)^pst: .*$", done.stdout)
    assert re.match(r"pst: error\[DIVERGED\] step \d+: .* loss is not finite; no weight was changed", refusal)
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "what", "code", "words"),
    [
        ({"RAY_AUTH_TOKEN_PATH": ""}, "dashboard", 4, "requires a token, and none was found here"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "dashboard", 4, "refuses this token"),
        ({}, "gcs", 4, "is not a Ray dashboard"),
    ],
)
def test_what_a_cluster_answers_to_a_stranger_is_one_line(
    head, project, monkeypatch, capsys, changes, what, code, words
):
    # Set first, so that what the client changes is put back.
    for name in ("HOME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, (head.environment | changes).get(name, ""))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.chdir(project)
    address = head.dashboard if what == "dashboard" else f"127.0.0.1:{head.gcs_port}"
    assert run_verb(["submit", "ray", "my.yaml", f"address={address}"]) == code
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


def test_an_unknown_job_is_one_line(head, project):
    refused = subprocess.run(
        [*PST, "submit", "ray", "--follow", "nobody", f"address={head.dashboard}"],
        env=head.environment,
        cwd=project,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1 and "has no job 'nobody'" in refused.stderr
