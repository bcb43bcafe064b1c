"""Starts that cannot work end at once on every rank, in one line and with their exit code: nodes that differ, one that
lacks the data, a directory in use, a hostfile of nonsense."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port
from small_run import small_config

from pst_dist.config.loading import dump_config
from pst_dist.storage.locks import lock_holder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.encoder]


def start(*command, **environment) -> subprocess.Popen:
    """A process of CPU ranks; its words are read from both streams together."""
    base = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    base["PYTHONPATH"] = str(ROOT)
    # Python finds modules in the working directory first, which is to hold none.
    return subprocess.Popen(
        list(map(str, command)),
        cwd="/",
        env=base | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*processes: subprocess.Popen) -> list[tuple[int, list[str]]]:
    """Exit code and lines of each; all are ended with the test."""
    try:
        return [
            (process.wait(), said.splitlines())
            for process in processes
            for said in [process.communicate(timeout=120)[0]]
        ]
    finally:
        for process in processes:
            process.kill()


def two_nodes(config: Path, *, second=(), **second_environment) -> list[tuple[int, list[str]]]:
    """A rank on each of two nodes, as srun starts them; the second node has an environment of its own."""
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "pst_dist.train", config]
    return ended(start(*command, **group, RANK="0"), start(*second, *command, **group, RANK="1", **second_environment))


@pytest.fixture
def config(small_data, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(small_data, tmp_path / "run", train__deepspeed="zero1")))
    return path


def test_nodes_with_different_versions_are_refused_on_every_rank(config, tmp_path):
    shutil.copytree(ROOT / "pst_dist", tmp_path / "other" / "pst_dist")
    shutil.copytree(ROOT / "ds_configs", tmp_path / "other" / "ds_configs")
    (tmp_path / "other" / "pst_dist" / "_version.py").write_text('__version__ = "9.9.9"\n')
    for code, said in two_nodes(config, PYTHONPATH=str(tmp_path / "other")):
        (line,) = (line for line in said if line.startswith("pst: "))
        assert code == 4 and "ranks differ in pst_dist: " in line and "9.9.9 on rank 1" in line, said
        assert not any("Traceback" in line for line in said)


def test_a_node_that_does_not_see_the_shards_ends_all_with_its_words(config, small_data):
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")
    hidden = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {small_data} && exec "$@"', "sh"]
    (first, said_first), (second, said_second) = two_nodes(config, second=hidden)
    assert first == second == 2, said_first + said_second
    (line,) = (line for line in said_first if line.startswith("pst: "))
    assert "rank 1 on " in line and str(small_data) in line and "pst shard" in line
    assert not any("Traceback" in line for line in said_first + said_second)


def test_launches_that_cannot_work_end_with_the_exit_code_of_their_ranks(small_data, tmp_path):
    run = tmp_path / "run"
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(small_data, run, train__deepspeed="zero1", train__max_steps=100_000)))
    launch = [sys.executable, "-m", "pst_dist.torchrun", "--nproc-per-node=2"]
    train = ["-m", "pst_dist.train", path]
    first = start(*launch, "--standalone", *train)
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file():
            assert first.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        owner = lock_holder(run)
        holder = f"in use by {owner}".partition(" since ")[0]  # it has held the run's record for a moment longer
        ((code, said),) = ended(start(*launch, "--standalone", *train))
        complaints = [line for line in said if line.startswith("pst: ")]
        assert code == 5 and complaints and all(holder in line for line in complaints), said
        assert first.poll() is None and lock_holder(run) == owner
        steps = (run / "metrics.jsonl").stat().st_size
        while (run / "metrics.jsonl").stat().st_size == steps:
            assert first.poll() is None and time.monotonic() < end + 120
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=120)
        assert lock_holder(run) is None
    finally:
        first.kill()
    # Rank zero's own refusal ends the ranks that already wait for it.
    path.write_text(dump_config(small_config(small_data, "/proc/run", train__deepspeed="zero1")))
    ((code, said),) = ended(start(*launch, "--standalone", *train))
    complaints = [line for line in said if line.startswith("pst: ")]
    assert code == 4 and len(complaints) == 1 and "/proc/run: cannot write" in complaints[0], said
    # The port that a launcher is told to take, held by somebody else.
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        ((code, said),) = ended(start(*launch, f"--master-port={port}", *train))
    complaints = [line for line in said if line.startswith("pst: ")]
    assert code == 4 and len(complaints) == 1 and str(port) in complaints[0], said


def test_the_launcher_script_looks_at_a_hostfile_before_anything_is_made(config, tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\nnowhere.invalid slots=2\n")
    script = ROOT / "launchers" / "deepspeed.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ((code, said),) = ended(start("bash", script, config, PATH=path, HOSTFILE=str(tmp_path / "hosts")))
    assert code == 4 and any("hosts:2: the host name 'nowhere.invalid' does not resolve" in line for line in said), said
    assert not (tmp_path / "run").exists()
