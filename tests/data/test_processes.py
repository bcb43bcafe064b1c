"""Work that is spread over processes: the same results and errors as in one process, and no process left behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import worker_jobs as jobs

import pst_dist
from pst_dist.data.processes import Processes, default_workers, usable_cores
from pst_dist.errors import DataError, EnvironmentFault


def numbered(count: int):
    return (functools.partial(jobs.doubled, number) for number in range(count))


def workers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "data.processes" in " ".join(one.cmdline())]


def until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_results_come_in_order_and_the_pool_serves_several_sources_without_leaving_a_process():
    with Processes(3) as processes:
        assert list(processes.map(numbered(50))) == [2 * number for number in range(50)]
        assert list(processes.map(numbered(3))) == [0, 2, 4]
        assert list(processes.map(iter([]))) == []
        assert len(workers()) == 3
    assert workers() == []


def test_few_jobs_are_done_here_and_start_no_process():
    with Processes(2, alone=3) as processes:
        here = functools.partial(jobs.own_process)
        assert set(processes.map([here] * 2)) == {os.getpid()} and workers() == []
        first, *others = processes.map([here] * 4)
        assert first == os.getpid() and os.getpid() not in others
    with Processes(1) as processes:
        assert set(processes.map([here] * 9)) == {os.getpid()}


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_arrives_in_its_place_as_it_was_raised(count):
    def rows():
        yield from numbered(5)
        yield functools.partial(jobs.refused, 5)
        raise OSError("the file ended")

    found = []
    with pytest.raises(DataError, match="row 5 is bad") as caught, Processes(count) as processes:
        for one in processes.map(rows()):
            found.append(one)
    assert found == [0, 2, 4, 6, 8]
    assert (caught.value.where, caught.value.remedy) == ("rows.jsonl:5", "fix it")
    assert workers() == []


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_while_rows_are_read_comes_after_the_results_of_earlier_rows(count):
    def rows():
        yield from numbered(5)
        raise DataError("damaged after row 5")

    found = []
    with pytest.raises(DataError, match="damaged"), Processes(count) as processes:
        for one in processes.map(rows()):
            found.append(one)
    assert found == [0, 2, 4, 6, 8]


def test_a_fault_of_the_code_names_the_place_in_the_worker():
    with pytest.raises(IndexError) as caught, Processes(2) as processes:
        list(processes.map([jobs.broken]))
    assert "worker_jobs.py" in str(caught.value.__cause__)


def test_a_worker_that_is_killed_is_an_error_of_the_machine_and_ends_the_others():
    with pytest.raises(EnvironmentFault, match=r"SIGKILL.*shards\.workers=1"), Processes(2) as processes:
        list(processes.map([jobs.killed, *[functools.partial(jobs.own_process, 0.01)] * 20]))
    assert workers() == []


def test_what_a_job_prints_is_no_answer(capfd):
    with Processes(2) as processes:
        assert list(processes.map([jobs.chatty] * 2)) == [1, 1]
    assert capfd.readouterr().out == ""


def test_workers_end_with_a_parent_that_is_killed_and_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import functools, sys, worker_jobs\n"
        "from pst_dist.data.processes import Processes\n"
        "print('started', flush=True)\n"
        "with Processes(2) as processes:\n"
        "    sleeps = functools.partial(worker_jobs.own_process, 99)\n"
        "    for one in processes.map([worker_jobs.own_process] * 2 + [sleeps]):\n"
        "        print(one, flush=True)\n"
    )
    paths = [str(Path(pst_dist.__file__).parents[1]), str(Path(jobs.__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        parent.stdout.readline(), parent.stdout.readline()
        found = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGKILL)
    assert len(found) == 2
    idle = [one for one in found if one.is_running()]
    # One of them still sleeps in its job; the other one sees at once that its pipe has ended.
    assert until(lambda: sum(one.is_running() and one.status() != "zombie" for one in idle) <= 1)
    for one in idle:
        if one.is_running():
            one.kill()


def test_the_default_is_the_cores_of_this_process_at_most_eight():
    assert default_workers() == min(8, usable_cores()) and 1 <= usable_cores() <= len(os.sched_getaffinity(0))
