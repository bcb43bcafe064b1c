"""Runs of an experiment in processes of this machine, several at a time.

A worker loads the heavy libraries once and then does one run after another. On SIGTERM, which the kernel also sends
when this process dies, it saves at the next step boundary, like any training. A killed worker is replaced and its run
is assigned again, which resumes from its newest checkpoint.
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
from pst_dist.experiment.under_way import UnderWay
from pst_dist.text.redaction import RedactingFormatter

log = logging.getLogger(__name__)
Tell = Callable[[Run, BaseException | None], None]
"""Called once for each run that has ended, with its error or None."""

_LOSSES = 2
"""How often a run is assigned again after its worker was lost."""
_SET_PARENT_DEATH_SIGNAL = 1


def work_here(runs: Sequence[Run], *, jobs: int | None, keep: str, tell: Tell) -> None:
    """Do all runs, `jobs` at a time; an error of one is passed to `tell` and does not stop the others.

    On a stop request it raises PreemptedError (KeyboardInterrupt for SIGINT) once all workers have saved.
    """
    gpus, cores = _gpus(), len(os.sched_getaffinity(0))
    count = min(jobs or gpus or cores, len(runs))
    threads = max(1, cores // count)
    waiting = collections.deque(runs)
    losses: collections.Counter[str] = collections.Counter()
    crew: list[_Worker] = []
    under_way = UnderWay()
    with stop_requests() as told, _dismissed(crew):
        for k in range(count):
            crew.append(_Worker.start(None if not gpus else k % gpus, threads))
        while not told.signal and (waiting or any(worker.run for worker in crew)):
            for worker in crew:
                if worker.run is None and waiting:
                    worker.give(waiting.popleft(), keep)
            under_way.look(worker.run for worker in crew if worker.run is not None)
            for place, worker in _ended(crew):
                run, error = worker.outcome()
                if isinstance(error, PeerLostError):
                    crew[place] = _Worker.start(worker.gpu, threads)
                    losses[run.name] += 1
                    if losses[run.name] <= _LOSSES:
                        log.warning("%s: %s; restarting it", run.name, error.what)
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
    """A process and its current run."""

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
        with contextlib.suppress(OSError):  # the worker has died: `outcome` reports it
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
            remedy = "check for out-of-memory; use fewer jobs=" if code == -signal.SIGKILL else ""
            return run, PeerLostError(f"its process was {how}", remedy)


def _ended(crew: Sequence[_Worker]) -> Iterator[tuple[int, _Worker]]:
    """Workers whose run has ended; waits briefly when there is none."""
    ready = wait([worker.pipe for worker in crew if worker.run is not None], timeout=0.3)
    yield from [(place, worker) for place, worker in enumerate(crew) if worker.pipe in ready and worker.run is not None]


@contextlib.contextmanager
def _dismissed(crew: list[_Worker]) -> Iterator[None]:
    """Ends all workers when the block ends; those with a run are asked to save first."""
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
    """A worker's main loop: receive a run, do it, send its error or None; ends on None or when the parent is gone."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs the parent handles Ctrl-C
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if len(visible) > gpu and visible[gpu] else str(gpu)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import torch  # after CUDA_VISIBLE_DEVICES is set

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
        return PreemptedError("stopped by a signal", "the same command resumes")
    except Exception as error:
        return RuntimeError("".join(traceback.format_exception(error)))
    return None
