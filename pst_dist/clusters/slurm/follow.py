"""Follows a Slurm job to its end: its state, its log, and its exit code.

It only reads what anyone may read (`scontrol show job` and the log file), so following can be stopped and restarted at
any time, also from another machine.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pst_dist.clusters.jobs import Status
from pst_dist.clusters.slurm.commands import run, unreadable, whole
from pst_dist.errors import EnvironmentFault

_SILENT_SECONDS = 600.0
"""How long the controller may be unreachable while a job is followed; a restart takes a minute."""
_POLL_SECONDS = 10.0
"""Longest interval between two queries about a job; PST_SLURM_POLL_SECONDS sets another."""
_LOG_SECONDS = 0.5
_ENDED = {
    "COMPLETED": 0,
    "FAILED": 1,
    "CANCELLED": 130,
    "OUT_OF_MEMORY": 137,
    "TIMEOUT": 75,
    "DEADLINE": 75,
    "NODE_FAIL": 75,
    "BOOT_FAIL": 75,
    "PREEMPTED": 75,
}
"""Final state of a job -> the exit code when the script itself left none; after 75, the same command resumes."""


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array, as `scontrol show job` reports it."""

    number: str
    """`12`, or `12_3` in an array; `12_[1-5]` for tasks that are all still waiting."""
    state: str
    reason: str
    nodes: str
    restarts: int
    exit_code: int
    """Exit code of the script; 128 + number after a signal."""
    output: Path

    @property
    def ended(self) -> bool:
        """Whether it is in a final state."""
        return self.state in _ENDED

    @property
    def result(self) -> int:
        """The exit code of an ended task: the script's own, or the one for its final state."""
        if self.state in ("COMPLETED", "FAILED"):
            return self.exit_code or _ENDED[self.state]
        return _ENDED[self.state]

    @property
    def line(self) -> str:
        """Its state in words."""
        where = f" on {self.nodes}" if self.nodes not in ("", "(null)") else ""
        if self.ended:
            return f"job {self.number}: {self.state.lower()}{where}, exit code {self.result}"
        why = f" ({self.reason})" if self.reason not in ("", "None", "(null)") else ""
        again = f", start {self.restarts + 1}" if self.restarts else ""
        return f"job {self.number}: {self.state.lower()}{where}{again}{why}"


def follow(number: str, *, say: Callable[[str], None]) -> int:
    """Report each state change and each log line until the job has ended; returns its exit code.

    For an array, or several jobs (numbers with commas), that is the code of the first task or job, by number, that
    failed. Raises EnvironmentFault when the
    controller stays unreachable or no longer knows the job; the job itself is never changed.
    """
    tasks: dict[str, Task] = {}
    logs: dict[Path, _Log] = {}
    slowest = float(os.environ.get("PST_SLURM_POLL_SECONDS", _POLL_SECONDS))
    heard, wait = time.monotonic(), min(1.0, slowest)
    while True:
        seen = _show(number)
        fresh: list[Task] = []
        if seen is not None:
            heard = time.monotonic()
            known = {task.number: task for task in seen}
            # Slurm forgets an ended task after some minutes (MinJobAge), while other tasks still run.
            gone = [task for name, task in tasks.items() if name not in known and not task.ended and "[" not in name]
            if gone or not (known or tasks):
                raise EnvironmentFault(f"Slurm knows no job {gone[0].number if gone else number}", "see `sacct`")
            fresh = [task for name, task in known.items() if name not in tasks or task.line != tasks[name].line]
            tasks = {name: task for name, task in tasks.items() if task.ended} | known
        elif time.monotonic() - heard > _SILENT_SECONDS:
            raise EnvironmentFault("no answer from Slurm's controller for 10 minutes", look_again(number))
        for line in (task.line for task in fresh if not task.ended):
            say(line)
        _read_logs(tasks, logs, say)
        for line in (task.line for task in fresh if task.ended):  # after the rest of its log
            say(line)
        if seen is not None and tasks and all(task.ended for task in tasks.values()):
            return next((task.result for _, task in sorted(tasks.items(), key=_by_number) if task.result), 0)
        # Logs are read often; the controller, which all users share, is queried less and less often.
        wait = min(1.0, slowest) if fresh else min(wait * 1.5, slowest)
        again = time.monotonic() + wait
        while time.monotonic() < again:
            time.sleep(_LOG_SECONDS)
            _read_logs(tasks, logs, say)


