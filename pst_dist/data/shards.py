"""Samples on disk: webdataset tars with an offset index, written whole or not at all and read by seek.

A shard directory holds `<split>-000000.tar` (one `<id>.json` a sample), `<split>-000000.index.json` (where each
sample lies), `<split>.wids.json` (the list of shards in webdataset's own form) and, last, `manifest.json`. Equal
samples give equal bytes. Which rows become samples is `sources`; what is computed from them is `embeddings`.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

from pst_dist.data.sample import SCHEMA_VERSION, ReasoningSample
from pst_dist.data.shard_tar import REMAKE, ShardIndex, ShardInfo, parse_sample, read_shard, write_shard
from pst_dist.errors import DataError, InputError, IntegrityError, StaleError
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.json_files import canonical_json, read_json, typed
from pst_dist.storage.leftovers import remove_leftovers, restore_replaced
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import MANIFEST, Manifest, sha256_file

log = logging.getLogger(__name__)

__all__ = ["ShardIndex", "ShardInfo", "ShardSet", "SplitReader", "read_shard", "reusable_shards", "write_shards"]

_SPLIT = re.compile(r"[a-z][a-z0-9_]{0,40}")
_SHARD = re.compile(r"[a-z][a-z0-9_]{0,40}-\d{6}\.tar")
_OURS = re.compile(rf"{_SHARD.pattern}|{_SHARD.pattern[:-5]}\.index\.json|{_SPLIT.pattern}\.wids\.json|{MANIFEST}")


def write_shards(
    splits: dict[str, list[ReasoningSample]],
    directory: Path,
    *,
    samples_per_shard: int,
    fingerprint: str,
    extra: dict[str, Any],
    rebuild: bool = False,
) -> Manifest:
    """Write all splits as shards and return the manifest; a no-op when they are there already.

    `fingerprint` stands for everything that decides the content. Shards with another one are refused with
    StaleError unless `rebuild`; damaged ones with the same one are written again. Raises DataError for an id
    that stands twice and InputError when the directory holds files that no shard writer made.
    """
    _check_splits(splits)
    _check_place(directory)
    found = None if rebuild else reusable_shards(directory, fingerprint, samples_per_shard)
    if found is not None:  # before the lock: finished shards may lie where nobody may write
        log.info("shards: %s is complete, nothing to do", directory)
        return found
    with directory_lock(directory.with_name(f".{directory.name}.lock")):
        behind = Path(os.path.realpath(directory))  # a link may lead to another disk
        restored = restore_replaced(behind)
        remove_leftovers(behind.parent, glob.escape(behind.name), locked=True)
        if restored and not rebuild and (found := reusable_shards(directory, fingerprint, samples_per_shard)):
            return found
        with Artefact(directory, "shards").publish(fingerprint, extra) as draft:
            partial = draft.path
            table: list[ShardInfo] = []
            for split in sorted(splits):
                infos = []
                for number, start in enumerate(range(0, len(splits[split]), samples_per_shard)):
                    path = partial / f"{split}-{number:06d}.tar"
                    index = write_shard(path, splits[split][start : start + samples_per_shard])
                    write_text(path.with_suffix(".index.json"), canonical_json(asdict(index)) + "\n")
                    size, digest, texts = path.stat().st_size, sha256_file(path), sum(index.rationales)
                    infos.append(ShardInfo(path.name, split, len(index.ids), size, digest, texts))
                table.extend(infos)
                if infos:
                    _write_wids(partial, split, infos)
            draft.extra |= {
                "schema_version": SCHEMA_VERSION,
                "samples_per_shard": samples_per_shard,
                "counts": {split: len(rows) for split, rows in splits.items()},
                "shards": [asdict(info) for info in table],
            }
    log.info("shards: %d samples in %d shards", sum(map(len, splits.values())), len(table))
    return draft.manifest


def _check_splits(splits: dict[str, list[ReasoningSample]]) -> None:
    """An id is one sample's in all splits together: embeddings and results are joined by it."""
    seen: dict[str, str] = {}
    for split, samples in splits.items():
        if not _SPLIT.fullmatch(split):
            raise DataError(f"split name {split!r} is not [a-z][a-z0-9_]*")
        for sample in samples:
            if sample.id in seen:
                raise DataError(
                    f"id {sample.id!r} stands twice, in {seen[sample.id]} and {split}",
                    "give each row an id of its own, or none",
                    path=sample.source or None,
                )
            seen[sample.id] = split
    if not seen:
        raise DataError("no rows to pack into shards")


