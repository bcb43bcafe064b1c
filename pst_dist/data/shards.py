"""Samples on disk: a directory of webdataset tars with an offset index, read by position.

A shard directory contains `<split>-000000.tar` (one `<id>.json` per sample), `<split>-000000.index.json` (the position
of each sample), `<split>.wids.json` (the list of shards in webdataset's own format) and `manifest.json`, which is
written last. `shard_writer` writes it; `sources` decides which rows become samples; `embedding` computes vectors from
them.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from pst_dist.data.candidates import Candidates, open_candidates
from pst_dist.data.places import FROM_ROWS, PLACE, open_places
from pst_dist.data.sample import SCHEMA_VERSION, ReasoningSample
from pst_dist.data.shard_tar import (
    REMAKE,
    ShardIndex,
    ShardInfo,
    parse_sample,
    read_shard,
)
from pst_dist.errors import InputError, IntegrityError, StaleError
from pst_dist.logs import progress
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.json_files import read_json, typed
from pst_dist.storage.manifest import MANIFEST, Manifest

__all__ = ["ShardIndex", "ShardInfo", "ShardSet", "SplitReader", "TrainPart", "read_shard", "synthetic_of"]

SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
SHARD_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}-\d{6}\.tar")
_MOST_INDEXES = 64
"""An index of a thousand samples takes some 200 kB."""


@dataclass(frozen=True)
class TrainPart:
    """One source of a mixture, among the training rows."""

    name: str
    rows: int
    """Number of its training rows, which follow each other."""
    weight: float
    """How often an epoch uses each of them."""


class ShardSet:
    """A finished shard directory, opened for reading."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        missing = [key for key in ("shards", "counts", "schema_version") if key not in manifest.extra]
        if missing:
            raise IntegrityError(f"the manifest has no {missing[0]}", REMAKE, path=directory)
        self._table = typed(manifest.extra["shards"], list[ShardInfo], directory / MANIFEST, REMAKE)
        self._counts = typed(manifest.extra["counts"], dict[str, int], directory / MANIFEST, REMAKE)
        version = manifest.extra["schema_version"]
        if version != SCHEMA_VERSION:
            raise StaleError(
                f"the shards have schema version {version}, this version of pst_dist reads {SCHEMA_VERSION}",
                REMAKE,
                path=directory,
            )
        for info in self._table:  # each name becomes a path, here and for the embeddings
            promised = manifest.files.get(info.name, {})
            if not SHARD_NAME.fullmatch(info.name) or promised.get("sha256") != info.sha256:
                raise IntegrityError(
                    f"shard table and file list disagree on {info.name[:80]!r}", REMAKE, path=directory
                )
        self._indexes: dict[str, ShardIndex] = {}
        self.stamps: dict[str, tuple[int, int]] = {}
        """(bytes, mtime in ns) of each tar at opening, so that later readers notice a replaced file."""

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> ShardSet:
        """Open a shard directory and, if `verify`, compare every file with the manifest.

        Raises InputError when there are no finished shards and IntegrityError when they are damaged.
        """
        artefact = Artefact(directory, "shards", remembers=True)
        manifest = artefact.manifest()
        if manifest is None:
            raise InputError("no finished shards found", "run `pst shard` first", path=directory)
        shard_set = cls(directory, manifest)
        for info in shard_set.shards():
            shard_set.stamps[info.name] = _stamp(directory / info.name)
        if verify:
            artefact.verified()
        return shard_set

    @property
    def mixture(self) -> list[TrainPart]:
        """The sources of the training rows, in their order; empty for rows of one kind."""
        found = typed(self.manifest.extra.get("parts", []), list[TrainPart], self.directory / MANIFEST, REMAKE)
        if found and sum(part.rows for part in found) != self._counts.get("train", 0):
            raise IntegrityError("the sources and the training split differ in rows", REMAKE, path=self.directory)
        return found

    def shards(self, split: str | None = None) -> list[ShardInfo]:
        """The shards of one split, or of all splits, in order."""
        return [info for info in self._table if split is None or info.split == split]

    def index(self, shard: ShardInfo) -> ShardIndex:
        """The offset index of one shard; those used last are kept."""
        if shard.name not in self._indexes:
            while len(self._indexes) >= _MOST_INDEXES:
                del self._indexes[next(iter(self._indexes))]
            path = self.directory / f"{shard.stem}.index.json"
            index = typed(read_json(path), ShardIndex, path, REMAKE)
            lengths = {len(column) for column in (index.ids, index.offsets, index.sizes, index.rationales)}
            if lengths != {shard.samples}:
                raise IntegrityError(f"the index does not have {shard.samples} samples", REMAKE, path=path)
            size, _ = self.stamps.get(shard.name) or _stamp(self.directory / shard.name)
            places = zip(index.offsets, index.sizes, strict=True)
            # A read allocates the number of bytes that the index names before it notices that the tar is smaller.
            inside = all(0 <= length <= size - start <= size for start, length in places)
            if not inside or min(index.rationales, default=0) < 0:
                raise IntegrityError(f"the index points outside its tar of {size} bytes", REMAKE, path=path)
            self._indexes[shard.name] = index
        return self._indexes[shard.name]

    def rationale_count(self, shard: ShardInfo) -> int:
        """Number of rationales in a shard. Read from the index for shards older than the manifest column."""
        return sum(self.index(shard).rationales) if shard.rationales is None else shard.rationales

    def rationale_keys(self, shard: ShardInfo) -> list[tuple[str, int]]:
        """(sample id, rationale index) of every rationale in a shard, in order."""
        index = self.index(shard)
        return [(key, k) for key, count in zip(index.ids, index.rationales, strict=True) for k in range(count)]

    def split(self, name: str) -> SplitReader:
        """The samples of one split, which may be empty; raises InputError for an unknown split."""
        if name not in self._counts:
            raise InputError(
                f"no split {name!r}", f"available splits: {', '.join(sorted(self._counts))}", path=self.directory
            )
        return SplitReader(self, name)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise IntegrityError(f"cannot read: {error.strerror}", "run `pst shard` again", path=path) from error
    return status.st_size, status.st_mtime_ns