def status(number: str) -> Status:
    """The state of a job; raises EnvironmentFault when the controller does not answer or does not know the job."""
    tasks = _show(number)
    if not tasks:
        what = "Slurm's controller does not answer" if tasks is None else f"Slurm knows no job {number}"
        raise EnvironmentFault(what, "see `scontrol ping`" if tasks is None else "see `sacct`")
    ended = all(task.ended for task in tasks)
    in_order = sorted(tasks, key=lambda task: _by_number((task.number, task)))
    code = next((task.result for task in in_order if task.result), 0) if ended else None
    return Status("\n".join(task.line for task in in_order), code)


def _read_logs(tasks: dict[str, Task], logs: dict[Path, _Log], say: Callable[[str], None]) -> None:
    """Report new lines in the logs of all tasks that have started."""
    for task in tasks.values():
        if "[" not in task.number and str(task.output) not in ("", "/dev/null"):
            several = f"{task.number}: " if "_" in task.number else ""
            logs.setdefault(task.output, _Log(task.output, several)).read(say, last=task.ended)


def _by_number(item: tuple[str, Task]) -> list[int]:
    return [int(part) for part in re.findall(r"[0-9]{1,18}", item[0])]


def look_again(number: str) -> str:
    """How to follow a job again, or cancel it."""
    return (
        f"the job keeps running; follow it: pst submit slurm --follow {number}, "
        f"cancel it: scancel {number.replace(',', ' ')}"
    )


class _Log:
    """A growing log file, read line by line; it may not exist yet."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix, self._place = path, prefix, 0

    def read(self, say: Callable[[str], None], *, last: bool) -> None:
        """Report the complete new lines; with `last`, also an incomplete last line."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._place)
                fresh = stream.read()
        except OSError:
            return
        end = len(fresh) if last else fresh.rfind(b"\n") + 1
        self._place += end
        for line in fresh[:end].decode("utf-8", "replace").splitlines():
            say(self._prefix + line)


def _show(numbers: str) -> list[Task] | None:
    """The tasks of a job, or of several; without those that Slurm does not know, None when it did not answer."""
    tasks = []
    for number in numbers.split(","):
        answer = run("scontrol", "show", "job", number)
        if not answer.returncode:
            tasks += read_jobs(answer.stdout)
        elif "Invalid job id" not in answer.stderr + answer.stdout:
            return None
    return tasks


def read_jobs(text: str) -> list[Task]:
    """The tasks in the output of `scontrol show job`, which has a block of `Key=value` lines for each.

    Raises EnvironmentFault for a block without a number or state, and for numbers that are none.
    """
    tasks = []
    for block in re.split(r"\n(?=JobId=)", text.strip()):
        values = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", block))
        code, _, ending = values.get("ExitCode", "0:0").partition(":")
        number = values.get("JobId", "")
        if not number or "JobState" not in values:
            raise unreadable("scontrol show job", block)
        if "ArrayJobId" in values:
            index = values.get("ArrayTaskId", "")
            number = f"{values['ArrayJobId']}_{index if index.isdecimal() else f'[{index}]'}"
        tasks.append(
            Task(
                number=number,
                state=values["JobState"],
                reason=values.get("Reason", ""),
                nodes=values.get("NodeList", ""),
                restarts=whole(values.get("Restarts", "0"), "scontrol show job"),
                exit_code=_exit_code(code, ending),
                output=_log_of(block, number),
            )
        )
    return tasks


def _exit_code(code: str, ending: str) -> int:
    """`ExitCode=code:signal` as one number."""
    by_signal = whole(ending or "0", "scontrol show job")
    return whole(code, "scontrol show job") or (128 + by_signal if by_signal else 0)


def _log_of(block: str, number: str) -> Path:
    """The log path that Slurm shows; derived from the script for our scripts with a % in it, which Slurm expands."""
    script = re.search(r"^[ \t]*Command=(/.*)$", block, re.MULTILINE)
    if script and "%" in script[1] and script[1].endswith("/slurm/train.sbatch"):
        return Path(script[1]).parent / f"{number}.log"
    shown = re.search(r"^[ \t]*StdOut=(.*)$", block, re.MULTILINE)  # a path may contain blanks
    return Path(shown[1].strip() if shown else "")
