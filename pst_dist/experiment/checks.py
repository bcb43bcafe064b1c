"""Checks of all runs before the first one, so that a mistake in the last variant is found now and not after hours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from pst_dist.data.tasks.registry import get_task
from pst_dist.diagnostics.preflight import check_split, preflight
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import PstError
from pst_dist.experiment.spec import Run
from pst_dist.storage.manifest import digest_of

_UNCHECKED = {"output_dir", "data_dir", "seed", "arm", "arms", "data", "task"}
"""Sections and keys on which the checks of student, encoder and training do not depend, or not one by one."""


def check_runs(runs: Sequence[Run], *, here: bool) -> None:
    """Raise the error with which one of the runs would fail, if it can be detected now, naming it; writes nothing.

    `here`: the runs are done on this machine, so that students, encoders and precision are checked too, as `preflight`
    does. The nodes of a Ray cluster may have what this machine lacks.
    """
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        config = run.config
        with _naming(run):
            get_task(config.task, config.data.answer_type)
            check_split(config)
        settings = digest_of(config.model_dump(mode="json", exclude=_UNCHECKED))
        groups.setdefault((settings, needs_embeddings(config)), []).append(run)
    for group in groups.values() if here else ():
        # All arms in one call: reading the tokenizer of a large model takes a second.
        arms = list(dict.fromkeys(run.config.arm for run in group))
        with _naming(group[0]):
            preflight(group[0].config.model_copy(update={"arms": arms} if len(arms) > 1 else {}))


@contextlib.contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except PstError as error:
        error.what = f"task {run.task}, variant {run.variant}: {error.what}"
        raise
