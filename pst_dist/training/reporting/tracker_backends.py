"""The trackers that `train.report_to` knows: TensorBoard, Weights & Biases, MLflow and Trackio.

Each library is imported when its tracker starts.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pst_dist.training.reporting.trackers import TrackedRun, Tracker

_PROJECT = "pst_dist"
_LONGEST_PARAMETER, _MOST_PARAMETERS = 500, 100
"""MLflow's limits: characters of a parameter value that every server accepts, and parameters per request."""


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

        # wandb's own records of the command line and of the code could contain secrets that are redacted elsewhere.
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


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; bars in a cell are escaped, line breaks become spaces."""
    columns = list(rows[0])

    def line(cells: Sequence[Any]) -> str:
        texts = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(texts)} |"

    body = [line([row[column] for column in columns]) for row in rows]
    return "\n".join([line(columns), line(["---"] * len(columns)), *body])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
