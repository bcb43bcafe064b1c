"""Whether the inputs of earlier shards have changed, without parsing rows.

`pst run` checks this at every start. A file with the same size and times counts as unchanged. A file with other times
is hashed, which takes seconds where parsing its rows takes an hour. A file in object storage is unchanged if its store
gives the same size and version. A dataset on the hub is identified by the fingerprint of the revision in the datasets
library's cache, and a generator by its spec.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pst_dist.config.schema import Config
from pst_dist.data.sample import SPLITS
from pst_dist.data.sources.completions import completion_files
from pst_dist.data.sources.mixture import parts_of
from pst_dist.data.sources.readers import input_of
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import Input
from pst_dist.data.sources.saved_datasets import hub_digest
from pst_dist.data.sources.specs import input_names
from pst_dist.errors import PstError
from pst_dist.storage.manifest import sha256_file
from pst_dist.storage.stored_objects import StoredObject


def unchanged(config: Config, recorded: Sequence[Input]) -> list[Input] | None:
    """The inputs that `config.data` names, if they are the `recorded` ones, with the times that they have now.

    None when one was added, removed, changed or cannot be read.
    """
    try:
        names = list(_names(config))
        if [name for name, _ in names] != [one.name for one in recorded]:
            return None
        found = []
        for one, (_, stored) in zip(recorded, names, strict=True):
            now = _now(one) if stored is None else _now_stored(one, stored)
            if now.sha256 != one.sha256:
                return None
            found.append(now)
    except (PstError, OSError):
        return None  # reading the rows says what is wrong
    return found


def _names(config: Config) -> Iterator[tuple[str, StoredObject | None]]:
    """The names of all inputs in the order of `LoadedData.inputs`, and what a store says of each that is in one."""
    for part in parts_of(config).values() if config.data.mixture else [config]:
        data, root = part.data, SourceRoot.of(part)
        for split in SPLITS:
            if getattr(data, split) is not None:
                yield from input_names(getattr(data, split), split, root)
        files = completion_files(data.teacher_completions, root) if data.teacher_completions else []
        files += [root.find(data.split_file)] if data.split_file is not None else []
        for file in files:
            yield from file.inputs()


def _now_stored(one: Input, stored: StoredObject) -> Input:
    """An input as its store has it now."""
    is_same = one.version is not None and one.version == stored.lasting_version
    return one if is_same and stored.bytes in (one.bytes, None) else replace(one, sha256="")


def _now(one: Input) -> Input:
    """An input as it is now."""
    if one.name.startswith("gen:"):
        return one
    if one.name.startswith("hf:"):
        return replace(one, sha256=hub_digest(one.name))
    path, opened = Path(one.name), time.time_ns()
    found = path.stat()
    if found.st_size != one.bytes:
        return replace(one, sha256="")
    if (found.st_mtime_ns, found.st_ctime_ns) == (one.mtime_ns, one.ctime_ns):
        return one
    return input_of(path, sha256_file(path), found, opened)
