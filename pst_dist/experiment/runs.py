"""One run of an experiment: preparing its data, doing it, and checking whether it is done.

It consists of the stages of `pst run`, each of which skips itself when complete; this module chains them so that many
runs can proceed at the same time.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pst_dist.config.keys import flat_keys
from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import recorded, run_dir
from pst_dist.config.schema import Config
from pst_dist.distributed.preemption import StopRequest
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import DataError, PstError, StaleError
from pst_dist.evaluation.evaluate import SAMPLES, finished_evaluation
from pst_dist.experiment.spec import Run
from pst_dist.pipeline import make_embeddings, make_shards
from pst_dist.storage.atomic import atomic_directory, atomic_path, remove_directory
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import read_manifest
from pst_dist.storage.outputs import refuse_foreign_folder, refuse_link_out
from pst_dist.training.begun import with_auto_of
from pst_dist.training.fingerprint import differing

log = logging.getLogger(__name__)


def make_data(runs: Sequence[Run]) -> None:
    """Make the shards and embeddings of all runs, each once; raises what those stages raise, naming the task.

    Also raises DataError when there are no rows to score.
    """
    done: set[tuple[str | None, bool]] = set()
    for run in sorted(runs, key=lambda run: needs_embeddings(run.config)):
        wants = needs_embeddings(run.config)
        try:
            if (run.config.data_dir, False) not in done:
                counts = make_shards(run.config).extra["counts"]
                split = run.config.evaluate.split
                if not counts.get(split):
                    raise DataError(f"there are no {split} rows to score", f"set data.{split} or data.{split}_size")
            if wants and (run.config.data_dir, True) not in done:
                make_embeddings(run.config)
        except PstError as error:
            error.what = f"task {run.task}: {error.what}"
            if isinstance(error, StaleError):  # not by --rebuild, which an experiment does not have
                error.remedy = f"restore them, choose another output_dir, or delete {run.config.data_dir}"
            raise
        done |= {(run.config.data_dir, False), (run.config.data_dir, wants)}


def do_run(run: Run, keep: str, *, stop: StopRequest | None = None, lock_seconds: float = 0.0) -> None:
    """Train and score one run, resuming if it was started before, and remove what `keep` does not name.

    Reuses the student of an earlier run with the same training settings.
    """
    from pst_dist.evaluation.evaluate import evaluate
    from pst_dist.training.trainer import train

    config, own = run.config, run_dir(run.config)
    with recorded(config, wait_seconds=lock_seconds):
        with directory_lock(own.path, wait_seconds=lock_seconds):
            _take_over(run)
        train(config, stop=stop, lock_seconds=lock_seconds)
    evaluate(config)
    unwanted = {own.checkpoints: "checkpoints", own.best: "student"} if keep == "results" else {}
    unwanted |= {own.checkpoints: "checkpoints"} if keep == "student" else {}
    for folder, kind in unwanted.items():
        refuse_foreign_folder(folder, kind)
        remove_directory(folder)


def _take_over(run: Run) -> None:
    """Copy a finished training with the same settings, unless this run has started its own."""
    from pst_dist.training.result import complete_training

    own = run_dir(run.config)
    if own.training.is_file() or own.checkpoints.is_dir():
        return
    for folder in run.alike:
        other = run.config.model_copy(update={"output_dir": folder})
        done = complete_training(other, world_size=1)
        if done is not None:
            theirs = run_dir(other)
            refuse_foreign_folder(own.best, "student")
            with atomic_directory(own.best) as partial:
                shutil.copytree(theirs.best, partial, dirs_exist_ok=True)
            for name in (own.metrics.name, own.training.name):  # the record last: it marks the copy as complete
                refuse_link_out(own.path / name, own.path)
                with atomic_path(own.path / name) as file:
                    shutil.copyfile(theirs.path / name, file)
            log.info("%s: reusing the student of %s, which has the same training settings", run.name, folder)
            return


def result_of(config: Config) -> dict[str, Any] | None:
    """The results of a run that is finished with exactly this config and the current data; None otherwise.

    Raises IntegrityError for damaged results.
    """
    run = run_dir(config)
    try:
        same = placeless(with_auto_of(load_config(str(run.path)), config)) == placeless(config)
    except PstError:  # no run, or one of another version
        return None
    results = finished_evaluation(run.evaluation(config.evaluate.split)) if same else None
    shards = read_manifest(run.shards, "shards")
    return results if results and shards and results["shards"] == shards.digest else None


def unfinished(runs: Sequence[Run], elsewhere: Collection[str]) -> list[Run]:
    """The runs without results, here or by their names `elsewhere`; raises what `result_of` raises."""
    return [run for run in runs if run.name not in elsewhere and result_of(run.config) is None]


def refuse_other_results(runs: Sequence[Run]) -> None:
    """Raise StaleError if one of these runs would train again over finished results that have other settings or rows.

    A run whose student or checkpoints are kept decides by itself: an evaluation with other settings scores the same
    student, and `train` refuses to replace one. With `keep=results` only the results are left, and training again would
    silently overwrite hours of work. `runs` are unfinished.
    """
    found = [(run, changes) for run in runs if (changes := _changes_since(run.config))]
    if not found:
        return
    run, (saved, wanted) = found[0]
    others = f", as in {len(found) - 1} more" if len(found) > 1 else ""
    raise StaleError(
        f"{run.name} is finished with {saved}, this experiment has {wanted}{others}",
        "restore it, choose another output_dir, or delete the folder of a run to train it again",
        path=run_dir(run.config).path,
    )


def _changes_since(config: Config) -> tuple[str, str] | None:
    """What differs from the results of a run of which nothing else is left; None if nothing would be lost."""
    run = run_dir(config)
    if run.checkpoints.is_dir() or run.best.is_dir():
        return None
    if finished_evaluation(run.evaluation(config.evaluate.split)) is None:
        return None
    try:
        recorded = with_auto_of(load_config(str(run.path)), config)
    except PstError:
        return "settings that this version cannot read", "its own"
    saved, wanted = differing(*(flat_keys(placeless(one).model_dump(mode="json")) for one in (recorded, config)))
    if saved:
        return saved, wanted
    return ("other rows", "new ones") if run.shards.is_dir() else None


def placeless(config: Config) -> Config:
    """A config without its folders: an experiment may be moved, and its runs may be done on several machines.

    What is in the data's folder counts by its digest.
    """
    data = config.data.model_copy(update={"root": None})
    places = {"output_dir": Config().output_dir, "data_dir": None, "data_cache": None, "data": data}
    return config.model_copy(update=places)


def samples_of(config: Config) -> Path:
    """The scored rows of a finished run."""
    return run_dir(config).evaluation(config.evaluate.split) / SAMPLES
