"""Experiment trackers that receive the metrics: TensorBoard, Weights & Biases, MLflow, Trackio, or your own.

`train.report_to` names them. Your own package can add a tracker through an entry point of the group
`pst_dist.trackers` that names a subclass of `Tracker`. Only rank zero reports. When a tracker fails, training logs one
warning with its name and continues without it. Each library is imported when it is used.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.metadata
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.config.schema_train import TRACKERS_GROUP
from pst_dist.errors import PstError, first_line
from pst_dist.storage.atomic import write_text
from pst_dist.text.redaction import redact, redact_values

log = logging.getLogger(__name__)
_PROJECT = "pst_dist"
PROMETHEUS = "prometheus"
_IDS = "trackers.json"
"""File in the run directory with this run's id in each tracker, so that a resumed training continues the same run."""


@dataclass(frozen=True)
class TrackedRun:
    """The run as trackers see it."""

    path: Path
    """The run directory; a tracker's local files go into it."""
    name: str
    first_step: int
    """Optimizer steps done before this start; 0 for a new training."""

    def known_id(self, tracker: str) -> str | None:
        """The id that an earlier start of this training has in a tracker; None for a new training."""
        return self._ids().get(tracker) if self.first_step else None

    def keep_id(self, tracker: str, value: str) -> None:
        """Store an id for the next start."""
        write_text(self.path / _IDS, json.dumps(self._ids() | {tracker: value}, sort_keys=True) + "\n")

    def _ids(self) -> dict[str, str]:
        try:
            found = json.loads((self.path / _IDS).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


class Tracker(abc.ABC):
    """One destination for metrics. An exception in any method ends the reporting, not the training."""

    @abc.abstractmethod
    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Begin, or resume after `run.first_step`; `config` is the resolved config, nested, without passwords."""

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report finite numbers of an optimizer step, counted from 1; steps never decrease."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:  # noqa: B027  optional
        """Report a distribution, such as the lengths of the sequences since the last validation."""

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027  optional
        """Report rows of text, such as sample answers; all have the same keys."""

    @abc.abstractmethod
    def finish(self, failed: bool) -> None:
        """Close the run; `failed` when an error or an interrupt ended the training."""


class TensorBoard(Tracker):
    """Event files in `RUN/tensorboard`."""

    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Open a file; hide steps after the checkpoint we resume from, since they are repeated."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=run.first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Write a histogram."""
        import numpy as np

        self._writer.add_histogram(name, np.asarray(values, dtype=np.float64), step)

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows as a table, which TensorBoard reads as Markdown."""
        self._writer.add_text(name, markdown_table(rows), step)

    def finish(self, failed: bool) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of W&B; WANDB_PROJECT, WANDB_MODE=offline and the other variables of wandb apply."""

    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Begin or resume a run; its files are in `RUN/wandb`."""
        import wandb

        # Its records of the command line and of the working directory's code could contain secrets that we redact.
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True)
        known = run.known_id("wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            dir=str(run.path),
            config=config,
            id=known,
            resume="allow" if known else None,
            settings=settings,
        )
        run.keep_id("wandb", self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of the run's history."""
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Write a histogram."""
        import wandb

        self._run.log({name: wandb.Histogram(list(values))}, step=step)

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows as a table."""
        import wandb

        columns: list[Any] = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        self._run.log({name: table}, step=step)

    def finish(self, failed: bool) -> None:
        """Send the buffered rows and close the run."""
        self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """A run of MLflow at MLFLOW_TRACKING_URI, or in `RUN/mlflow.db`; MLFLOW_EXPERIMENT_NAME names the experiment."""

    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Begin or resume a run; the config's keys become its parameters."""
        # With MLflow's defaults, an unreachable server would delay every step by minutes of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._metric = Metric
        path = run.path.absolute()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}/mlflow.db")
        known = run.known_id("mlflow")
        if known:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        run.keep_id("mlflow", self._id)
        pairs = [Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in _flat(config).items()]
        for start in range(0, len(pairs), _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=pairs[start : start + _MOST_PARAMETERS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one metric per value, in one request."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in values.items()])

    def finish(self, failed: bool) -> None:
        """Set the run's final status."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


_LONGEST_PARAMETER, _MOST_PARAMETERS = 500, 100
"""MLflow's limits: characters of a parameter value that every server accepts, and parameters per request."""


class Trackio(Tracker):
    """A run of Trackio, stored in TRACKIO_DIR; TRACKIO_PROJECT names the project."""

    def start(self, run: TrackedRun, config: dict[str, Any]) -> None:
        """Begin or resume a run of that name."""
        import trackio

        known = run.known_id("trackio")
        name = known or f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to open its dashboard
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=name,
                config=config,
                resume="allow" if known else "never",
                embed=False,
            )
        run.keep_id("trackio", name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        self._run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        """Send the buffered rows and close the run."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; line breaks and bars of a cell are spelled out."""
    columns = list(rows[0])

    def line(cells: Sequence[Any]) -> str:
        texts = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(texts)} |"

    body = [line([row[column] for column in columns]) for row in rows]
    return "\n".join([line(columns), line(["---"] * len(columns)), *body])


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Trackers:
    """All trackers of a training behind one interface; a failing tracker never ends the training."""

    def __init__(
        self, names: Sequence[str], run: TrackedRun, config: Config, own: Mapping[str, Tracker] | None = None
    ) -> None:
        """Start the trackers of these names, and those of the launcher's own, by name."""
        self._running: dict[str, Tracker] = {}
        values = redact_values(config.model_dump(mode="json"))
        for name in (*names, *(own or {})):
            try:
                tracker = own[name] if own and name in own else _load(name)
                tracker.start(run, values)
                self._running[name] = tracker
            except Exception as error:
                self._give_up(name, error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report the finite numbers among the values."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(step, numbers))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Report a distribution, if it has values."""
        if values:
            self._each(lambda tracker: tracker.histogram(step, name, values))

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report rows of text, if there are any."""
        if rows:
            self._each(lambda tracker: tracker.text(step, name, rows))

    def _each(self, report: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                report(tracker)
            except Exception as error:
                self._give_up(name, error)

    def finish(self, *, failed: bool) -> None:
        """Finish all trackers."""
        for name, tracker in list(self._running.items()):
            try:
                tracker.finish(failed)
            except Exception as error:
                self._give_up(name, error)
        self._running.clear()

    def _give_up(self, name: str, error: Exception) -> None:
        self._running.pop(name, None)
        if isinstance(error, ModuleNotFoundError) and name in (*TRACKERS, PROMETHEUS):
            extra = "train" if name == "tensorboard" else name
            reason = f"the package {error.name} is not installed: pip install 'pst-dist[{extra}]'"
        elif isinstance(error, PstError):
            reason = first_line(error, 200)
        else:
            reason = f"{type(error).__name__}: {first_line(error, 200)}"
        log.warning("tracker %s failed and receives no more metrics; training continues (%s)", name, redact(reason))


def _load(name: str) -> Tracker:
    if name in TRACKERS:
        return TRACKERS[name]()
    (point,) = importlib.metadata.entry_points(group=TRACKERS_GROUP, name=name)
    found = point.load()
    tracker = found() if isinstance(found, type) else found
    if not isinstance(tracker, Tracker):
        raise TypeError(f"{point.value} is not a pst_dist.training.trackers.Tracker")
    return tracker


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
