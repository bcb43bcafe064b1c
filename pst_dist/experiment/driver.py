"""Runs an experiment from its file to its page; finished runs are kept, and interrupted ones resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from pst_dist.errors import PstError
from pst_dist.experiment.checks import check_runs
from pst_dist.experiment.outcomes import check_same_rows, outcomes_elsewhere
from pst_dist.experiment.results import Results, collect
from pst_dist.experiment.results_files import RESOLVED_EXPERIMENT, check_page_folder, write_results
from pst_dist.experiment.runs import make_data, refuse_other_results, result_of, unfinished
from pst_dist.experiment.spec import Experiment, Run, runs_of
from pst_dist.experiment.under_way import progress_of
from pst_dist.experiment.workers import Tell
from pst_dist.storage.atomic import write_text
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.outputs import refuse_link_out
from pst_dist.text.redaction import redact_values

log = logging.getLogger(__name__)
_PAGE_SECONDS = 30.0


def run_experiment(
    experiment: Experiment,
    command: Sequence[str],
    *,
    page: Path | None = None,
    only_collect: bool = False,
    beside: Sequence[Path] = (),
) -> tuple[Results, PstError | None]:
    """Do the missing runs and write the results; returns them, and the first error if a run failed.

    A failed run is named in the results and does not stop the others. `page` is a second folder for the page;
    `only_collect` trains nothing. Runs whose outcomes are in a folder of `beside` are taken from there unless they are
    also finished here. Raises what `check_runs`, preparing the data and `outcomes_elsewhere` raise, LockedError when
    the experiment is already running elsewhere, and PreemptedError or KeyboardInterrupt on a stop request: by then all
    runs have saved, and the results on disk include everything finished.
    """
    runs = runs_of(experiment)
    elsewhere = outcomes_elsewhere(runs, beside)
    failures: dict[str, str] = {}
    first: list[PstError] = []
    folders = [experiment.path, *([page] if page else [])]
    for folder in folders:
        check_page_folder(folder)
    with directory_lock(experiment.path):
        refuse_link_out(experiment.path / RESOLVED_EXPERIMENT, experiment.path)
        write_text(experiment.path / RESOLVED_EXPERIMENT, _dump(experiment))
        if only_collect:
            todo = []
        else:
            check_runs(unfinished(runs, elsewhere), here=experiment.backend == "local")
            make_data([run for run in runs if run.name not in elsewhere])
            check_same_rows(runs, elsewhere)  # before spending hours on runs that cannot be compared
            todo = unfinished(runs, elsewhere)  # not known before: results count only with the data they were made from
            refuse_other_results(todo)
        log.info("%d runs, %d to do", len(runs), len(todo))
        journal = _Journal(todo)

        def tell(run: Run, error: BaseException | None) -> None:
            if error is not None:
                failures[run.name] = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
                if isinstance(error, PstError):
                    first.append(error)
                else:
                    log.error("%s:\n%s", run.name, error)
                    first.append(PstError(f"{run.name} failed with an internal error", "see above"))
            journal.ended(run, error)
            if error is None and journal.page_is_due():
                # A machine that is taken away keeps what was finished by then; at the end it is written again.
                write_results(collect(experiment, runs, failures, elsewhere), command, folders)

        try:
            if todo:
                _work(experiment, todo, tell)
        finally:
            results = collect(experiment, runs, failures, elsewhere)
            write_results(results, command, folders)
    return results, first[0] if first else None


def _work(experiment: Experiment, todo: list[Run], tell: Tell) -> None:
    if experiment.backend == "ray":
        from pst_dist.experiment.on_ray import work_on_ray

        work_on_ray(todo, experiment.ray, keep=experiment.keep, tell=tell)
    else:
        from pst_dist.experiment.workers import work_here

        work_here(todo, jobs=experiment.jobs, keep=experiment.keep, tell=tell)


class _Journal:
    """Logs one line for each run that ends, with its result and the estimated time left."""

    def __init__(self, todo: Sequence[Run]) -> None:
        self._total, self._done, self._start = len(todo), 0, time.monotonic()
        self._left = {run.name: run for run in todo}
        self._before = self._begun()
        self._page = self._start

    def _begun(self) -> float:
        """How many runs the shares of those in progress add up to: with many jobs, most of what has been done."""
        return sum(progress_of(run) for run in self._left.values())

    def page_is_due(self) -> bool:
        """Whether the page was last written over half a minute ago, and runs are left."""
        now = time.monotonic()
        due = now - self._page >= _PAGE_SECONDS and self._done < self._total
        self._page = now if due else self._page
        return due

    def ended(self, run: Run, error: BaseException | None) -> None:
        self._done += 1
        self._left.pop(run.name, None)
        made = self._done + self._begun()
        each = (time.monotonic() - self._start) / max(made - self._before, 0.1)
        left = each * (self._total - made) / 60
        results = result_of(run.config) if error is None else None
        said = f"{100 * results['accuracy']:.2f} %" if results else f"failed: {error}"
        rest = f"; about {left:.0f} min left" if self._done < self._total else ""
        log.info("[%d/%d] %s: %s%s", self._done, self._total, run.name, said, rest)


def _dump(experiment: Experiment) -> str:
    values = redact_values(experiment.model_dump(mode="json"))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
