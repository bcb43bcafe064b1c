"""What Slurm says of its partitions and jobs, and what a machine without it says."""

import re

import pytest

from pst_dist.cli.main import run_verb
from pst_dist.clusters.slurm.follow import read_jobs
from pst_dist.clusters.slurm.partitions import Partition, check_room, gpus_of
from pst_dist.clusters.slurm.script import read_words
from pst_dist.errors import ConfigError


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


def test_without_slurm_there_is_one_line_and_exit_code_4(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_verb(["submit", "slurm", "demo", f"output_dir={tmp_path}/run"]) == 4
    assert capsys.readouterr().err.startswith("pst: error[ENVIRONMENT] sbatch is not on this machine's PATH; run this")
    assert not (tmp_path / "run").exists()
