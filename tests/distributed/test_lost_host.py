"""Two hosts, torchrun and the deepspeed launcher: power cuts, pulled cables, and starting again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import boxed, hosts_can_be_made
from rank_group import DEAD_SECONDS
from rank_group import __file__ as RANKS
from run_files import losses
from small_run import small_config
from waiting import wait_until

from pst_dist.training.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.encoder]


def config_in(folder: Path, data: Path, **changes) -> str:
    """The path of a config that trains 12 steps in `folder`, with a checkpoint every 4."""
    settings = {"train__max_steps": 12, "train__eval_steps": 4, "train__deepspeed": "zero2"} | changes
    path = folder / "config.yaml"
    path.write_text(json.dumps(small_config(data, folder / "run", **settings).model_dump(mode="json")))
    return str(path)


@pytest.fixture(scope="module")
def one_process(small_data, tmp_path_factory) -> list[float]:
    """The losses of the same steps in one process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(small_config(small_data, output, train__max_steps=12, train__eval_steps=4))
    return losses(output)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("pst: error") or "Traceback" in line]


def test_a_host_without_power_and_one_without_cable_are_named_and_the_next_launcher_goes_on(
    small_data, tmp_path, one_process
):
    if not hosts_can_be_made():
        pytest.skip("needs root and iproute2 to make hosts of network namespaces")
    config = config_in(tmp_path, small_data)
    program = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "lost_host.py"), str(tmp_path), config]
    done = subprocess.run(boxed(*program), capture_output=True, text=True, timeout=540)
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, done.stderr + said.get("torchrun-0", "") + said.get("deepspeed-0", "")
    results = json.loads(done.stdout)

    assert results["torchrun-0"]["code"] == 7 and results["torchrun-0"]["seconds"] <= DEAD_SECONDS, results
    (line,) = errors(said["torchrun-0"])
    assert "rank 1 on n2 was lost in backward of step 6 (connection closed);" in line

    for rank in range(3):
        assert results[f"laps-{rank}"]["code"] == 7 and results[f"laps-{rank}"]["seconds"] <= DEAD_SECONDS, results
        lost = "rank 0 on n1" if rank == 2 else "rank 2 on n2"
        (line,) = errors(said[f"laps-{rank}"])
        place = r"was lost in (forward|backward) of step \d+"
        assert re.search(rf"{lost} {place} \(no answer for \d+ s: its machine or the network is gone\);", line), line

    assert [results[f"deepspeed-{node}"]["code"] for node in (0, 1)] == [0, 0], said["deepspeed-0"]
    assert "resumed step 4" in said["deepspeed-0"] and "on 2 rank(s), engine zero2" in said["deepspeed-0"]
    assert losses(tmp_path / "run") == pytest.approx(one_process, abs=1e-5)


def test_torchrun_starts_ranks_again_by_itself_after_one_was_killed(small_data, tmp_path, one_process):
    config = config_in(tmp_path, small_data)
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.2"]
    stuck = [RANKS, str(tmp_path), "1", "backward", "6"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pst_dist.torchrun", *options, *stuck, config],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: (tmp_path / "stuck").exists() or process.poll() is not None, "rank 1 is stuck", 300)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        _, said = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, said
    (line,) = errors(said)
    assert f"rank 1 on {socket.gethostname()} was lost in backward of step 6 (connection closed);" in line
    assert "resumed step 4" in said
    assert losses(tmp_path / "run") == pytest.approx(one_process, abs=1e-5)
