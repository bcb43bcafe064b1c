"""Runs of an experiment as tasks of a Ray cluster; all nodes must share the experiment's directory.

Ray decides where and when each task runs. When a worker or node is lost, Ray restarts its task, which resumes from the
run's newest checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.gpus import gpus_each
from pst_dist.config.run_dir import refuse_relative
from pst_dist.distributed.preemption import end_as_told, stop_requests
from pst_dist.errors import EnvironmentFault, PeerLostError, PstError, first_line
from pst_dist.experiment.spec import RayJobs, Run
from pst_dist.experiment.under_way import UnderWay
from pst_dist.experiment.workers import Tell

log = logging.getLogger(__name__)

_LOSSES = 3
_LET_GO_SECONDS = 60.0
"""How long a run waits for an earlier process of the same run to release its directory."""
_QUIET_SECONDS = 300.0


def work_on_ray(runs: Sequence[Run], jobs: RayJobs, *, keep: str, tell: Tell) -> None:
    """Do all runs; an error of one is passed to `tell` and does not stop the others.

    Raises EnvironmentFault when the cluster cannot be reached or cannot fit a single run, ConfigError for a directory
    that the nodes cannot share; PreemptedError and KeyboardInterrupt like `work_here`.
    """
    with ray_cluster(jobs.cluster) as ray, stop_requests() as told:
        if len(ray.nodes()) > 1:
            refuse_relative(runs[0].config, "Ray's workers work")
        gpus = gpus_each(jobs.num_gpus_per_run, ray.cluster_resources())
        jobs = jobs.model_copy(update={"num_gpus_per_run": gpus})
        _check_room(jobs, ray.cluster_resources())
        task = ray.remote(num_cpus=jobs.num_cpus_per_run, num_gpus=jobs.num_gpus_per_run, max_retries=_LOSSES)(_task)
        threads = max(1, int(jobs.num_cpus_per_run))
        under_way = {task.options(name=run.name).remote(run, keep, threads): run for run in runs}
        quiet, shown = 0.0, UnderWay()
        while under_way and not told.signal:
            finished, _ = ray.wait(list(under_way), num_returns=1, timeout=1.0)
            quiet = 0.0 if finished else quiet + 1.0
            if quiet and quiet % _QUIET_SECONDS == 0:
                log.info("%d runs left; `ray status` shows what they are waiting for", len(under_way))
            shown.look(under_way.values())
            for call in finished:
                tell(under_way.pop(call), _error(ray, call))
        for call in under_way:
            with contextlib.suppress(Exception):
                ray.cancel(call, force=False)
        if under_way:
            ray.wait(list(under_way), num_returns=len(under_way), timeout=_LET_GO_SECONDS)
    if told.signal:
        end_as_told(told.signal, "every run has saved")


def _check_room(jobs: RayJobs, resources: dict[str, float]) -> None:
    for name, amount in (("CPU", jobs.num_cpus_per_run), ("GPU", jobs.num_gpus_per_run or 0)):
        if amount > resources.get(name, 0):
            raise EnvironmentFault(
                f"a run needs {amount:g} {name}, but the whole cluster has {resources.get(name, 0):g}",
                f"lower ray.num_{name.lower()}s_per_run",
            )


def _error(ray: Any, call: Any) -> BaseException | None:
    try:
        ray.get(call)
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, PstError) else RuntimeError(str(error))
    except ray.exceptions.RayError as error:
        return PeerLostError(f"Ray lost it {_LOSSES + 1} times ({first_line(error, 160)})", "see Ray's logs")
    return None


def _task(run: Run, keep: str, threads: int) -> None:
    """Do a run on the node that Ray has chosen."""
    import torch

    from pst_dist.experiment.runs import do_run

    torch.set_num_threads(threads)
    do_run(run, keep, lock_seconds=_LET_GO_SECONDS)
