"""Decisions of training on Ray and of submitting to it that need no cluster: words, sizes, retries, exit codes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pst_dist.cli import main, verbs
from pst_dist.cli.words import spell_on
from pst_dist.clusters.ray import dashboard, submit, token
from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.reports import SNAPSHOT, keep_existing
from pst_dist.clusters.ray.room import lacking
from pst_dist.clusters.ray.train import _on_all_nodes, check_room, train_with_ray
from pst_dist.clusters.ray.words import read_words
from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.schema import Config, RayConfig, RayTrainConfig
from pst_dist.errors import ConfigError, DivergedError, EnvironmentFault, InputError, LockedError, PeerLostError
from pst_dist.storage.locks import directory_lock


@pytest.mark.parametrize(
    ("verb", "word", "expected"),
    [
        ("train", "on=ray", ["train.backend=ray"]),
        ("embed", "on=ray", ["embed.backend=ray"]),
        ("run", "on=ray", ["embed.backend=ray", "train.backend=ray", "evaluate.backend=ray"]),
        ("run", "on=local", ["embed.backend=local", "train.backend=local", "evaluate.backend=local"]),
        ("evaluate", "on=ray", ["evaluate.backend=ray"]),
        ("report", "on=ray", ["on=ray"]),  # no key: refused as any unknown one
    ],
)
def test_on_ray_is_a_short_word_for_the_stages_of_a_verb(verb, word, expected):
    assert spell_on(["seed=1", word], getattr(verbs, verb).on) == ["seed=1", *expected]


@pytest.fixture(autouse=True)
def own_token() -> Iterator[None]:
    """Undo what a test sets for Ray's token: Ray reads it once, and the clusters of later tests would want another."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def test_another_place_is_refused():
    with pytest.raises(ConfigError, match="on=mars: unknown value; use on=ray or on=local"):
        spell_on(["on=mars"], verbs.run.on)


def test_several_workers_need_deepspeed_before_anything_starts():
    words = ["train.backend=ray", "train.ray.num_workers=2"]
    with pytest.raises(ConfigError, match=r"num_workers=2 needs train\.deepspeed"):
        load_config(None, words)
    assert load_config(None, [*words, "train.deepspeed=zero2"]).train.ray.num_workers == 2
    with pytest.raises(ConfigError, match="min_workers=3 is more than num_workers=1"):
        load_config(None, ["train.ray.min_workers=3"])


def test_a_rank_of_another_launcher_starts_no_ranks_of_its_own(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="starts its own ranks"):
        train_with_ray(Config())


@pytest.mark.parametrize(
    ("asked", "resources", "words"),
    [
        ({"num_workers": 2}, {"CPU": 2.0}, None),
        ({"num_workers": 3}, {"CPU": 2.0}, r"3 rank\(s\) of 1 CPU each, but the cluster has 2 CPU, 0 GPU"),
        ({"num_workers": 2, "num_gpus_per_worker": 1}, {"CPU": 64.0, "GPU": 1.0}, r"2 rank\(s\) of 1 CPU, 1 GPU each"),
        ({"num_workers": 8, "min_workers": 2}, {"CPU": 2.0}, None),
        ({"num_workers": 8, "wait_seconds": 600}, {"CPU": 2.0}, None),
    ],
)
def test_a_cluster_without_room_is_one_line_unless_it_may_grow(asked, resources, words):
    if words is None:
        check_room(RayTrainConfig(**asked), resources)
        return
    with pytest.raises(EnvironmentFault, match=words):
        check_room(RayTrainConfig(**asked), resources)


def test_a_relative_output_inside_rays_copy_of_the_directory_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="output_dir=runs/run is relative"):
        _on_all_nodes(Config())
    assert main.run_verb(["shard", "demo"]) == 2 and not list(copy.iterdir())
    assert _on_all_nodes(Config(output_dir="/shared/run")).data_dir == "/shared/run/data"
    remote = _on_all_nodes(Config(output_dir="/shared/run", data_dir="s3://bucket/data", data_cache="/local"))
    assert (remote.data_dir, remote.data_cache) == ("s3://bucket/data", "/local")
    monkeypatch.chdir(tmp_path)
    assert _on_all_nodes(Config()).output_dir == str(tmp_path / "runs" / "run")


