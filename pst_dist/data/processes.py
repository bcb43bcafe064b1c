"""Spreads work over processes of this machine: results in order, errors as raised, and no process left behind.

Reading a row takes some 30 microseconds of Python, which threads cannot share. A worker is started with a pipe at each
end rather than by `multiprocessing`, which would run a caller's script again in every worker and leaves workers waiting
when their parent is killed: here the pipe ends with the parent, and the worker with the pipe.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from pst_dist.errors import EnvironmentFault, PstError

_R = TypeVar("_R")
_SIZE = struct.Struct("<Q")
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import pst_dist.data.processes as p; p.serve()"
_MOST = 8
"""Workers by default. This process hands out rows and stores them, which keeps about six workers busy."""
_END_SECONDS = 10.0


def usable_cores() -> int:
    """Number of CPU cores that this process may use: its affinity, or the quota of its container if that is less."""
    affinity = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return affinity if quota == "max" else max(1, min(affinity, int(quota) // int(period)))
    except (OSError, ValueError):
        return affinity


def default_workers() -> int:
    """One worker for each core that this process may use, at most eight."""
    return min(_MOST, usable_cores())


class Processes:
    """Runs jobs in worker processes. A job is a callable without arguments that can be pickled."""

    def __init__(self, count: int, *, alone: int = 0) -> None:
        """With `count` 1, all jobs run in this process; otherwise the first `alone` ones, before workers are started.

        Starting a worker takes half a second, which few rows are not worth.
        """
        self._count, self._alone = count, alone
        self._workers: list[_Worker] = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end(at_once=kind is not None)
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.wait()

    def map(self, jobs: Iterable[Callable[[], _R]]) -> Iterator[_R]:
        """The results of all jobs, in their order.

        What a job raises is raised in its place, and what `jobs` raises after the results of the jobs before it. Raises
        EnvironmentFault when a worker is killed.
        """
        source = iter(jobs)
        for job in source if self._count == 1 else itertools.islice(source, self._alone):
            self._alone -= 1
            yield job()
        waiting: deque[Future[_R]] = deque()
        failure: BaseException | None = None
        ended = self._count == 1
        while True:
            while not ended and len(waiting) < 2 * self._count:
                try:
                    job = next(source)
                except StopIteration:
                    ended = True
                except Exception as error:
                    failure, ended = error, True
                else:
                    waiting.append(self._started().submit(self._ask, job))
            if not waiting:
                break
            yield waiting.popleft().result()
        if failure is not None:
            raise failure

    def _started(self) -> ThreadPoolExecutor:
        if self._threads is None:
            for _ in range(self._count):
                self._workers.append(_Worker())
                self._free.put(self._workers[-1])
            # A thread for each worker waits for its answers.
            self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="pst-rows")
        return self._threads

    def _ask(self, job: Callable[[], _R]) -> _R:
        worker = self._free.get()
        try:
            return worker.ask(job)
        finally:
            self._free.put(worker)


class _Worker:
    """One worker process and its two pipes; used by one thread at a time."""

    def __init__(self) -> None:
        # One thread of linear algebra: it multiplies nothing, and idle threads take memory.
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **os.environ}
        command = [sys.executable, "-c", _PROGRAM, json.dumps([str(place) for place in sys.path])]
        # In a session of its own Ctrl-C does not reach it, not even while it starts; the parent then ends it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )

    def ask(self, job: Callable[[], _R]) -> _R:
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = None
        with contextlib.suppress(OSError, ValueError):  # ended, or closed by `end`
            _send(self._process.stdin, pickle.dumps(job, pickle.HIGHEST_PROTOCOL))
            answer = _receive(self._process.stdout)
        if answer is None:
            raise EnvironmentFault(
                f"a process that reads or packs rows was ended ({_ending(self._process.wait())})",
                "free some memory, or set shards.workers=1",
            )
        value, error, trace = pickle.loads(answer)
        if error is not None:
            raise error from (None if isinstance(error, PstError) else RuntimeError(f"in a worker process:\n{trace}"))
        return value

    def end(self, *, at_once: bool) -> None:
        if at_once:
            self._process.kill()
        elif self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def wait(self) -> None:
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.Signals(-code).name}"


def _send(stream: BinaryIO | Any, content: bytes) -> None:
    stream.write(_SIZE.pack(len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> bytes | None:
    """The next message; None when the other side has ended."""
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    size = _SIZE.unpack(head)[0]
    content = stream.read(size)
    return content if len(content) == size else None


def serve() -> None:
    """The main function of a worker: run jobs until the parent closes the pipe or ends."""
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Keep what libraries print and read away from the pipe that carries jobs and answers.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        while (content := _receive(jobs)) is not None:
            _send(answers, _answer(content))


def _answer(content: bytes) -> bytes:
    try:
        return pickle.dumps((pickle.loads(content)(), None, ""), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            found = pickle.dumps((None, error, trace))
            pickle.loads(found)
            return found
        except Exception:  # an exception of another library that does not survive pickling
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))
