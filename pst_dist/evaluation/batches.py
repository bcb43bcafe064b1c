"""Batches of generation: what one process, a rank or an actor does, and the files that remember what is done.

A batch contains everything that its result depends on except the student, so its digest identifies the result. Batches
do not depend on the number of processes: several give the same answers as one, and any number can continue a killed
evaluation.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pst_dist.config.schema import EvaluateConfig
from pst_dist.data.sample import Turns
from pst_dist.errors import IntegrityError
from pst_dist.storage.atomic import write_text
from pst_dist.storage.json_files import canonical_json, read_typed
from pst_dist.storage.manifest import digest_of
from pst_dist.student.contexts import Decoded
from pst_dist.student.generate import decode_answers, decode_rationales
from pst_dist.student.saved import LoadedStudent


@dataclass(frozen=True)
class Batch:
    """Questions that are decoded together."""

    questions: list[str | Turns]
    given: list[str] | None = None
    """The rationale that each answer is taken to follow (`decode_answers`)."""
    other: bool = False
    """Whether an adaptive student thinks first."""
    answers: list[Decoded] | None = None
    """For rationales: the answer that each of them explains. None to generate answers."""

    @property
    def digest(self) -> str:
        """sha256 of everything in it, in hexadecimal."""
        return digest_of(asdict(self))


@dataclass(frozen=True)
class Outcome:
    """What was generated for one batch: a value for each question, either answers or rationales."""

    seconds: float
    """Wall time of generating it."""
    answers: list[Decoded] | None = None
    rationales: list[str] | None = None


def decode_batch(
    student: LoadedStudent,
    settings: EvaluateConfig,
    batch: Batch,
    on_token: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Generate one batch; after each token, `on_token` is called with the number of tokens of each question."""
    parts = (student.model, student.tokenizer, student.format, batch.questions)
    sizes: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "batch_tokens": settings.batch_tokens,
        "max_new_tokens": settings.max_new_tokens,
    }
    started = time.perf_counter()
    if batch.answers is not None:
        texts = decode_rationales(*parts, batch.answers, on_token=on_token, **sizes)
        return Outcome(time.perf_counter() - started, rationales=texts)
    answers = decode_answers(*parts, given=batch.given, other=batch.other, on_token=on_token, **sizes)
    return Outcome(time.perf_counter() - started, answers=answers)


@dataclass(frozen=True)
class Done:
    """Finished batches of one evaluation: a file each in `folder`, which is removed when the scores are written."""

    folder: Path

    def get(self, batch: Batch) -> Outcome | None:
        """The outcome of a batch; None when it is missing or its file is damaged."""
        path = self._path(batch)
        if not path.is_file():
            return None
        try:
            outcome = read_typed(path, Outcome)
        except IntegrityError:
            return None
        found = outcome.rationales if batch.answers is not None else outcome.answers
        return outcome if found is not None and len(found) == len(batch.questions) else None

    def put(self, batch: Batch, outcome: Outcome) -> None:
        """Keep the outcome of a batch; an outcome whose probability is not a number is not kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ValueError):
            write_text(self._path(batch), canonical_json(asdict(outcome)))

    def remove(self) -> None:
        """Forget all batches of these rows, also those decoded by another student or with other settings."""
        remove_batches(self.folder.parent)

    def _path(self, batch: Batch) -> Path:
        return self.folder / f"{batch.digest[:32]}.json"


def remove_batches(rows: Path) -> None:
    """Remove the folder of all batches of some rows, and its parent when that is empty."""
    shutil.rmtree(rows, ignore_errors=True)
    with contextlib.suppress(OSError):  # other rows are being decoded, or there is none
        rows.parent.rmdir()