def _check_place(directory: Path) -> None:
    """Raises InputError when a directory that shards would replace holds anything else."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError("is a file where shards should go", "choose another data_dir", path=directory)
    foreign = sorted(path.name for path in directory.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise InputError(f"{foreign[0]} is not part of a shard directory", "choose another data_dir", path=directory)


def reusable_shards(directory: Path, fingerprint: str, samples_per_shard: int) -> Manifest | None:
    """The manifest of shards that need not be written again, or None; takes no lock and writes nothing.

    Raises StaleError for shards of other rows or settings and InputError when the directory holds anything else.
    """
    _check_place(directory)
    artefact = Artefact(directory, "shards")
    manifest = artefact.manifest()
    if manifest is None:
        return None
    same = manifest.fingerprint == fingerprint and manifest.extra.get("samples_per_shard") == samples_per_shard
    if not same:
        raise StaleError(
            "shards were made from other rows or settings",
            "run again with --rebuild, or choose another data_dir",
            path=directory,
        )
    return artefact.finished(fingerprint)


def _write_wids(directory: Path, split: str, infos: list[ShardInfo]) -> None:
    """The list of shards as webdataset's indexed reader (wids) wants it."""
    shardlist = [
        {
            "url": info.name,
            "nsamples": info.samples,
            "filesize": info.bytes,
            "md5sum": hashlib.md5((directory / info.name).read_bytes(), usedforsecurity=False).hexdigest(),
        }
        for info in infos
    ]
    listing = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": split, "shardlist": shardlist}
    write_text(directory / f"{split}.wids.json", json.dumps(listing, indent=2) + "\n")