class SplitReader(Sequence[ReasoningSample]):
    """Random access to the samples of one split. Each access is one positioned read and safe after a fork.

    Raises IntegrityError when a tar is missing, was replaced after the set was opened, or does not contain the sample
    at the indexed position. Not thread-safe: use one reader per thread.
    """

    _MOST_OPEN = 256

    def __init__(self, shards: ShardSet, split: str) -> None:
        self._shards, self._name = shards, split
        self._infos = shards.shards(split)
        self._paths = [shards.directory / info.name for info in self._infos]
        self._stamps = [shards.stamps[info.name] for info in self._infos]
        self._starts = [0, *itertools.accumulate(info.samples for info in self._infos)]
        self._known_places: np.ndarray | None = None
        _ = self._places  # a damaged index is an error at opening
        self._open: dict[int, int] = {}
        self._candidates: Candidates | None = None

    @property
    def _places(self) -> np.ndarray:
        """[samples] of `PLACE`."""
        if self._known_places is None:
            folder = self._shards.directory
            path = folder.with_name(f".{folder.name}.{self._name}.places")
            self._known_places = open_places(path, self._shards.manifest.digest, len(self), self._indexed_places)
        return self._known_places

    def _indexed_places(self) -> np.ndarray:
        places = np.zeros(len(self), PLACE)  # 16 bytes a sample; the lists of an index take 200
        with progress(f"index {self._name}", total=len(self), unit="rows", show=len(self) >= FROM_ROWS) as bar:
            for info, start in zip(self._infos, self._starts, strict=False):
                index, own = self._shards.index(info), places[start : start + info.samples]
                own["offset"], own["size"] = index.offsets, index.sizes
                own["check"] = [zlib.crc32(key.encode()) for key in index.ids]
                bar.advance(info.samples)
        return places

    @property
    def ids(self) -> list[str]:
        """All ids in order, read from the indexes."""
        return [key for info in self._infos for key in self._shards.index(info).ids]

    @property
    def candidates(self) -> Candidates:
        """Id, number of rationales and question group of every sample, from a file that is made at the first use."""
        if self._candidates is None:
            folder = self._shards.directory
            path = folder.with_name(f".{folder.name}.{self._name}.candidates")
            self._candidates = open_candidates(path, self._name, self._shards.manifest.digest, len(self), self)
        return self._candidates

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
        place = self._places[self._starts[shard] + row]
        content = os.pread(self._descriptor(shard), int(place["size"]), int(place["offset"]))
        where = f"{self._paths[shard]}, sample {row}"
        sample = parse_sample(content, where)
        if zlib.crc32(sample.id.encode()) != place["check"]:
            raise IntegrityError(f"contains the sample {sample.id!r} instead", REMAKE, path=where)
        return sample

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def _descriptor(self, shard: int) -> int:
        """One open file per shard; closes the oldest one when there are too many."""
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
                os.close(descriptor)  # not cached: a second attempt must fail too
                raise IntegrityError("the file was replaced while in use", "start the command again", path=path)
            self._open[shard] = descriptor
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        # A map would be sent as its whole content, and file descriptors are not valid in another process.
        return {**self.__dict__, "_open": {}, "_candidates": None, "_known_places": None}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def synthetic_of(manifest: Manifest) -> dict[str, Any]:
    """{"synthetic": rows by split and the models that made them up} for the next manifest; {} if there are none."""
    found = manifest.extra.get("synthetic")
    return {"synthetic": found} if found else {}
