"""Told to stop: a checkpoint at the next step boundary, exit code 75, and the same end by the same command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_files import losses
from small_run import small_config
from train_process import STEPS, after_some_steps, config_file, started

from pst_dist.distributed.preemption import ONE_REQUEST_SECONDS
from pst_dist.training.trainer import train

pytestmark = pytest.mark.encoder
ENDLESS = """
import signal, time
from pst_dist.distributed.preemption import stop_requests
with stop_requests():
    print("listening", flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def undisturbed(small_data, tmp_path_factory) -> list[float]:
    output = tmp_path_factory.mktemp("whole") / "run"
    train(small_config(small_data, output, train__max_steps=STEPS, train__eval_steps=STEPS))
    return losses(output)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_told_run_saves_where_it_stands_and_goes_on_from_there(small_data, tmp_path, undisturbed, number):
    run = tmp_path / "run"
    path = config_file(small_data, run)
    process = started(path)
    after_some_steps(process, run, 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 75), said
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < STEPS, "no step was waited for beyond the running one"
    if number == signal.SIGINT:  # the same checkpoint, so going on from it is looked at once
        return
    assert f"stopped by a signal: saved after step {step} of {STEPS}; run the same command again to resume" in said
    again = started(path)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert losses(run) == undisturbed


@pytest.mark.distributed
def test_all_ranks_stop_together_when_one_is_told(small_data, tmp_path):
    run = tmp_path / "run"
    path = config_file(small_data, run, train__deepspeed="zero2")
    process = started(path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    after_some_steps(process, run, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(child) for child in children if "pst_dist.train" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    _, said = process.communicate(timeout=90)
    assert process.returncode != 0
    # torchrun makes 1 of any code; what the ranks ended with stands in its report.
    assert "exitcode  : 75" in said or "exitcode: 75" in said, said[-3000:]
    assert said.count("stopped by a signal: saved after step") >= 1
    assert len(list((run / "checkpoints").glob("checkpoint-*"))) == 1


def test_the_second_signal_ends_at_once_unless_it_is_the_first_one_passed_on():
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"listening\n"
    for _ in range(2):  # a terminal's Ctrl-C reaches a rank, and the launcher sends it once more
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.poll() is None, "the first one only asks"
    time.sleep(ONE_REQUEST_SECONDS)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.communicate()
