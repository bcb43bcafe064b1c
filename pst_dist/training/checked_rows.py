"""Checks before the first step that every row fits the student, once for the same shards, student and layout.

A note next to the shards remembers the outcome, so that the next training need not tokenise all rows again. For
example, five seeds of one arm tokenise the same rows in the same way. The note can be deleted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pst_dist._version import __version__
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks import Task, task_of
from pst_dist.distributed.progress import alive
from pst_dist.distributed.ranks import Ranks, from_main, sums_over_ranks
from pst_dist.errors import DataError, PstError
from pst_dist.logs import progress
from pst_dist.storage.json_files import read_object
from pst_dist.storage.manifest import digest_of, write_json
from pst_dist.student.fitting import AT_ONCE, check_rows
from pst_dist.student.layout import Layout

log = logging.getLogger(__name__)

_MOST = 100
"""Notes that are kept."""


@dataclass(frozen=True)
class CheckedRows:
    """The note about one student, layout and set of shards."""

    path: Path
    what: dict[str, Any]
    """Everything that decides the outcome."""

    def read(self) -> tuple[int, str] | None:
        """(answers that the tokenizer changes, one of them), if all rows were found to fit; else None."""
        found = self._notes().get(digest_of(self.what))
        if isinstance(found, dict) and isinstance(found.get("lost"), int) and isinstance(found.get("example"), str):
            return found["lost"], found["example"]
        return None

    def write(self, lost: int, example: str) -> None:
        """Note that all rows fit, where this process may write."""
        notes = self._notes()
        notes.pop(digest_of(self.what), None)
        kept = dict(list(notes.items())[-_MOST + 1 :])
        with contextlib.suppress(PstError, OSError):
            write_json(self.path, {**kept, digest_of(self.what): {"lost": lost, "example": example}})

    def _notes(self) -> dict[str, Any]:
        try:
            return read_object(self.path)
        except PstError:
            return {}


def what_decides(
    settings: Mapping[str, Any], tokenizer: Any, *, scored: str, base: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything that decides whether a row can be trained on, of the `settings` of a training (`fingerprint`).

    `scored` is the name of the task whose scoring is used, `base` identifies the weights that the student starts from.
    """
    deciding = ("layout", "student", "arm", "task", "shards", "loss")
    own = {key: value for key, value in settings.items() if key.partition(".")[0] in deciding}
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    return {**own, "scored": scored, "base": base, "tokenizer": digest_of(vocabulary), "pst": __version__}


def check_all_rows(
    samples: Sequence[ReasoningSample], layout: Layout, task: Task, known: CheckedRows, ranks: Ranks
) -> None:
    """Lay out every row once, a stride on each rank, to refuse a row that does not fit before the first step.

    Does nothing if `known` has the outcome. Collective. Raises DataError on every rank; the rank that found the row
    names it.
    """
    failure: DataError | None = None
    found = from_main(known.read() if ranks.is_main else None)
    if found is not None:
        _warn_of_lost(*found)
        return
    lost: list[ReasoningSample] = []
    own = range(ranks.rank, len(samples), ranks.world_size)
    try:
        with progress("check rows", total=len(own), unit="rows", show=ranks.is_main) as bar:
            for start in range(0, len(own), AT_ONCE):
                alive()
                part = [samples[index] for index in own[start : start + AT_ONCE]]
                lost += check_rows(layout, part, lambda sample: task_of(sample, task))
                bar.advance(len(part))
    except DataError as error:
        failure = error
    bad = sums_over_ranks(torch.tensor([float(failure is not None), float(len(lost))], dtype=torch.float64))
    example = f"{lost[0].answer!r} of sample {lost[0].id}" if lost else ""
    _warn_of_lost(int(bad[1]), example)
    if failure is not None:
        raise failure
    if bad[0] > 0:
        raise DataError("another rank found a row that cannot be trained on", "see its message")
    if ranks.is_main:
        known.write(int(bad[1]), example)


def _warn_of_lost(count: int, example: str) -> None:
    if count:
        first = f", such as {example}" if example else ""
        log.warning("this tokenizer changes %d answers, which can never be scored correct%s", count, first)
