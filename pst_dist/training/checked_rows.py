"""Remembers that all rows of some shards fit a student, so that the next training need not tokenise them to check this.

For example, five seeds of one arm tokenise the same rows in the same way. The note is a file next to the shards, and
can be deleted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.errors import PstError
from pst_dist.storage.json_files import read_object
from pst_dist.storage.manifest import digest_of, write_json

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
