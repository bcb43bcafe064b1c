"""Packing as jobs for several processes: the samples of one shard become its tar and its index.

A shard's bytes depend on its samples alone. `shards` hands out the jobs and writes what concerns all shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pst_dist.data.shard_tar import Member, ShardInfo, write_members
from pst_dist.storage.json_files import canonical_json

_MOST_BYTES = 32 << 20
"""A shard with more text is packed by this process as it is read, so that no process has it in memory."""


@dataclass(frozen=True)
class PackedShard:
    """A shard in the folder of an unfinished artefact."""

    info: ShardInfo
    md5: str
    """For the list of shards in webdataset's format."""


@dataclass(frozen=True)
class PackJob:
    """The samples of one shard; calling it writes its files."""

    path: Path
    split: str
    members: list[Member]

    def __call__(self) -> PackedShard:
        """Write the tar and its index; raises as `write_members`."""
        return _pack(self.path, self.split, self.members)


@dataclass(frozen=True)
class _Done:
    packed: PackedShard

    def __call__(self) -> PackedShard:
        return self.packed


def pack_jobs(
    members: Iterator[Member], count: int, samples_per_shard: int, folder: Path, split: str
) -> Iterator[Callable[[], PackedShard]]:
    """A job for each shard of a split with `count` samples."""
    for number in range(-(-count // samples_per_shard)):
        path = folder / f"{split}-{number:06d}.tar"
        own = itertools.islice(members, samples_per_shard)
        held, size = [], 0
        for member in own:
            held.append(member)
            size += len(member[1])
            if size > _MOST_BYTES:
                break
        if size > _MOST_BYTES:
            yield _Done(_pack(path, split, itertools.chain(held, own)))
        else:
            yield PackJob(path, split, held)


def _pack(path: Path, split: str, members: Iterable[Member]) -> PackedShard:
    written = write_members(path, members)
    index = written.index
    # Not by `write_text`, which looks for leftovers among all files each time: nobody sees this folder yet.
    path.with_suffix(".index.json").write_text(canonical_json(vars(index)) + "\n", encoding="utf-8")
    info = ShardInfo(path.name, split, len(index.ids), written.bytes, written.sha256, sum(index.rationales))
    return PackedShard(info, written.md5)
