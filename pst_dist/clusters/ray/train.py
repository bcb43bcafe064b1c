"""Training on a Ray cluster: Ray Train places the ranks, restarts them when one is lost, and registers checkpoints.

`train(config)` trains, saves and resumes in the run directory as always, so any other launcher can resume a training
started here. All nodes must see the run directory. This module is the driver's side; `clusters.ray.worker` runs on the
cluster.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pst_dist._version import __version__
from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.gpus import settled_workers
from pst_dist.clusters.ray.reports import SNAPSHOT, keep_existing
from pst_dist.clusters.ray.room import Waiting, lacking
from pst_dist.config.run_dir import check_lasting, data_settings, run_dir
from pst_dist.config.schema import Config, RayConfig, RayTrainConfig
from pst_dist.distributed.preemption import StopRequest, stop_requests
from pst_dist.errors import ConfigError, EnvironmentFault, PeerLostError, PreemptedError, PstError, first_line
from pst_dist.storage.object_store import is_url

log = logging.getLogger(__name__)

_START_SECONDS = 60
"""How long Ray waits for a group of workers to start before it tries again."""
_RAY_FILES = (SNAPSHOT, ".validate_storage_marker")
"""What Ray Train leaves in a run directory."""


def train_with_ray(config: Config, *, rebuild: bool = False) -> Any:
    """`train` on Ray workers: returns its `TrainingResult` or raises its original error.

    When a worker is lost, Ray replaces it and all ranks resume from the newest valid checkpoint, at most
    train.ray.max_failures times; after that, PeerLostError is raised. Raises ConfigError and EnvironmentFault when the
    ranks could never start. After a stop signal the ranks save at the next step, and PreemptedError (after Ctrl-C,
    KeyboardInterrupt) is raised. After a second signal, or when killed, this process ends at once and Ray ends its
    workers; earlier checkpoints remain.
    """
    if "RANK" in os.environ:
        raise ConfigError("train.backend=ray starts its own ranks", "run it without torchrun, deepspeed or srun")
    config = _on_all_nodes(config)
    asked = config.train.ray
    done = None if rebuild else _complete(config)
    if done is not None:
        return done
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # the config's relative paths refer to the current directory
    with ray_cluster(RayConfig(address=asked.address)) as ray:
        resources = ray.cluster_resources()
        asked = settled_workers(asked, resources)
        config = config.model_copy(update={"train": config.train.model_copy(update={"ray": asked})})
        check_room(asked, resources)
        gpus = asked.num_gpus_per_worker
        log.info("train: %d Ray workers of %g CPU, %d GPU", asked.num_workers, asked.num_cpus_per_worker, gpus)
        try:
            from pst_dist.clusters.ray import worker
        except ImportError as error:
            raise EnvironmentFault(
                f"ray {ray.__version__} cannot run this training ({error})", "pip install 'ray[default,train]>=2.60'"
            ) from error
        desk = worker.desk_here()
        orders = worker.Orders(config, rebuild, __version__, os.getcwd(), log.getEffectiveLevel(), desk)
        with _clean(run_dir(config).path), stop_requests() as stop:
            try:
                return _followed(ray, desk, stop, _trainer(config, orders).fit, asked)
            except PstError as error:
                if isinstance(error, PreemptedError) and stop.signal == signal.SIGINT:
                    raise KeyboardInterrupt from None
                raise


def check_room(asked: RayTrainConfig, resources: dict[str, float]) -> None:
    """Raises EnvironmentFault when the cluster has no room for the ranks and train.ray.wait_seconds is 0."""
    needs = _needs(settled_workers(asked, resources))
    ranks = asked.min_workers or asked.num_workers
    short = [name for name, each in needs.items() if each * ranks > resources.get(name, 0)]
    if short and not asked.wait_seconds:
        wanted = ", ".join(f"{each:g} {name}" for name, each in needs.items() if each)
        has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in needs)
        raise EnvironmentFault(
            f"{ranks} rank(s) of {wanted} each, but the cluster has {has}",
            "lower train.ray.num_workers, set train.ray.wait_seconds=600 on a cluster that grows"
            + (", or train.ray.num_gpus_per_worker=0 to train on CPUs" if "GPU" in short else ""),
        )


def _needs(asked: RayTrainConfig) -> dict[str, float]:
    """What one rank needs, by Ray's names."""
    return {"CPU": asked.num_cpus_per_worker, "GPU": float(asked.num_gpus_per_worker or 0)}


def _on_all_nodes(config: Config) -> Config:
    """The config with absolute folders."""
    check_lasting(config)
    folders = {"output_dir": config.output_dir, **data_settings(config)}
    return config.model_copy(
        update={key: where if is_url(where) else str(Path(where).absolute()) for key, where in folders.items()}
    )


def _complete(config: Config) -> Any:
    """The result of a training that is already complete, which needs no workers."""
    from pst_dist.training.result import complete_training

    done = complete_training(config, config.train.ray.num_workers)
    if done is not None:
        log.info("training is complete: %d steps, nothing to do", done.steps)
    return done


