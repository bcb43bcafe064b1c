"""Reports to Ray Train: the metrics of every logged step, and each checkpoint by its path.

Ray accepts one report per rank each time it polls (every two seconds, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S), and a report
is a barrier of all ranks. So each rank reports from a thread, and no step waits. Rank zero decides what is reported;
the other ranks join every report that it makes.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pst_dist.storage.atomic import write_text
from pst_dist.training.reporting.trackers import TrackedRun, Tracker

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray's list of checkpoints in a run directory, from which `ray.train.Result.from_path` makes a Result."""
_FLUSH_SECONDS = 30.0


class Reporter(Tracker):
    """The thread of one rank; on rank zero also a tracker of metrics and an observer of checkpoints."""

    def __init__(self, desk: Any, *, is_main: bool) -> None:
        self._desk, self._is_main = desk, is_main
        self._waiting: deque[tuple[dict[str, Any], str | None]] = deque()
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._tell if is_main else self._join, name="ray-reports", daemon=True)
        self._thread.start()

    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Nothing: Ray knows the run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report the metrics of a step soon."""
        self._put({"step": step, **values}, None)

    def finish(self, failed: bool) -> None:
        """Nothing: a checkpoint may still follow; see `close`."""

    def saved(self, saved: Any) -> None:
        """Report a checkpoint (a `training.checkpoints.saver.Saved`) by its path soon; called on every rank."""
        metrics = {"step": saved.state.step, "total": saved.total, "loss": saved.loss, "tokens": saved.state.tokens}
        if saved.state.best_value is not None:
            metrics |= {"best_step": saved.state.best_step, "best_value": saved.state.best_value}
        self._put(metrics, str(saved.path))

    def close(self) -> None:
        """Wait until Ray has everything, at most half a minute; all ranks call it, after the last step."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            if self._is_main:
                with self._news:
                    self._closed = True
                    self._news.notify()
                self._thread.join(_FLUSH_SECONDS)
                ray.get(self._desk.told_all.remote(), timeout=_FLUSH_SECONDS)
            else:  # a rank that left would end the others' last report
                ray.get(self._desk.has_all.remote(), timeout=_FLUSH_SECONDS)

    def _put(self, metrics: dict[str, Any], checkpoint: str | None) -> None:
        if self._is_main:
            with self._news:
                self._waiting.append((metrics, checkpoint))
                self._news.notify()

    def _tell(self) -> None:
        """Rank zero: report what waits. Steps logged since Ray last looked go out together, newest first."""
        from ray.train import Checkpoint

        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                metrics, path = self._waiting.popleft()
                earlier = []
                while path is None and self._waiting and self._waiting[0][1] is None:
                    earlier.append(metrics)
                    metrics, _ = self._waiting.popleft()
            if not _report({**metrics, **({"earlier": earlier} if earlier else {})}, path and Checkpoint(path)):
                return

    def _join(self) -> None:
        """Another rank: join every report."""
        while _report({}, None):
            pass


def _report(metrics: dict[str, Any], checkpoint: Any) -> bool:
    """Report to Ray, which registers the checkpoint in place and copies nothing; whether Ray accepted the report."""
    from ray.train import CheckpointUploadMode, report

    try:
        report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
    except Exception:  # the group of ranks is being ended, and what ended it is reported by the ranks themselves
        return False
    return True


def keep_existing(run: Path) -> None:
    """Leave only checkpoints that exist in Ray's list; without any, remove the list.

    Ray adds to its list and knows nothing of those that we have removed since (train.save_total_limit); it refuses a
    list with a missing checkpoint. A list that cannot be read is removed too.
    """
    path = run / SNAPSHOT
    if not path.is_file():
        return
    try:
        listed = json.loads(path.read_text("utf-8"))
        pairs = zip(listed["checkpoint_results"], listed["checkpoint_report_indices"], strict=True)
        # A checkpoint that ranks saved again after a restart is listed twice; the later one is what lies there.
        found = {one["checkpoint_dir_name"]: (one, index) for one, index in pairs}
        kept = [pair for name, pair in found.items() if (run / name).is_dir()]
        kept.sort(key=lambda pair: pair[1])
    except (ValueError, KeyError, TypeError, RecursionError):
        kept = []
    if not kept:
        path.unlink()
        return
    listed["checkpoint_results"] = [one for one, _ in kept]
    listed["checkpoint_report_indices"] = [index for _, index in kept]
    listed["latest_checkpoint_result"] = kept[-1][0]
    write_text(path, json.dumps(listed))
