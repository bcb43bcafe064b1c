"""Runs of an experiment in processes of this machine, several at a time.

A worker loads the heavy libraries once and takes run after run. It is told to stop by SIGTERM, also by the kernel when
this process dies, and then saves at the next step boundary, as any training does. A worker that is killed is replaced
and its run given out again, which goes on from its newest checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from pst_dist.distributed.preemption import end_as_told, stop_requests
from pst_dist.errors import PeerLostError, PreemptedError, PstError
from pst_dist.experiment.spec import Run
from pst_dist.redaction import RedactingFormatter

log = logging.getLogger(__name__)
Tell = Callable[[Run, BaseException | None], None]
"""Called once for each run that has ended, with what ended it; None when it is finished."""

_LOSSES = 2
"""How often a run is given out again after its worker was lost."""
_SET_PARENT_DEATH_SIGNAL = 1


def work_here(runs: Sequence[Run], *, jobs: int | None, keep: str, tell: Tell) -> None:
    """Do all runs, `jobs` at a time; an error of one is told and does not keep the others.

    Told to stop, it raises PreemptedError (KeyboardInterrupt for SIGINT) once all workers have saved.
    """
    gpus, cores = _gpus(), len(os.sched_getaffinity(0))
    count = min(jobs or gpus or cores, len(runs))
    threads = max(1, cores // count)
    waiting = collections.deque(runs)
    losses: collections.Counter[str] = collections.Counter()
    crew: list[_Worker] = []
    with stop_requests() as told, _dismissed(crew):
        for k in range(count):
            crew.append(_Worker.start(None if not gpus else k % gpus, threads))
        while not told.signal and (waiting or any(worker.run for worker in crew)):
            for worker in crew:
                if worker.run is None and waiting:
                    worker.give(waiting.popleft(), keep)
            for place, worker in _ended(crew):
                run, error = worker.outcome()
                if isinstance(error, PeerLostError):
                    crew[place] = _Worker.start(worker.gpu, threads)
                    losses[run.name] += 1
                    if losses[run.name] <= _LOSSES:
                        log.warning("%s: %s; it goes on", run.name, error.what)
                        waiting.appendleft(run)
                        continue
                tell(run, error)
    if told.signal:
        end_as_told(told.signal, "every run has saved")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass(eq=False)
class _Worker:
    """A process and the run it is at."""

    process: Any
    pipe: Connection
    gpu: int | None
    run: Run | None = None

    @classmethod
    def start(cls, gpu: int | None, threads: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, gpu, threads, os.getpid()))
        process.start()
        theirs.close()
        return cls(process, ours, gpu)

    def give(self, run: Run, keep: str) -> None:
        self.run = run
        with contextlib.suppress(OSError):  # it has died: `outcome` says so
            self.pipe.send((run, keep))

    def outcome(self) -> tuple[Run, BaseException | None]:
        """The run that has ended and its error; PeerLostError when the process is gone."""
        run, self.run = self.run, None
        assert run is not None
        try:
            return run, self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            remedy = "look for out-of-memory; fewer jobs= at a time" if code == -signal.SIGKILL else ""
            return run, PeerLostError(f"its process was {how}", remedy)


def _ended(crew: Sequence[_Worker]) -> Iterator[tuple[int, _Worker]]:
    """Workers whose run has ended, waiting for a moment when there is none."""
    ready = wait([worker.pipe for worker in crew if worker.run is not None], timeout=0.3)
    yield from [(place, worker) for place, worker in enumerate(crew) if worker.pipe in ready and worker.run is not None]


@contextlib.contextmanager
def _dismissed(crew: list[_Worker]) -> Iterator[None]:
    """At the end of the block all workers end: those at work are told to save first."""
    try:
        yield
    finally:
        for worker in crew:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            if worker.run is not None and worker.process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGTERM)
        for worker in crew:
            worker.process.join()
            worker.pipe.close()


def _serve(pipe: Connection, gpu: int | None, threads: int, parent: int) -> None:
    """A worker's life: take a run, do it, send what came of it, until None comes or the parent is gone."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs a terminal's Ctrl-C is the parent's to answer
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if len(visible) > gpu and visible[gpu] else str(gpu)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import torch  # sees the GPU that was chosen

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        while (job := pipe.recv()) is not None:
            pipe.send(_result(*job))


def _result(run: Run, keep: str) -> BaseException | None:
    from pst_dist.experiment.runs import do_run

    for handler in logging.getLogger().handlers:  # several runs write to one terminal
        handler.setFormatter(RedactingFormatter(f"{run.name.replace('%', '%%')}: %(message)s"))
    try:
        do_run(run, keep, lock_seconds=5.0)
    except PstError as error:
        return error
    except KeyboardInterrupt:
        return PreemptedError("told to stop", "the same command goes on")
    except Exception as error:
        return RuntimeError("".join(traceback.format_exception(error)))
    return None