def _trainer(config: Config, orders: Any) -> Any:
    """Ray's trainer for these orders; it uses our run directory, so that our checkpoints are registered in place."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from pst_dist.clusters.ray.worker import Watch, work
    from pst_dist.distributed.ranks import SLOWER_THAN_THE_WATCH_SECONDS

    api: Any = ray.train  # which of its two API versions the names mean is decided at import
    asked, path = config.train.ray, run_dir(config).path
    gpus = asked.num_gpus_per_worker or 0
    patience = int(config.train.timeout_seconds + SLOWER_THAN_THE_WATCH_SECONDS)
    ranks = asked.num_workers if asked.min_workers is None else (asked.min_workers, asked.num_workers)
    return TorchTrainer(
        work,
        train_loop_config={"orders": orders},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=patience),
        scaling_config=api.ScalingConfig(
            num_workers=ranks,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": asked.num_cpus_per_worker, **({"GPU": gpus} if gpus else {})},
            placement_strategy=asked.placement_strategy,
            elastic_resize_monitor_interval_s=asked.resize_seconds,
        ),
        run_config=api.RunConfig(
            name=path.name,
            storage_path=str(path.parent),
            failure_config=api.FailureConfig(
                max_failures=asked.max_failures,
                # Without a limit Ray would wait for room forever.
                controller_failure_limit=max(1, asked.wait_seconds // _START_SECONDS),
            ),
            callbacks=[Watch(orders.desk, asked.max_failures)],
            # Ray logs to its own files; our lines arrive through the desk.
            logging_config=api.LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _followed(ray: Any, desk: Any, stop: StopRequest, fit: Callable[[], Any], asked: RayTrainConfig) -> Any:
    """Run `fit` in a thread, where Ray installs no signal handlers; log the ranks' lines and forward a stop request.

    While no ranks are there, it says for what they wait, and gives up after train.ray.wait_seconds.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:
            outcome.append(error)

    # A daemon thread: when its cluster is gone, it might never return.
    threading.Thread(target=run, name="ray-train", daemon=True).start()
    passed_on = False
    absence = _Absence(ray, desk, asked)
    while True:
        done = bool(outcome)  # checked before reading lines, so that the last ones are not lost
        try:
            lines = ray.get(desk.listen.remote())
            if not done:
                absence.look()
        except ray.exceptions.RayError as error:
            raise PeerLostError(
                f"the Ray cluster is gone ({first_line(error, 200)})", "run the same command again to resume"
            ) from None
        for line in lines:
            logging.getLogger(line.name).log(line.level, "%s", line.text)
        if done:
            break
        if stop.signal and not passed_on:
            passed_on = True
            desk.stop.remote()
    (result,) = outcome
    if isinstance(result, BaseException):
        raise _in_our_words(ray, result) from None
    return result.return_value


class _Absence:
    """The time without ranks: before they start, and after one is lost."""

    def __init__(self, ray: Any, desk: Any, asked: RayTrainConfig) -> None:
        self._ray, self._desk, self._asked = ray, desk, asked
        self._waiting = Waiting(lambda words: log.info("train: waiting: %s", words))
        self._was_there = False
        self._short_since: float | None = None

    def look(self) -> None:
        """Say for what the ranks wait; raises EnvironmentFault when there is no room for too long.

        After a loss that is a PeerLostError. Ray itself gives up on a fixed number of ranks, and never on a range.
        """
        starts, there = self._ray.get(self._desk.starts.remote())
        if there or self._was_there:
            self._was_there, self._short_since = there, None
            self._waiting.begin()
            return
        self._waiting.look(self._reason)
        most = max(_START_SECONDS, self._asked.wait_seconds) + _START_SECONDS / 2
        if self._short_since is not None and time.monotonic() - self._short_since > most:
            error = PeerLostError if starts else EnvironmentFault
            raise error(
                f"no room for the ranks for {most:.0f} s: {self._reason()}",
                "train.ray.wait_seconds sets how long to wait; the same command resumes",
            )

    def _reason(self) -> str:
        count = self._asked.min_workers or self._asked.num_workers
        needs = {name: amount * count for name, amount in _needs(self._asked).items()}
        what = f"{count} rank{'s' if count > 1 else ''}"
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        short = None if self._are_placed(count) else lacking(what, needs, total, free)
        if short is None:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = time.monotonic()
        return short or "the ranks are starting"

    def _are_placed(self, least: int) -> bool:
        """Whether Ray has reserved room for at least so many ranks like ours; then that is no longer free."""
        each = {name: amount for name, amount in _needs(self._asked).items() if amount}
        groups = [
            (group["state"], len(group["bundles"]))
            for group in self._ray.util.placement_group_table().values()
            if all(each.items() <= bundle.items() for bundle in group["bundles"].values())
        ]
        waits = any(state == "PENDING" for state, _ in groups)
        return not waits and any(state == "CREATED" and count >= least for state, count in groups)


def _in_our_words(ray: Any, error: BaseException) -> BaseException:
    """The PstError for a failed training; any other error is a bug of ours and returned unchanged."""
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2.api.exceptions import PreemptionError

    from pst_dist.clusters.ray.worker import describe, may_pass

    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if "Startup" in type(cause).__name__:
            return EnvironmentFault(
                f"Ray could not start the ranks ({first_line(cause, 200)})",
                "`ray status` shows which resources are missing; train.ray.wait_seconds sets how long to wait for room",
            )
        return cause
    if isinstance(error, WorkerGroupError):
        others = [failure for failure in error.worker_failures.values() if not may_pass(failure)]
        if others:
            return others[0]
        return PeerLostError(
            f"{describe(error.worker_failures)}, more often than train.ray.max_failures allows",
            "look for out-of-memory errors in Ray's logs; the same command resumes from the newest valid checkpoint",
        )
    if isinstance(error, (PreemptionError, ray.exceptions.RayError)):
        return PeerLostError(
            f"Ray ended the training ({first_line(error, 200)})", "run the same command again to resume"
        )
    return error


@contextmanager
def _clean(path: Path) -> Iterator[None]:
    """Remove Ray's own files from the run directory before the block; afterwards its list holds what exists.

    Otherwise Ray would refuse a run from which we have removed older checkpoints, and so would its Result.
    """
    for name in _RAY_FILES:
        (path / name).unlink(missing_ok=True)
    try:
        yield
    finally:
        (path / _RAY_FILES[1]).unlink(missing_ok=True)
        keep_existing(path)
