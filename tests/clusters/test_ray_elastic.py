"""Training on a Ray cluster that loses a node and gets another: the number of ranks follows (train.ray.min_workers)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from run_files import curve
from small_run import small_config
from waiting import wait_until

from pst_dist.config.loading import dump_config

pytest.importorskip("ray", reason="needs ray")
ROOT = Path(__file__).resolve().parents[2]
NODES = """
import os, sys
from pst_dist.clusters.ray.connect import secure_local_cluster

if __name__ == "__main__":
    secure_local_cluster()
    from ray.cluster_utils import Cluster
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    print(cluster.address, os.environ["RAY_AUTH_TOKEN_PATH"], flush=True)
    for order in sys.stdin:
        if order == "lose\\n":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif order == "gain\\n":
            nodes.append(cluster.add_node(num_cpus=1, **small))
        else:
            break
        print("done", flush=True)
    cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.encoder
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)  # its own limits end it, on a busy machine too
def test_ranks_follow_the_nodes_of_the_cluster(small_data, tmp_path):
    # All nodes are on this machine, and Ray connects the driver to any of them. Where that is the one that gets lost,
    # the driver rightly ends, and the test has to begin anew: with a chance of a third each time.
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        if follows_the_nodes(small_data, tmp_path / str(number)):
            return
    pytest.fail("the driver was on the lost node every time")


class _DriverLost(Exception):
    pass


def follows_the_nodes(small_data, tmp_path) -> bool:
    """Whether the driver was on another node than the one that got lost; asserts all else."""
    config, run, log = tmp_path / "my.yaml", tmp_path / "run", tmp_path / "log"
    changes = {
        "train__deepspeed": "zero1",
        "train__max_steps": 100_000,
        "train__save_steps": 10,
        "train__eval_steps": 100_000,
    }
    config.write_text(dump_config(small_config(small_data, run, **changes)))
    (tmp_path / "nodes.py").write_text(NODES)
    temporary = tempfile.mkdtemp(prefix="pst-test-", dir="/tmp")  # sockets lie in it: at most 107 bytes of path
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": temporary}
    environment |= {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "PYTHONWARNINGS": "ignore"}
    environment |= {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    started: list[subprocess.Popen] = []
    lost = False

    def order(word: str) -> None:
        nodes.stdin.write(f"{word}\n")
        nodes.stdin.flush()
        assert nodes.stdout.readline() == "done\n"

    def wait_for(pattern: str, times: int = 1) -> None:
        def found() -> bool:
            if job.poll() == 7 and lost and "the Ray cluster is gone" in log.read_text():
                raise _DriverLost
            assert job.poll() is None, log.read_text()[-3000:]
            return len(re.findall(pattern, log.read_text())) >= times

        wait_until(found, f"{times} x {pattern}", seconds=240)

    try:
        with (tmp_path / "nodes.log").open("w") as stream:
            program = [sys.executable, tmp_path / "nodes.py"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stream, "text": True}
            nodes = subprocess.Popen(program, env=environment, **pipes)
        started.append(nodes)
        address, token = nodes.stdout.readline().split()
        words = [f"train.ray.address={address}", "train.ray.num_workers=2", "train.ray.min_workers=1"]
        command = [
            sys.executable,
            "-m",
            "pst_dist.cli",
            "train",
            config,
            "on=ray",
            *words,
            "train.ray.resize_seconds=1",
        ]
        with log.open("w") as stream:
            # The token alone, as somebody has it who copied it from the head node.
            own = environment | {"RAY_AUTH_TOKEN_PATH": token}
            job = subprocess.Popen(command, env=own, stdout=stream, stderr=subprocess.STDOUT)
        started.append(job)
        wait_for(r"on 2 rank\(s\)")
        wait_until(lambda: (run / "checkpoints" / "checkpoint-10").is_dir(), "a checkpoint", seconds=120)
        order("lose")
        lost = True
        wait_for(r"on 1 rank\(s\)")
        wait_for(r"on 1 rank\(s\)(.*\n)+?step \d+/")
        order("gain")
        wait_for(r"on 2 rank\(s\)", times=2)
        wait_for(r"on 2 rank\(s\)[\s\S]*on 2 rank\(s\)(.*\n)+?step \d+/")
        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 75, log.read_text()[-3000:]
    except _DriverLost:
        return False
    finally:
        for process in reversed(started):
            if process.poll() is None:
                process.terminate()
                process.wait()
        shutil.rmtree(temporary, ignore_errors=True)
    said = log.read_text()
    assert [int(count) for count in re.findall(r"on (\d) rank\(s\)", said)] == [2, 1, 2]
    # Ray may also see that the node is gone before the rank is missed, and then only starts the ranks anew.
    assert len(re.findall(r"lost rank", said)) <= 1, "growing is no failure"
    assert len(re.findall(r"resumed step \d+ from", said)) == 2 and "stopped by a signal: saved after step" in said
    steps = [row["step"] for row in curve(run)]
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    return True