@pytest.mark.ray
def test_only_what_a_new_start_can_mend_is_tried_again():
    pytest.importorskip("ray", reason="needs ray")
    from ray.exceptions import RayActorError

    from pst_dist.clusters.ray.worker import Watch, describe, may_pass

    assert may_pass(RayActorError()) and may_pass(PeerLostError("rank 1 is gone"))
    assert may_pass(RuntimeError("Connection closed by peer")) and may_pass(ConnectionResetError())
    for final in (DivergedError("no"), ConfigError("no"), LockedError("no"), TypeError("a bug")):
        assert not may_pass(final)

    class Desk:
        def __init__(self):
            self.lines, self.say = [], self
            self.remote = self.lines.append
            self.lost = SimpleNamespace(remote=lambda: None)

    desk = Desk()
    watch = Watch(desk, max_failures=1)
    # Rank 1 diverged; what rank 0 saw of it must not hide that.
    with pytest.raises(DivergedError):
        watch.after_exception(None, {0: RuntimeError("Connection closed"), 1: DivergedError("step 3")})
    watch.after_exception(None, {0: RuntimeError("Connection closed"), 1: RayActorError()})
    watch.after_exception(None, {1: RayActorError()})  # beyond the limit the driver says it
    assert [line.text.partition(" (")[0] for line in desk.lines] == ["lost rank 1"]
    assert "restart 1 of 1; resuming" in desk.lines[0].text
    assert describe({0: RuntimeError("boom\nmore"), 2: RuntimeError("boom")}).startswith("failed: ranks 0, 2 (")


@pytest.mark.ray
def test_errors_of_ray_become_the_ones_that_the_command_line_knows():
    pytest.importorskip("ray", reason="needs ray")
    import ray
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    from pst_dist.clusters.ray.train import _in_our_words

    refused = pickle.loads(pickle.dumps(ControllerError(ConfigError("no such profile", "take another", path="a.yaml"))))
    found = _in_our_words(ray, refused)
    assert isinstance(found, ConfigError) and str(found) == "error[CONFIG] a.yaml: no such profile; take another"
    lost = _in_our_words(ray, WorkerGroupError("…", {1: RayActorError()}))
    assert isinstance(lost, PeerLostError) and "lost rank 1" in str(lost) and "max_failures" in str(lost)
    assert isinstance(_in_our_words(ray, RayActorError()), PeerLostError)
    no_room = _in_our_words(ray, ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert isinstance(no_room, EnvironmentFault) and "wait_seconds" in str(no_room)
    bug = TypeError("ours")
    assert _in_our_words(ray, WorkerGroupError("…", {0: bug})) is bug


def _hold(directory: str, ready, let_go) -> None:
    with directory_lock(Path(directory)):
        ready.set()
        let_go.wait(60)


def test_a_rank_started_again_waits_for_the_lost_one_to_leave_the_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, let_go = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, let_go))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(LockedError, match=f"in use by process {holder.pid}"), directory_lock(tmp_path):
        pass
    with (
        pytest.raises(LockedError, match=f"in use by process {holder.pid}"),
        directory_lock(tmp_path, wait_seconds=0.3),
    ):
        pass
    os.kill(holder.pid, 9)  # the kernel gives the lock back as soon as the process has gone, whenever that is
    with directory_lock(tmp_path, wait_seconds=60):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    holder.join(60)


def test_the_words_of_a_job_are_told_from_those_of_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["address=head:8265/", "verb=train", "exclude=[big,*.bin]", "env.A=1=2", "gpus=1", "train.bf16=true"]
    request, rest = read_words(words)
    assert rest == ["train.bf16=true"]
    assert (request.address, request.verb, request.folder) == ("http://head:8265", "train", tmp_path)
    assert request.exclude == ("big", "*.bin") and request.environment == {"A": "1=2"} and request.gpus == 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("verb=report", "is not a stage that runs on Ray"),
        ("dir=nowhere", "is not a directory"),
        ("name=a b", "is not a valid job name"),
        ("cpus=many", "is not a number"),
        ("on=ray", "already runs on Ray"),
    ],
)
def test_a_word_that_ray_would_not_take_is_refused(word, says):
    with pytest.raises(ConfigError, match=says):
        read_words([word])


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A directory with a config in it, which is the working directory."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my.yaml").write_text(dump_config(Config(output_dir=str(folder / "out"))))
    monkeypatch.chdir(folder)
    return folder


def job_of(*words: str) -> submit.RayJob:
    request, rest = read_words(words)
    return submit.make_job(request, "my.yaml", rest)


def test_a_job_is_the_command_that_a_person_would_type(project):
    job = job_of("train.learning_rate=1e-3", "data.train=a b.jsonl")
    assert job.command == "python -m pst_dist.cli run my.yaml train.learning_rate=1e-3 'data.train=a b.jsonl' on=ray"
    assert job.runtime_env["working_dir"] == str(project) and "/out" in job.runtime_env["excludes"]


