"""What runs inside Ray's processes while it trains: one rank, the desk between ranks and driver, and Ray's watch.

A rank calls the same `train(config)` as under every launcher. Its log lines and the request to stop go through the
desk, a small actor, because Ray passes on neither. The watch decides what Ray may try again: a lost rank, never an
error that would only come back. The driver's side is `ray_train`; imported where ray is set up already.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import Checkpoint, CheckpointUploadMode, UserCallback, report
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pst_dist._version import __version__
from pst_dist.config.schema import Config
from pst_dist.errors import EnvironmentFault, PeerLostError, PstError
from pst_dist.redaction import redact

_FIRST_LOCK_SECONDS = 5.0
_LOCK_SECONDS = 120.0
"""How long a rank that Ray started again waits for the lost one to leave the directory: a shared disk may take as long
as a lease to notice."""
_LISTEN_SECONDS = 0.5


@dataclass(frozen=True)
class Orders:
    """What the driver sends to each rank."""

    config: Config
    """With absolute output_dir and data_dir."""
    rebuild: bool
    version: str
    """The driver's pst_dist."""
    folder: str
    """The driver's working directory, by which the config's other relative paths are meant."""
    log_level: int
    desk: Any
    """Handle of the `Desk`."""


@dataclass(frozen=True)
class Line:
    """One log record on its way to the driver."""

    level: int
    name: str
    text: str


class Desk:
    """An actor beside the driver: lines for it, its request to stop, and how often the ranks were started."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._fresh, self._stopped = asyncio.Event(), asyncio.Event()
        self._starts = 0

    async def begin(self) -> int:
        """Rank zero reports itself: which start this is, from 1."""
        self._starts += 1
        return self._starts

    async def say(self, line: Line) -> None:
        """Keep a line for the driver."""
        self._lines.append(line)
        self._fresh.set()

    async def listen(self) -> list[Line]:
        """The lines since the last call; waits for the first for half a second."""
        try:
            await asyncio.wait_for(self._fresh.wait(), _LISTEN_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            return []
        lines, self._lines = self._lines, []
        self._fresh.clear()
        return lines

    async def stop(self) -> None:
        """The driver was told to stop."""
        self._stopped.set()

    async def told(self) -> None:
        """Returns when the driver was told to stop."""
        await self._stopped.wait()


def desk_here() -> Any:
    """A new desk on the driver's own node, which takes no room there."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor_class: Any = ray.remote(Desk)
    return actor_class.options(num_cpus=0, scheduling_strategy=here).remote()


def work(loop_config: dict[str, Orders]) -> Any:
    """One rank, in a worker of Ray Train: a `TrainingResult`, or the error that `train` raises."""
    orders = loop_config["orders"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if orders.config.train.ray.num_gpus_per_worker == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if os.path.isdir(orders.folder):  # otherwise a job's copy of it, in which Ray has put this process
        os.chdir(orders.folder)
    if orders.version != __version__:
        raise EnvironmentFault(
            f"node {os.uname().nodename} has pst_dist {__version__}, the driver has {orders.version}",
            "install the same version on all nodes",
        )
    from pst_dist.distributed.preemption import StopRequest
    from pst_dist.training.trainer import train

    start, stop = 1, None
    is_main = os.environ["RANK"] == "0"
    _speak_through(orders.desk, orders.log_level if is_main else logging.WARNING)
    if is_main:
        start = ray.get(orders.desk.begin.remote())
        stop = StopRequest()
        threading.Thread(target=_listen_for_stop, args=(orders.desk, stop), daemon=True).start()
    try:
        return train(
            orders.config,
            rebuild=orders.rebuild and start == 1,  # what is there now is what the lost ranks have left
            observer=_tell_ray,
            stop=stop,
            lock_seconds=_FIRST_LOCK_SECONDS if start == 1 else _LOCK_SECONDS,
        )
    except Exception as error:
        if not isinstance(error, PstError) and not may_pass(error):  # ours to mend: Ray would drop the traceback
            logging.getLogger("pst_dist").exception("unexpected error on rank %s", os.environ["RANK"])
        raise


def _speak_through(desk: Any, level: int) -> None:
    """Send what our modules log at `level` and above to the driver's terminal, beside Ray's own files."""

    class ToDesk(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            desk.say.remote(Line(record.levelno, record.name, redact(self.format(record))))

    ours = logging.getLogger("pst_dist")
    ours.setLevel(level)
    ours.handlers[:] = [ToDesk()]


def _listen_for_stop(desk: Any, stop: Any) -> None:
    """Set `stop` when the driver was told to; the other ranks learn of it at the next step."""
    ray.get(desk.told.remote())
    stop.signal = signal.SIGTERM


def _tell_ray(saved: Any) -> None:
    """Report a checkpoint to Ray by its path: it is registered where it lies, and nothing is copied."""
    metrics = {"step": saved.state.step, "total": saved.total, "loss": saved.loss, "tokens": saved.state.tokens}
    if saved.state.best_value is not None:
        metrics |= {"best_step": saved.state.best_step, "best_value": saved.state.best_value}
    report(
        metrics,
        checkpoint=Checkpoint(str(saved.path)) if os.environ["RANK"] == "0" else None,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )


class Watch(UserCallback):
    """In Ray's controller: ends the run at an error that a new start would only repeat.

    Raising here is what Ray takes for "do not try again"; the driver is given the error as it was.
    """

    def __init__(self, desk: Any, max_failures: int) -> None:
        self._desk, self._max_failures, self._failures = desk, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray calls this when ranks have failed, before it decides what to do."""
        for _, error in sorted(worker_exceptions.items()):
            if not may_pass(error):
                raise error
        self._failures += 1
        if self._failures <= self._max_failures:
            again = f"start {self._failures} of {self._max_failures} after a loss; on from the newest valid checkpoint"
            self._desk.say.remote(Line(logging.WARNING, __name__, f"{describe(worker_exceptions)}: {again}"))


def may_pass(error: Exception) -> bool:
    """Whether an error of a rank may be gone after a new start: a rank that died, or what its peers saw of that."""
    if isinstance(error, PstError):
        return isinstance(error, PeerLostError)
    # Ray's own errors are about processes and nodes; torch says a broken connection by a RuntimeError.
    return isinstance(error, (RuntimeError, OSError)) or type(error).__module__.startswith("ray.")


def describe(worker_exceptions: dict[int, Exception]) -> str:
    """`lost rank 1 (why)`: the ranks that died, or those that failed when none is known to have died."""
    dead = {rank: error for rank, error in worker_exceptions.items() if type(error).__module__.startswith("ray.")}
    which = dead or worker_exceptions
    ranks = ", ".join(str(rank) for rank in sorted(which))
    why = _reason(which[min(which)])
    return f"{'lost' if dead else 'failed:'} rank{'s' if len(which) > 1 else ''} {ranks} ({why})"


def _reason(error: Exception) -> str:
    """The first line that says something, of Ray's several."""
    cause = getattr(error, "health_check_failure", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    cause_lines = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "killed" in line]
    return (cause_lines or lines or [type(cause).__name__])[-1 if not cause_lines else 0][:200]
