"""The part of Ray training that runs in Ray's processes: a rank, the desk between ranks and driver, and the watch.

A rank calls the same `train(config)` as under every launcher. Its log lines and the stop request go through the desk, a
small actor, because Ray forwards neither. The watch decides when Ray may restart the ranks: after a lost rank, but not
after an error that would only recur. The driver's side is `clusters.ray.train`; import this only after ray is set up.
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
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pst_dist._version import __version__
from pst_dist.clusters.ray.reports import Reporter
from pst_dist.config.schema import Config
from pst_dist.errors import EnvironmentFault, PeerLostError, PreemptedError, PstError
from pst_dist.text.redaction import redact

_FIRST_LOCK_SECONDS = 5.0
_LOCK_SECONDS = 120.0
"""How long a restarted rank waits for the lost rank's directory lock: a shared disk may release it only when a lease
expires."""
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
    """The driver's working directory, against which the config's other relative paths are resolved."""
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
    """An actor on the driver's node: log lines for the driver, its stop request, and whether the ranks are there."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._fresh, self._stopped = asyncio.Event(), asyncio.Event()
        self._flushed = asyncio.Event()
        self._starts, self._there = 0, False

    async def begin(self) -> int:
        """Called by rank zero when it starts; returns the number of this start, from 1."""
        self._starts, self._there = self._starts + 1, True
        self._flushed.clear()
        return self._starts

    async def lost(self) -> None:
        """Called by the watch when ranks have failed."""
        self._there = False

    async def starts(self) -> tuple[int, bool]:
        """(the number of starts, whether ranks are there now)."""
        return self._starts, self._there

    async def told_all(self) -> None:
        """Called by rank zero when Ray has its last report."""
        self._flushed.set()

    async def has_all(self) -> None:
        """Wait until Ray has rank zero's last report."""
        await self._flushed.wait()

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
        """Record that the driver was told to stop."""
        self._stopped.set()

    async def told(self) -> None:
        """Wait until the driver is told to stop."""
        await self._stopped.wait()


def desk_here() -> Any:
    """A new desk on the driver's own node, which reserves no resources there."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor_class: Any = ray.remote(Desk)
    return actor_class.options(num_cpus=0, scheduling_strategy=here).remote()


def work(loop_config: dict[str, Orders]) -> Any:
    """Run one rank in a Ray Train worker: returns a `TrainingResult`, or raises what `train` raises."""
    orders = loop_config["orders"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.environ["RANK"] != "0":  # one rank's warnings are enough
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not orders.config.train.ray.num_gpus_per_worker:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if os.path.isdir(orders.folder):  # otherwise stay in the job's copy of it, where Ray started this process
        os.chdir(orders.folder)
    if orders.version != __version__:
        raise EnvironmentFault(
            f"node {os.uname().nodename} has pst_dist {__version__}, the driver has {orders.version}",
            "install the same version on all nodes",
        )
    from pst_dist.clusters.ray.metrics import RayMetrics
    from pst_dist.distributed.preemption import StopRequest
    from pst_dist.training.trainer import train

    start, stop = 1, None
    is_main = os.environ["RANK"] == "0"
    _speak_through(orders.desk, orders.log_level if is_main else logging.WARNING)
    if is_main:
        start = ray.get(orders.desk.begin.remote())
        stop = StopRequest()
        threading.Thread(target=_listen_for_stop, args=(orders.desk, stop), daemon=True).start()
    reporter = Reporter(orders.desk, is_main=is_main)
    try:
        result = train(
            orders.config,
            rebuild=orders.rebuild and start == 1,  # a later start must keep what the lost ranks have saved
            observer=reporter.saved,
            trackers={"ray": reporter, "ray metrics": RayMetrics()},
            stop=stop,
            lock_seconds=_FIRST_LOCK_SECONDS if start == 1 else _LOCK_SECONDS,
        )
        reporter.close()
        return result
    except PreemptedError:
        reporter.close()
        raise
    except Exception as error:
        if not isinstance(error, PstError) and not may_pass(error):  # a bug: Ray would drop the traceback
            logging.getLogger("pst_dist").exception("unexpected error on rank %s", os.environ["RANK"])
        raise


def _speak_through(desk: Any, level: int) -> None:
    """Send our modules' log records at `level` and above to the driver's terminal."""

    class ToDesk(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            desk.say.remote(Line(record.levelno, record.name, redact(self.format(record))))

    ours = logging.getLogger("pst_dist")
    ours.setLevel(level)
    ours.handlers[:] = [ToDesk()]


def _listen_for_stop(desk: Any, stop: Any) -> None:
    """Set `stop` when the driver is told to stop; the other ranks learn of it at the next step."""
    ray.get(desk.told.remote())
    stop.signal = signal.SIGTERM


class Watch(UserCallback):
    """Runs in Ray's controller; ends the run at an error that a restart would only repeat.

    Raising here tells Ray not to retry; the driver receives the original error.
    """

    def __init__(self, desk: Any, max_failures: int) -> None:
        self._desk, self._max_failures, self._failures = desk, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray calls this when ranks have failed, before it decides whether to retry."""
        for _, error in sorted(worker_exceptions.items()):
            if not may_pass(error):
                raise error
        self._failures += 1
        self._desk.lost.remote()
        if self._failures <= self._max_failures:
            again = f"restart {self._failures} of {self._max_failures}; resuming from the newest valid checkpoint"
            self._desk.say.remote(Line(logging.WARNING, __name__, f"{describe(worker_exceptions)}: {again}"))


def may_pass(error: Exception) -> bool:
    """Whether a rank's error may not recur after a restart: a rank died, or a peer saw the broken connection."""
    if isinstance(error, PstError):
        return isinstance(error, PeerLostError)
    # Ray's own errors are about processes and nodes; torch reports a broken connection as a RuntimeError.
    return isinstance(error, (RuntimeError, OSError)) or type(error).__module__.startswith("ray.")


def describe(worker_exceptions: dict[int, Exception]) -> str:
    """`lost rank 1 (reason)`: the ranks that died, or those that failed when none is known to have died."""
    dead = {rank: error for rank, error in worker_exceptions.items() if type(error).__module__.startswith("ray.")}
    which = dead or worker_exceptions
    ranks = ", ".join(str(rank) for rank in sorted(which))
    why = _reason(which[min(which)])
    return f"{'lost' if dead else 'failed:'} rank{'s' if len(which) > 1 else ''} {ranks} ({why})"


def _reason(error: Exception) -> str:
    """The most informative line of Ray's message."""
    cause = getattr(error, "health_check_failure", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    cause_lines = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "killed" in line]
    return (cause_lines or lines or [type(cause).__name__])[-1 if not cause_lines else 0][:200]