def test_a_folder_of_this_home_directory_is_the_same_one_in_the_job(project, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    job = job_of("output_dir=~/x y")
    assert job.config.output_dir == "/home/ann/x y"
    assert job.command.endswith(" run my.yaml 'output_dir=~/x y' 'output_dir=/home/ann/x y' on=ray"), (
        "the last one wins"
    )


@pytest.mark.ray
def test_a_runtime_environment_is_rays_own_format_with_ours_added(project):
    pytest.importorskip("ray", reason="needs ray")
    (project / "needs.txt").write_text("scipy\n")
    (project / "env.yaml").write_text("excludes: [big]\nenv_vars: {A: '1', B: '2'}\npip: {packages: [scipy]}\n")
    one = job_of("runtime_env=env.yaml", "env.B=3")
    assert one.runtime_env["pip"] == {"packages": ["scipy"]} and one.runtime_env["working_dir"] == str(project)
    assert one.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120", "A": "1", "B": "3"}
    assert "big" in one.runtime_env["excludes"] and ".git" in one.runtime_env["excludes"]
    assert job_of("pip=[scipy>=1,'a<3,>2']").runtime_env["pip"] == ["scipy>=1", "a<3,>2"]
    assert job_of("pip=needs.txt").runtime_env["pip"] == "needs.txt"
    assert job_of("conda=mine").runtime_env["conda"] == "mine"
    for word in ("runtime_env=env.yaml", "pip=needs.txt", "conda=mine"):
        assert "my.yaml" in submit.check_size(job_of(word))
    image = job_of("image_uri=docker.io/me/pst:1", "env.A=1")
    assert set(image.runtime_env) == {"image_uri", "env_vars"}, "Ray takes nothing else beside an image"
    assert f" run {project}/my.yaml on=ray" in image.command and submit.check_size(image) == {}
    assert "image_uri docker.io/me/pst:1" in "\n".join(image.lines({}))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pip=[a]", "conda=b"], "pip and conda would each make the job's Python environment"),
        (["pip=[a]", 'runtime_env={"pip": ["b"]}'], "pip= is given twice"),
        (['runtime_env={"pips": ["b"]}'], "Ray knows no pips; choose from conda, "),
        (['runtime_env={"env_vars": {"A": 1}}'], "runtime_env: Ray refuses it"),
        (["pip=nowhere.txt"], "runtime_env: Ray refuses it"),
        (["runtime_env={"], "runtime_env is not valid JSON"),
        (["runtime_env=my.yaml"], "Ray knows no arm"),
        (['runtime_env={"working_dir": "s3://b/a.zip"}'], "archives and URLs are not supported"),
        (["dir=.", 'runtime_env={"working_dir": "."}'], "name a directory each"),
        (["pip=[--extra-index-url https://me:secret@host/simple]"], "runtime_env contains a password"),
    ],
)
def test_a_runtime_environment_that_ray_would_not_take_is_refused(project, words, says):
    pytest.importorskip("ray", reason="needs ray")
    with pytest.raises(ConfigError, match=re.escape(says)):
        submit.check_size(job_of(*words))


def test_rays_list_keeps_the_checkpoints_that_exist_each_once(tmp_path):
    path, names = tmp_path / SNAPSHOT, [f"checkpoints/checkpoint-{step}" for step in (2, 4, 6, 4, 8)]
    listed = [{"checkpoint_dir_name": name, "metrics": {"report": index}} for index, name in enumerate(names)]
    whole = {"checkpoint_results": listed, "checkpoint_report_indices": list(range(5)), "ray_version": "2.60.0"}
    path.write_text(json.dumps(whole | {"latest_checkpoint_result": listed[-1]}))
    for step in (4, 6):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    keep_existing(tmp_path)
    left = json.loads(path.read_text())
    assert left["checkpoint_results"] == [listed[2], listed[3]] and left["checkpoint_report_indices"] == [2, 3]
    assert left["latest_checkpoint_result"] == listed[3] and left["ray_version"] == "2.60.0"
    for broken in ("{", "[]", "{}", json.dumps(whole | {"checkpoint_results": []})):
        path.write_text(broken)
        keep_existing(tmp_path)
        assert not path.exists(), broken
    keep_existing(tmp_path)