class ShardSet:
    """A finished shard directory, opened for reading."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        missing = [key for key in ("shards", "counts", "schema_version") if key not in manifest.extra]
        if missing:
            raise IntegrityError(f"the manifest lacks {missing[0]}", REMAKE, path=directory)
        self._table = typed(manifest.extra["shards"], list[ShardInfo], directory / MANIFEST, REMAKE)
        self._counts = typed(manifest.extra["counts"], dict[str, int], directory / MANIFEST, REMAKE)
        version = manifest.extra["schema_version"]
        if version != SCHEMA_VERSION:
            raise StaleError(f"shards of schema {version}, this is {SCHEMA_VERSION}", REMAKE, path=directory)
        for info in self._table:  # each name becomes a path, here and beside the embeddings
            promised = manifest.files.get(info.name, {})
            if not _SHARD.fullmatch(info.name) or promised.get("sha256") != info.sha256:
                raise IntegrityError(f"shard table and file list differ on {info.name[:80]!r}", REMAKE, path=directory)
        self._indexes: dict[str, ShardIndex] = {}
        self.stamps: dict[str, tuple[int, int]] = {}
        """(bytes, mtime in ns) of each tar when it was opened, so that a later reader notices an exchanged file."""

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> ShardSet:
        """Open, comparing every file with the manifest unless not `verify`.

        Raises InputError when there are no finished shards and IntegrityError when they are damaged.
        """
        artefact = Artefact(directory, "shards")
        manifest = artefact.manifest()
        if manifest is None:
            raise InputError("no finished shards here", "run `pst shard` first", path=directory)
        shard_set = cls(directory, manifest)
        for info in shard_set.shards():
            shard_set.stamps[info.name] = _stamp(directory / info.name)
        if verify:
            artefact.verified()
        return shard_set

    def shards(self, split: str | None = None) -> list[ShardInfo]:
        """The shards of one split, or of all, in their order."""
        return [info for info in self._table if split is None or info.split == split]

    def index(self, shard: ShardInfo) -> ShardIndex:
        """The offset index of one shard; read once."""
        if shard.name not in self._indexes:
            path = self.directory / f"{shard.stem}.index.json"
            index = typed(read_json(path), ShardIndex, path, REMAKE)
            lengths = {len(column) for column in (index.ids, index.offsets, index.sizes, index.rationales)}
            if lengths != {shard.samples}:
                raise IntegrityError(f"index is not of {shard.samples} samples", REMAKE, path=path)
            size, _ = self.stamps.get(shard.name) or _stamp(self.directory / shard.name)
            places = zip(index.offsets, index.sizes, strict=True)
            # A read of as many bytes as the index says allocates them first, however small the tar is.
            inside = all(0 <= length <= size - start <= size for start, length in places)
            if not inside or min(index.rationales, default=0) < 0:
                raise IntegrityError(f"index points outside its tar of {size} bytes", REMAKE, path=path)
            self._indexes[shard.name] = index
        return self._indexes[shard.name]

    def rationale_count(self, shard: ShardInfo) -> int:
        """How many rationales a shard has; from its index when the shards are older than that column."""
        return sum(self.index(shard).rationales) if shard.rationales is None else shard.rationales

    def rationale_keys(self, shard: ShardInfo) -> list[tuple[str, int]]:
        """(sample id, rationale index) of every rationale in a shard, in order."""
        index = self.index(shard)
        return [(key, k) for key, count in zip(index.ids, index.rationales, strict=True) for k in range(count)]

    def split(self, name: str) -> SplitReader:
        """The samples of one split; empty when the split is known but has no rows, InputError when unknown."""
        if name not in self._counts:
            raise InputError(f"no split {name!r}", f"there are {', '.join(sorted(self._counts))}", path=self.directory)
        return SplitReader(self, name)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise IntegrityError(f"cannot read: {error.strerror}", "run `pst shard` again", path=path) from error
    return status.st_size, status.st_mtime_ns


class SplitReader(Sequence[ReasoningSample]):
    """The samples of one split by position; each access is one positioned read, safe after a fork.

    Raises IntegrityError when a tar is missing, was exchanged since the set was opened, or holds something else
    where its index says that a sample lies. Threads need a reader each.
    """

    _MOST_OPEN = 256

    def __init__(self, shards: ShardSet, split: str) -> None:
        self._infos = shards.shards(split)
        self._paths = [shards.directory / info.name for info in self._infos]
        self._indexes = [shards.index(info) for info in self._infos]
        self._stamps = [shards.stamps[info.name] for info in self._infos]
        self._starts = [0, *itertools.accumulate(info.samples for info in self._infos)]
        self._open: dict[int, int] = {}
        self.ids: list[str] = [key for index in self._indexes for key in index.ids]
        """All ids in order."""

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, i: int) -> ReasoningSample: ...
    @overload
    def __getitem__(self, i: slice) -> list[ReasoningSample]: ...
    def __getitem__(self, i: int | slice) -> ReasoningSample | list[ReasoningSample]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        shard, row = self._locate(i)
        index = self._indexes[shard]
        content = os.pread(self._descriptor(shard), index.sizes[row], index.offsets[row])
        return parse_sample(content, f"{self._paths[shard]}!{index.ids[row]}.json", f"{index.ids[row]}.json")

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def _descriptor(self, shard: int) -> int:
        """An open file a shard, the longest open one closed when there are too many."""
        if shard not in self._open:
            if len(self._open) >= self._MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path = self._paths[shard]
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise IntegrityError(f"cannot read: {error.strerror}", "run `pst shard` again", path=path) from error
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != self._stamps[shard]:
                os.close(descriptor)  # never kept: a caller that tries again must be refused again
                raise IntegrityError("was exchanged while in use", "start again", path=path)
            self._open[shard] = descriptor
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # descriptors belong to a process

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
