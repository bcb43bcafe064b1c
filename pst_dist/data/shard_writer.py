"""Writes samples as shards: checked, packed by several processes, published whole.

`data.shards` describes the directory and reads it. Equal samples give equal bytes.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pst_dist.data.pack_work import PackedShard, pack_jobs
from pst_dist.data.processes import Processes, default_workers
from pst_dist.data.row_store import StoredRows
from pst_dist.data.sample import SCHEMA_VERSION, ReasoningSample
from pst_dist.data.shard_tar import Member, ShardInfo, members_of
from pst_dist.data.shards import SHARD_NAME, SPLIT_NAME
from pst_dist.errors import DataError, InputError, StaleError
from pst_dist.logs import progress
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.leftovers import remove_leftovers, restore_replaced
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import MANIFEST, Manifest

log = logging.getLogger(__name__)
_ALONE = 20
"""Shards that are packed before processes are started."""
_OURS = re.compile(
    rf"{SHARD_NAME.pattern}|{SHARD_NAME.pattern[:-5]}\.index\.json|{SPLIT_NAME.pattern}\.wids\.json|{MANIFEST}"
)


def write_shards(
    splits: Mapping[str, Sequence[ReasoningSample]],
    directory: Path,
    *,
    samples_per_shard: int,
    fingerprint: str,
    extra: dict[str, Any],
    rebuild: bool = False,
    workers: int | None = 1,
) -> Manifest:
    """Write all splits as shards and return the manifest; does nothing when they already exist.

    `workers` is the number of processes; None chooses it.

    `fingerprint` identifies everything that determines the content. Existing shards with a different fingerprint raise
    StaleError unless `rebuild`; damaged shards with the same fingerprint are rewritten. Raises DataError for a
    duplicate id, and InputError when the directory contains files that are not part of a shard directory.
    """
    _check_splits(splits)
    _check_place(directory)
    found = None if rebuild else reusable_shards(directory, fingerprint, samples_per_shard)
    if found is not None:  # before taking the lock: finished shards may be on a read-only disk
        log.info("shards: %s is complete, nothing to do", directory)
        return found
    with directory_lock(directory.with_name(f".{directory.name}.lock")):
        behind = Path(os.path.realpath(directory))  # a link may lead to another disk
        restored = restore_replaced(behind)
        remove_leftovers(behind.parent, glob.escape(behind.name), locked=True)
        if restored and not rebuild and (found := reusable_shards(directory, fingerprint, samples_per_shard)):
            return found
        rows = sum(map(len, splits.values()))
        with (
            Artefact(directory, "shards", remembers=True).publish(fingerprint, extra) as draft,
            progress("pack", total=rows, unit="rows") as bar,
            Processes(workers or default_workers(), alone=0 if workers else _ALONE) as processes,
        ):
            partial = draft.path
            table: list[ShardInfo] = []
            for split in sorted(splits):
                packed = []
                jobs = pack_jobs(_members(splits[split]), len(splits[split]), samples_per_shard, partial, split)
                for one in processes.map(jobs):
                    packed.append(one)
                    bar.advance(one.info.samples)
                table.extend(one.info for one in packed)
                if packed:
                    _write_wids(partial, split, packed)
            draft.extra |= {
                "schema_version": SCHEMA_VERSION,
                "samples_per_shard": samples_per_shard,
                "counts": {split: len(rows) for split, rows in splits.items()},
                "shards": [asdict(info) for info in table],
            } | _synthetic_counts(splits)
    log.info("shards: %d samples in %d shards", rows, len(table))
    return draft.manifest


def _members(rows: Sequence[ReasoningSample]) -> Iterator[Member]:
    return rows.contents() if isinstance(rows, StoredRows) else members_of(rows)


def _synthetic_counts(splits: Mapping[str, Sequence[ReasoningSample]]) -> dict[str, Any]:
    found = {split: _makers(rows) for split, rows in splits.items()}
    counts = {split: sum(makers.values()) for split, makers in found.items() if makers}
    names = sorted({name for makers in found.values() for name in makers})
    return {"synthetic": {"rows": counts, "made_by": names}} if names else {}


def _makers(rows: Sequence[ReasoningSample]) -> Mapping[str, int]:
    """Model -> number of the questions that it made up."""
    if isinstance(rows, StoredRows):
        return rows.synthetic()
    return Counter(sample.synthetic for sample in rows if sample.synthetic)


def _check_splits(splits: Mapping[str, Sequence[ReasoningSample]]) -> None:
    """Ids must be unique over all splits, because embeddings and results are joined by id; stored rows have such."""
    seen: dict[str, str] = {}
    for split, samples in splits.items():
        if not SPLIT_NAME.fullmatch(split):
            raise DataError(f"split name {split!r} is not [a-z][a-z0-9_]*")
        for sample in () if isinstance(samples, StoredRows) else samples:
            if sample.id in seen:
                raise DataError(
                    f"duplicate id {sample.id!r}, in {seen[sample.id]} and {split}",
                    "give each row a unique id, or none",
                    path=sample.source or None,
                )
            seen[sample.id] = split
    if not any(map(len, splits.values())):
        raise DataError("no rows to pack into shards")


def _check_place(directory: Path) -> None:
    """Raise InputError if a directory that shards would replace contains anything else."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError("is a file, but the shards need a directory here", "choose another data_dir", path=directory)
    foreign = sorted(path.name for path in directory.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise InputError(f"{foreign[0]} is not part of a shard directory", "choose another data_dir", path=directory)


def reusable_shards(directory: Path, fingerprint: str, samples_per_shard: int) -> Manifest | None:
    """The manifest of existing shards that can be reused, or None. Takes no lock and writes nothing.

    Raises StaleError for shards of other rows or settings, and InputError if the directory contains anything else.
    """
    _check_place(directory)
    artefact = Artefact(directory, "shards", remembers=True)
    manifest = artefact.manifest()
    if manifest is None:
        return None
    same = manifest.fingerprint == fingerprint and manifest.extra.get("samples_per_shard") == samples_per_shard
    if not same:
        raise StaleError(
            "the shards were made from different rows or settings",
            "run again with --rebuild, or choose another data_dir",
            path=directory,
        )
    return artefact.finished(fingerprint)


def _write_wids(directory: Path, split: str, packed: list[PackedShard]) -> None:
    """The list of shards in the format of webdataset's indexed reader (wids)."""
    shardlist = [
        {
            "url": one.info.name,
            "nsamples": one.info.samples,
            "filesize": one.info.bytes,
            "md5sum": one.md5,
        }
        for one in packed
    ]
    listing = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": split, "shardlist": shardlist}
    write_text(directory / f"{split}.wids.json", json.dumps(listing, indent=2) + "\n")
