"""`pst doctor` with the trouble really made: full and read-only mounts, held locks, busy ports, old packages."""

import contextlib
import fcntl
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from small_run import small_config

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config, load_config
from pst_dist.diagnostics.cost import Machines
from pst_dist.diagnostics.machine import clusters, models, network, places, software
from pst_dist.diagnostics.machine.facts import Gpu, collect, gpus_here, read_report
from pst_dist.diagnostics.machine.findings import Check, look_at, ok
from pst_dist.errors import InputError
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.locks import directory_lock, lock_holder
from pst_dist.storage.manifest import write_json

ROOT = Path(__file__).resolve().parents[2]


def lines(findings, level="problem"):
    """What findings of one level say."""
    return [found.line() for found in findings if found.level == level]


def doctor(*words, path=(), **environment):
    """`pst doctor` in a process of its own."""
    paths = os.pathsep.join([*map(str, path), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "pst_dist.cli", "doctor", *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.mark.encoder
def test_a_machine_and_a_config_that_fit_have_no_problem_and_leave_nothing(small_data, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(small_data, tmp_path / "run")))
    before = sorted(small_data.rglob("*"))
    assert run_verb(["doctor", str(path), "--report", str(tmp_path / "here.json")]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    for word in ("packages", "torch", "cores", "memory", "output_dir", "data_dir", "encoder", "student", "estimated"):
        assert word in said
    assert "no problems" in said.splitlines()[-1]
    assert sorted(small_data.rglob("*")) == before and sorted(os.listdir(tmp_path)) == ["here.json", "run.yaml"]
    assert read_report(tmp_path / "here.json")["packages"]["torch"] == software.version_of("torch")


def test_what_is_too_old_is_a_problem_and_the_exit_code_is_4(tmp_path):
    """A real distribution record, found before the true one as that of a wrong environment would be."""
    old = {"torch": "2.1.0", "triton": "2.0.0", "ray": "2.59.1", "transformers": "4.57.6", "deepspeed": "0.18.9"}
    for name, version in old.items():
        record = tmp_path / f"{name}-{version}.dist-info"
        record.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        text += "Requires-Dist: triton==3.1.0 ; platform_system == 'Linux'\n" if name == "torch" else ""
        (record / "METADATA").write_text(text)
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ours = tmp_path / "pst_dist-0.1.0.dist-info"
    ours.mkdir()
    head = ["Metadata-Version: 2.1", "Name: pst-dist", "Version: 0.1.0"]
    for extra in ("train", "embed", "ray"):
        head += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {text}; extra == '{extra}'" for text in project[extra])]
    (ours / "METADATA").write_text("\n".join([*head, ""]))
    done = doctor("-q", path=[tmp_path])
    assert done.returncode == 4, done.stdout + done.stderr
    assert (
        "PROBLEM  torch        2.1.0 is too old, 2.6 is the oldest supported version; pip install 'pst-dist[train]'"
        in done.stdout
    )
    assert "PROBLEM  triton       2.0.0, but torch was built for 3.1.0; pip install triton==3.1.0" in done.stdout
    for name, version, floor in (
        ("ray", "2.59.1", "2.60"),
        ("transformers", "4.57.6", "5.0"),
        ("deepspeed", "0.18.9", "0.19"),
    ):
        assert f"PROBLEM  {name:12} {version} is too old, {floor} is the oldest supported version" in done.stdout


def test_without_torch_that_is_what_it_reports(tmp_path):
    """A folder with the core packages alone is all that this Python sees."""
    core = ("fsspec", "numpy", "pydantic", "pydantic-core", "pyyaml", "safetensors", "webdataset", "rich", "pst-dist")
    core += ("packaging", "psutil")
    core += (
        "annotated-types",
        "typing-extensions",
        "typing-inspection",
        "braceexpand",
        "pygments",
        "markdown-it-py",
        "mdurl",
    )
    for found in distributions():
        if found.metadata["Name"].lower().replace("_", "-") in core:
            for file in {entry.parts[0] for entry in found.files or [] if entry.parts[0] not in ("..", "__pycache__")}:
                with contextlib.suppress(FileExistsError):
                    (tmp_path / file).symlink_to(Path(found.locate_file(file)))
    command = [sys.executable, "-S", "-m", "pst_dist.cli", "doctor"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    for words, code, said in (
        ([], 0, "warning  torch        is not installed"),
        (["demo"], 4, "PROBLEM  torch        is not installed"),
    ):
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and said in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("supported", "version", "said"),
    [
        (">=2.6", "2.6", None),
        (">=2.6", "2.13.0+cpu", None),
        (">=2.6", "2.6.0a0+df5bbc09d1.nv24.11", None),
        (">=2.6", "2.5.1", "2.5.1 is too old, 2.6 is the oldest supported version"),
        (">=2.6", "2.10.0rc1", None),
        ("<6,>=5.0", "4.57.1", "4.57.1 is too old, 5.0 is the oldest supported version"),
        ("<6,>=5.0", "6.0.1", "6.0.1 is not supported: need <6,>=5.0"),
        ("", "0.1", None),
    ],
)
def test_versions_are_compared_as_versions_with_both_ends(supported, version, said):
    assert software._unsupported(version, SpecifierSet(supported)) == said


def test_memory_is_the_kernels_or_less_in_a_container():
    kernel = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
    }
    machine = collect()
    assert 0 < machine.memory <= kernel["MemTotal"] and 0 <= machine.memory_free <= machine.memory
    limit = Path("/sys/fs/cgroup/memory.max")
    limited = limit.is_file() and limit.read_text().strip() != "max"
    assert machine.memory == (min(kernel["MemTotal"], int(limit.read_text())) if limited else kernel["MemTotal"])


def test_only_what_the_core_needs_is_missed_on_every_machine():
    core = {name for name, (_, extra) in software.floors().items() if not extra}
    assert {"pydantic", "numpy"} <= core and not core & {"torch", "ray", "lm_eval", "s3fs"}


def test_nodes_with_other_software_are_told_apart(tmp_path, capsys):
    here = collect().to_json()
    names = ("a", "b", "c")
    for name in names:
        write_json(tmp_path / f"{name}.json", here | {"host": name})
    reports = [str(tmp_path / f"{name}.json") for name in names]
    assert run_verb(["doctor", *reports]) == 0 and "3 nodes have the same" in capsys.readouterr().out
    other = here | {"host": "c", "code": "0" * 16, "driver": "550.1", "packages": here["packages"] | {"torch": "2.7.0"}}
    write_json(tmp_path / "c.json", other)
    assert run_verb(["doctor", "--compare", *reports]) == 4
    said = capsys.readouterr().out
    assert re.search("PROBLEM  torch  .* on a, b, 2.7.0 on c; install", said) and "PROBLEM  code" in said
    assert "warning  driver" in said
    write_json(tmp_path / "c.json", {"steps": 8})
    assert run_verb(["doctor", *reports]) == 2 and "not a report of a node" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such report"):
        read_report(tmp_path / "d.json")


def test_a_check_that_hangs_or_breaks_keeps_nothing_waiting():
    def fail():
        raise ValueError("three")

    def refuse():
        raise InputError("no such file", "give another", path="rows.jsonl")

    begin = time.monotonic()
    checks = [
        Check("refuses", refuse),
        Check("hangs", lambda: time.sleep(600) or [], 0.5, "wake it"),
        Check("breaks", fail),
    ]  # type: ignore[func-returns-value]
    found = look_at([*checks, Check("works", lambda: [ok("works", "fine")])])
    assert time.monotonic() - begin < 60
    assert [one.line() for one in found] == [
        "PROBLEM  refuses      rows.jsonl: no such file; give another",
        "PROBLEM  hangs        no answer within 0 s; wake it",
        "warning  breaks       could not be checked (ValueError: three)",
        "ok       works        fine",
    ]


# --- this node --------------------------------------------------------------------------------------------------------


def test_a_lock_that_a_killed_build_left_is_found_and_one_at_work_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("fused_adam", "py311_cpu/shm_comm"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    from torch.utils.file_baton import FileBaton

    (tmp_path / "cpu_adam").mkdir()
    builder = FileBaton(str(tmp_path / "cpu_adam" / "lock"))
    assert builder.try_acquire()
    said = lines(software.compiler_locks())
    assert len(said) == 2 and f"rm {tmp_path}/fused_adam/lock" in said[0] and "shm_comm/lock" in said[1]
    builder.release()


def test_a_driver_that_hangs_or_complains_is_said(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("pst_dist.diagnostics.machine.facts._SMI_SECONDS", 1.0)
    for script, wanted in (
        ("sleep 600", "did not answer within 1 s"),
        ("echo Driver/library mismatch; exit 18", "mismatch"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        gpus, _, trouble = gpus_here()
        assert gpus == () and wanted in trouble


# As nvidia-smi 575 prints for the fields that we ask for: two unlike GPUs, one with MIG and an uncorrected error.
SMI = """\
0, NVIDIA A100-SXM4-80GB, 81920, 40000, 8.0, 575.57.08, Disabled, 0
1, Tesla V100-PCIE-16GB, 16384, 3, 7.0, 575.57.08, [N/A], 2
"""


def test_gpus_are_judged_by_what_torch_and_the_config_want(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<E\n{SMI}E\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine = replace(collect(), torch_cuda="13.0", shared_memory=64 * 2**20)
    assert (
        machine.gpus[1] == Gpu(1, "Tesla V100-PCIE-16GB", 16384, 3, "7.0", False, 2) and machine.driver == "575.57.08"
    )
    config = load_config(None, ["train.bf16=true"])
    said = software.hardware(
        machine, config, ranks=4, environment={"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu"}
    )
    problems, warnings = "\n".join(lines(said)), "\n".join(lines(said, "warning"))
    for words in ("575.57.08 does not support CUDA 13", "GPU 1 has had 2 memory errors", "gpus=4, but this node has 2"):
        assert words in problems
    for words in (
        "not all of one kind",
        "40000 of 81920 MiB",
        "hides some",
        "DS_ACCELERATOR=cpu",
        "/dev/shm     64 MiB",
    ):
        assert words in warnings
    plain = replace(machine, gpus=machine.gpus[:1], torch_cuda=None)
    assert "is a CPU build" in lines(software.hardware(plain, None, ranks=None, environment={}))[0]
    none = replace(machine, gpus=(), open_files=256)
    said = lines(software.hardware(none, config, ranks=none.cores, environment={}), "warning")
    assert "wastes gigabytes" in said[0] and "open files" in said[-1]
    if none.cores > 1:
        assert f"export OMP_NUM_THREADS={1}" in said[1]
    assert "CPU ranks on" in lines(software.hardware(none, None, ranks=10**6, environment={"DS_ACCELERATOR": "cpu"}))[0]
    said = lines(software.hardware(none, None, ranks=8, environment={}))[0]
    assert "gpus=8, but this node has none" in said


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """What doctor says of a run on a read-only mount with its data on a tiny one, both of this machine's memory."""
    probe = ["unshare", "-m", "true"]
    if os.geteuid() != 0 or shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")
    folder = tmp_path_factory.mktemp("mounts")
    for name in ("readonly", "tiny"):
        (folder / name).mkdir()
    script = (
        f"mount -t tmpfs -o ro,size=64m none {folder}/readonly && "
        f"mount -t tmpfs -o size=2m,nr_inodes=50 none {folder}/tiny && "
        f"exec {sys.executable} -m pst_dist.cli doctor demo nodes=2 gpus=1 train.deepspeed=zero1 "
        f"output_dir={folder}/readonly/run data_dir={folder}/tiny/data student.fresh.hidden_size=1024"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_read_only_and_a_full_disk_are_named_before_anything_starts(mounts):
    assert mounts.returncode == 4, mounts.stderr
    said = [line for line in mounts.stdout.splitlines() if line.startswith("PROBLEM")]
    assert any("output_dir" in line and "readonly: cannot write: Read-only file system" in line for line in said)
    assert any("data_dir" in line and "more files fit" in line for line in said)
    assert any("output_dir" in line and "the run writes" in line and "an estimated" in line for line in said)


def test_memory_of_one_machine_is_no_place_for_two_nodes(mounts):
    assert "tiny/data is on tmpfs, which is local to this machine, but there are 2 nodes" in mounts.stdout


def test_a_run_at_work_is_named_with_its_process(tmp_path):
    config = load_config("demo", [f"output_dir={tmp_path}/run", "arms=[]"])
    assert places.contents(config) == [] and lock_holder(tmp_path / "run") is None
    with directory_lock(tmp_path / "run"):
        assert f"by process {os.getpid()} on" in lines(places.contents(config))[0]
    assert lock_holder(tmp_path / "run") is None
    with (tmp_path / "run" / ".lock").open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what doctor did has left it free


@pytest.mark.encoder
def test_damaged_and_unfinished_artefacts_are_named(small_data, tmp_path):
    from pst_dist.training.trainer import train

    config = small_config(small_data, tmp_path, train__max_steps=4, train__eval_steps=2)
    train(config)
    assert not lines(places.contents(config)) and not lines(places.contents(config), "warning")
    newest = tmp_path / "checkpoints" / "checkpoint-4" / "state-00000.safetensors"
    os.truncate(newest, 1000)
    (tmp_path / "checkpoints" / ".checkpoint-6.partial").mkdir()
    (tmp_path / "best" / "manifest.json").unlink()
    said = lines(places.contents(config), "warning")
    assert [line.split()[1] for line in said] == ["student", "checkpoint", "left"]
    assert "1000 bytes, but the manifest has" in said[1] and "the newest intact step is 2" in said[1]
    (tmp_path / "checkpoints" / "checkpoint-2" / "state-00000.safetensors").unlink()
    said = lines(places.contents(config))
    assert len(said) == 2 and all("no other is intact" in line for line in said)


def test_the_trial_of_a_folder_is_not_left_over(tmp_path):
    config = load_config("demo", [f"output_dir={tmp_path / 'run'}", "arms=[]"])
    trial = tmp_path / "run" / ".pst-try-8k2j"
    trial.mkdir(parents=True)
    with atomic_path(trial / "old") as partial:  # as the check of the folder writes it, at the same time
        partial.write_text("x")
        assert not lines(places.contents(config), "warning")
    with atomic_path(tmp_path / "run" / "metrics") as partial:
        partial.write_text("x")
        assert "1 unfinished file(s)" in lines(places.contents(config), "warning")[0]


def test_memory_that_a_rank_would_not_have_is_said(small_data, tmp_path):
    config = small_config(small_data, tmp_path, train__deepspeed="zero1")
    assert not lines(places.room(config, Machines(), 2**34, False))
    assert "2 rank(s) need an estimated" in lines(places.room(config, Machines(gpus=2), 2**20, False))[0]


# --- models -----------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a public, a gated and an unknown model."""

    def do_HEAD(self):
        self.send_response({"open": 200, "gated": 401}.get(self.path.split("/")[2], 404))
        self.end_headers()

    def log_message(self, *_):
        pass


def test_models_are_looked_for_on_disk_and_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def student(name):
        return models.student(load_config(None, [f"student.model_name_or_path={name}"]))[0].line()

    assert "no such folder" in student(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "contains no weights" in student(tmp_path / "empty")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in student("org/open")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert student("org/open").startswith("ok")
        assert "denies this user access to org/gated (401)" in student("org/gated")
        assert "the hub does not have org/nothing" in student("org/nothing")
        server.shutdown()
    assert "does not answer" in student("org/open"), "the server is gone"


# --- network and clusters ---------------------------------------------------------------------------------------------


def test_a_busy_port_is_a_problem_only_where_rank_zero_would_listen():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        number = str(busy.getsockname()[1])
        assert f"MASTER_PORT {number} is in use" in network.port({"MASTER_PORT": number})[0].line()
        assert network.port({"MASTER_PORT": number, "MASTER_ADDR": "127.0.0.1"})[0].level == "problem"
        assert network.port({"MASTER_PORT": number, "MASTER_ADDR": "192.0.2.7"})[0].level == "ok"
    assert network.port({"MASTER_PORT": number})[0].level == "ok", "free again"
    assert "is not a port" in network.port({"MASTER_PORT": "http"})[0].line()
    assert "does not resolve" in network.port({"MASTER_PORT": number, "MASTER_ADDR": "nowhere.invalid"})[0].line()


def test_a_hostfile_is_read_line_by_line(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nlocalhost slots=99\nnowhere.invalid slots=2\nlocalhost slots=1\nn3: 4\nn4 slots=0\n\n")
    said = lines(network.hostfile(path, 2))
    for number, words in (
        (2, "99 slots, but this host has room for 2"),
        (3, "the host name 'nowhere.invalid' does not resolve"),
        (4, "duplicate host localhost"),
        (5, "'n3: 4' is not a host"),
        (6, "n4 slots=0"),
    ):
        assert any(f"{path}:{number}: " in line and words in line for line in said), said
    path.write_text("localhost slots=2\n")
    assert not lines(network.hostfile(path, 2))
    path.write_text("# nothing\n")
    assert "lists no hosts" in lines(network.hostfile(path, 2))[0]
    assert "no such hostfile" in lines(network.hostfile(tmp_path / "none", 2))[0]


def test_a_name_that_only_this_machine_understands_is_no_name_for_two_nodes():
    found = network.host_name(2)[0]
    addresses = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)}
    outward = any(not address.startswith(("127.", "::1")) for address in map(str, addresses))
    assert found.level == ("ok" if outward else "problem") and network.host_name(1)[0].level == "ok"


def test_training_on_ray_is_looked_at_like_embedding_on_it():
    words = ["train.backend=ray", "train.ray.num_workers=3", "train.deepspeed=zero1"]
    (found,) = clusters.ray(load_config(None, [*words, "train.ray.address=127.0.0.1:9"]), {})
    assert found.level == "problem" and "train.ray.address=127.0.0.1:9: nothing answers there" in found.what
    answer = {"nodes": 1, "resources": {"CPU": 2.0}}
    assert (
        "3 rank(s) of 1 CPU each, but the cluster has 2 CPU"
        in lines(clusters._room(load_config(None, words), "here", answer), "problem")[0]
    )
    assert len(clusters._room(load_config(None, ["train.backend=ray"]), "here", answer)) == 1


def test_object_storage_is_reached_or_named(tmp_path):
    (tmp_path / "store").mkdir()
    config = load_config(None, [f"output_dir={tmp_path}/run", f"data_dir=file://{tmp_path}/store"])
    assert [found.level for found in places.store(config)] == ["ok"]
    (found,) = places.store(config.model_copy(update={"data_dir": "nosuch://bucket/data"}))
    assert found.level == "problem" and "nosuch://bucket/data" in found.what
    assert places.store(config.model_copy(update={"data_dir": None})) == []


def test_an_address_where_no_ray_is_any_more_is_said_at_once():
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    (found,) = clusters.ray(None, {"RAY_ADDRESS": address})
    assert found.level == "warning" and "nothing answers there" in found.what and "unset RAY_ADDRESS" in found.remedy
    config = load_config(None, ["embed.backend=ray"])
    assert clusters.ray(config, {"RAY_ADDRESS": address})[0].level == "problem", "now it is needed"
    config = load_config(None, ["embed.backend=ray", f"embed.ray.address={address}"])
    assert "start it" in lines(clusters.ray(config, {}))[0]


def test_a_listener_that_says_nothing_is_left_after_its_time(monkeypatch):
    monkeypatch.setattr(clusters, "_JOIN_SECONDS", 3.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{silent.getsockname()[1]}"}
        assert "takes connections, but no answer within 3 s" in lines(clusters.ray(None, environment), "warning")[0]


@pytest.fixture(scope="class")
def head(tmp_path_factory):
    """A Ray head on loopback that asks for a token; (address, environment with the token)."""
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, client_port = free.getsockname()[1], other.getsockname()[1]
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text("0123456789abcdef" * 2)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "HOME": str(folder)}
    # Sockets have short paths: not pytest's folder.
    short = Path("/tmp") / f"pst-doc-{os.getpid()}"
    environment = os.environ | token | {"RAY_USAGE_STATS_ENABLED": "0"}
    ray = Path(sys.executable).with_name("ray")
    command = [
        str(ray),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--object-store-memory=80000000",
        f"--temp-dir={short}",
        f"--ray-client-server-port={client_port}",
        "--disable-usage-stats",
    ]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "log").read_text():
            assert child.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-2000:]
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", environment
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.ray
class TestARealRayCluster:
    def test_room_for_actors_is_compared_with_what_it_has(self, head):
        address, environment = head
        words = ["embed.backend=ray", f"embed.ray.address={address}", "embed.ray.num_gpus_per_actor=1"]
        joined, lacking = clusters.ray(load_config(None, words), environment)
        assert joined.level == "ok" and "1 node(s), 2 CPUs, 0 GPUs" in joined.what
        assert "needs 1 CPU, 1 GPU, the cluster has 2 CPU, 0 GPU" in lacking.what and lacking.level == "problem"

    @pytest.mark.parametrize("token", ["none", "wrong"])
    def test_a_missing_and_a_wrong_token_are_told_from_a_dead_cluster(self, head, token, tmp_path):
        address, environment = head
        environment = environment | {"RAY_ADDRESS": address, "HOME": str(tmp_path)}
        if token == "none":
            del environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN_PATH"]
        else:
            (tmp_path / "token").write_text("f" * 32)
            environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
        (found,) = clusters.ray(None, environment)
        assert "the token is not accepted" in found.what and "RAY_AUTH_TOKEN_PATH" in found.remedy

    def test_a_cluster_of_another_version_is_named(self, head):
        """Its own record of its version is changed, which is all that a joining process compares."""
        address, environment = head
        script = (
            "import json, sys\n"
            "from ray._raylet import GcsClient\n"
            "gcs = GcsClient(address=sys.argv[1])\n"
            "(key,) = [key for key in gcs.internal_kv_keys(b'CLUSTER_METADATA', b'cluster')]\n"
            "record = json.loads(gcs.internal_kv_get(key, b'cluster'))\n"
            "record['ray_version'] = '2.40.0'\n"
            "gcs.internal_kv_put(key, json.dumps(record).encode(), True, b'cluster')\n"
        )
        subprocess.run([sys.executable, "-c", script, address], env=environment, check=True, timeout=60)
        (found,) = clusters.ray(None, environment | {"RAY_ADDRESS": address})
        assert "2.40.0" in found.what and "Version mismatch" in found.what


@pytest.mark.slurm
def test_a_real_slurm_is_asked_for_its_partitions(monkeypatch):
    from slurm_cluster import slurm_cluster

    with slurm_cluster(2) as cluster:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
        found = clusters.slurm(cluster.environment, 3, None)
        assert [one.level for one in found] == ["ok", "warning", "problem"]
        assert "main* (2 nodes, 0 GPUs each)" in found[0].what and "nodes=3" in found[2].what
