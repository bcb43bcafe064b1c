"""Read a teacher's completions from a separate file; they are joined to the rows by row index.

Two formats are supported: Fine-tune-CoT's `D_*.json`, and lists of raw continuations as in the Distilling step-by-step
release.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.data.sources.readers import input_of
from pst_dist.data.sources.remote import RemoteSource, bring, remote_sources
from pst_dist.data.sources.root import DataFile, SourceRoot
from pst_dist.data.sources.rows import Input
from pst_dist.errors import DataError, InputError
from pst_dist.storage.regular_files import read_with_stat
from pst_dist.text.redaction import redact

MAX_COMPLETIONS_BYTES = 4 << 30
"""A larger completion file is refused before it fills the memory."""


@dataclass(frozen=True)
class Completion:
    """What the teacher wrote for one row."""

    rationale: str
    """May be empty; a row that needs a rationale is then refused."""
    answer: str | None
    """The text that contains the teacher's answer, not normalised yet; None when it gave none."""
    question: str | None = None
    """The question that was asked, if the file has it."""


@dataclass(frozen=True)
class TeacherFile:
    """Completions by row index."""

    path: str
    by_index: dict[int, Completion]
    digests: list[tuple[str, str]]
    """File name and sha256, in the order read."""
    inputs: tuple[Input, ...]
    """The files, in the order read."""
    whole: bool
    """True when the file has exactly one completion per row, so that both counts must be equal."""


def read_completions(pattern: str, root: SourceRoot) -> TeacherFile:
    """Read data.teacher_completions: a file or a glob, relative to `root`.

    Raises InputError when no file matches, and DataError when it has neither of the known formats.
    """
    files = completion_files(pattern, root)
    bring([file for file in files if isinstance(file, RemoteSource)], root.copies)
    full = redact(str(root.place(pattern)))
    digests, values, inputs = [], [], []
    for file in files:
        with file.errors():
            opened = time.time_ns()
            raw, found = read_with_stat(file.copy, MAX_COMPLETIONS_BYTES, remedy="check data.teacher_completions")
            inputs.append(file.input(input_of(file.copy, hashlib.sha256(raw).hexdigest(), found, opened)))
            digests.append((file.copy.name, inputs[-1].sha256))
            values.append((file.where, _json(file.where, raw)))
    read = tuple(inputs)
    if all(isinstance(value, list) for _, value in values):
        texts = [text for path, value in values for text in _texts(path, value)]
        return TeacherFile(full, {index: _continuation(text) for index, text in enumerate(texts)}, digests, read, True)
    if len(values) > 1:
        raise DataError("the pattern matches several Fine-tune-CoT files", "name the one for this task", path=full)
    path, value = values[0]
    return TeacherFile(path, _fine_tune_cot(path, value), digests, read, False)


def completion_files(pattern: str, root: SourceRoot) -> list[DataFile | RemoteSource]:
    """The files of data.teacher_completions in the order in which they are read; InputError when there are none."""
    full = root.place(pattern)
    if isinstance(full, str):
        return sorted(remote_sources(full, root.copies), key=lambda file: _natural(file.where))
    paths = [full] if full.exists() else sorted(map(Path, glob.glob(str(full))), key=lambda path: _natural(str(path)))
    if not paths:
        raise InputError("no such teacher completion file", "check data.teacher_completions and data.root", path=full)
    return [DataFile(path) for path in paths]


def _natural(path: str) -> list[Any]:
    """Sort key that puts train_CoT_10 after train_CoT_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _json(path: str, raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8", path=path) from error
    except json.JSONDecodeError as error:
        raise DataError(f"column {error.colno}: not JSON: {error.msg}", path=path, line=error.lineno) from error
    except RecursionError as error:
        raise DataError("nested too deeply", path=path) from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise DataError(f"not JSON: {error}", path=path) from error


def _texts(path: str, value: list[Any]) -> list[str]:
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise DataError(f"element {place} is not text", "provide a list of raw continuations", path=path)
    return value


def _continuation(text: str) -> Completion:
    """Cut the continuation where the model starts to invent questions, then at its last "So the answer is (x)"."""
    own = text.split("\n\nQ:", 1)[0]
    rationale, found, answer = own.rpartition("So the answer is")
    letter = re.match(r"\(([a-zA-Z])\)", answer.lstrip()) if found else None
    return Completion(rationale.strip() if letter else own.strip(), letter.group(1).upper() if letter else None)


def _fine_tune_cot(path: str, value: Any) -> dict[int, Completion]:
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, dict):
        raise DataError(
            "not a completion file",
            'use Fine-tune-CoT\'s {"data": {index: [completion…]}} or a list of continuations',
            path=path,
        )
    found = {}
    for key, entries in data.items():
        try:
            # Some rows have more than one completion; the published counts and accuracies are for the first.
            first = entries[0]
            found[int(key)] = Completion(
                str(first["reasoning_completion"]).strip(), str(first["completion"]), first.get("question")
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"completion {key!r} has no reasoning_completion and completion", "check the file", path=path
            ) from error
    return found