def test_what_is_lacking_is_named_with_what_the_cluster_has():
    assert lacking("2 ranks", {"CPU": 64, "GPU": 0}, {"CPU": 2}, {"CPU": 2}) == "2 ranks need 64 CPU, the cluster has 2"
    assert lacking("its driver", {"GPU": 1}, {"CPU": 2}, {"CPU": 2}) == "its driver needs 1 GPU, the cluster has 0"
    assert lacking("1 rank", {"CPU": 2}, {"CPU": 3}, {"CPU": 1}) == "1 rank needs 2 CPU, the cluster has 3 (1 free)"
    assert lacking("1 rank", {"CPU": 2}, {"CPU": 3}, {"CPU": 2}) is None


def test_what_could_not_work_in_a_copy_of_the_directory_is_refused(project, tmp_path):
    with pytest.raises(ConfigError, match="output_dir=here is relative"):
        job_of("output_dir=here")
    with pytest.raises(ConfigError, match="data_dir=here is relative"):
        job_of("data_dir=here")
    assert job_of("data_dir=s3://bucket/data").config.data_dir == "s3://bucket/data"
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="the directory that the job gets a copy of; give dir="):
        job_of(f"dir={tmp_path}/elsewhere")


@pytest.mark.ray
def test_what_is_sent_leaves_out_histories_and_results_and_obeys_gitignore(project):
    pytest.importorskip("ray", reason="needs ray")
    (project / ".gitignore").write_text("*.log\n")
    for name in (".git/HEAD", "runs/a/x", "sub/shards/0.tar", "sub/checkpoints/1", ".venv/lib/y", "out/z", "a.log"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("no")
    (project / "sub" / "rows.jsonl").write_text("yes")
    (project / "skip.bin").write_text("no")
    assert set(submit.check_size(job_of("exclude=*.bin"))) == {"my.yaml", ".gitignore", "sub/rows.jsonl"}
    (project / ".rayignore").write_text("*.yaml\n")
    with pytest.raises(ConfigError, match=r"my\.yaml: this config would not be sent"):
        submit.check_size(job_of())


@pytest.mark.ray
def test_too_large_a_directory_is_refused_with_its_largest_entries(project):
    pytest.importorskip("ray", reason="needs ray")
    for name, mib in (("weights/a.bin", 300), ("weights/b.bin", 200), ("rows.jsonl", 50)):
        (project / name).parent.mkdir(exist_ok=True)
        with (project / name).open("wb") as stream:
            stream.truncate(mib * 2**20)  # holes: nothing is written
    with pytest.raises(
        ConfigError, match=r"550\.0 MiB would be sent, but Ray accepts 512\.0 MiB; the largest: weights/a\.bin"
    ):
        submit.check_size(job_of())
    assert "weights/a.bin" not in submit.check_size(job_of("exclude=weights"))


def test_an_address_without_a_dashboard_is_one_line_within_seconds(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        EnvironmentFault, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9 \(Connection refused"
    ):
        dashboard.connect("http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="is not a Ray dashboard"):
        dashboard.check_dashboard("http://[broken", None)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="RAY_AUTH_TOKEN_PATH names it"):
        token.find_token()


def test_a_dashboard_is_no_cluster_to_join(monkeypatch):
    address = "http://head:8265"
    with pytest.raises(EnvironmentFault, match=r"head:8265 is a Ray dashboard, which only takes jobs; run `pst submit"):
        with ray_cluster(RayConfig(address=address)):
            pass


def test_the_address_that_is_asked_for_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the cluster's inner side: no dashboard
    assert dashboard.dashboard_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1/")
    assert dashboard.dashboard_address(None) == "http://a:1"
    assert dashboard.dashboard_address("https://b") == "https://b"
    for address in ("auto", "ray://head:10001"):
        assert dashboard.dashboard_address(address) == address
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert dashboard.dashboard_address(None) == "ray://head:10001"


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, 4),  # the command never started
        ("FAILED", 0, 1),
        ("STOPPED", None, 130),
    ],
)
def test_a_job_ends_with_its_commands_own_exit_code(status, driver, expected):
    assert dashboard.exit_code_of(status, driver) == expected


def test_a_log_that_is_heard_from_the_beginning_again_is_said_once():
    import asyncio

    said: list[str] = []
    log = dashboard._Log(said.append)

    class Client:
        def __init__(self, *chunks):
            self.chunks = chunks

        async def tail_job_logs(self, job):
            for chunk in self.chunks:
                yield chunk

    asyncio.run(log.read(Client("one\ntw", "o\nthr"), "j"))
    asyncio.run(log.read(Client("one\ntwo\nthree\nfo", "ur"), "j"))
    log.end()
    assert said == ["one", "two", "three", "four"]
