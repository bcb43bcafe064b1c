"""Where the vector of a rationale is: one sorted array for all embedding files, opened through a memory map.

A dict of (id, rationale) tuples takes 307 bytes of each rank's memory for every rationale. The array takes 16 bytes for
each sample, however many rationales it has, and all processes of a machine share its pages. It is made when all
embedding files have been compared with their digests and their shards, and is stored beside them together with their
stamps: while these stay the same, no file needs to be read again. It does not belong to the embeddings and can be
deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pst_dist.errors import IntegrityError, PstError
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.json_files import canonical_json

_ENTRY = np.dtype([("hash", "<u8"), ("first", "<u4"), ("count", "<u4")])
_LONG_ENTRY = np.dtype([("hash", "<u8"), ("first", "<u8"), ("count", "<u4")])
"""For more rows than four bytes can count."""


class RationaleIndex:
    """Finds the row of a rationale among the rows of all files."""

    def __init__(self, entries: np.ndarray, salt: int) -> None:
        """`entries` [samples] have the hash of an id, the row of its first rationale and their number, by hash."""
        self.entries, self.salt = entries, salt
        self._entries = np.asarray(entries)  # the class of a map makes each access slower

    @classmethod
    def of(cls, files: Iterable[Sequence[tuple[str, int]]]) -> RationaleIndex:
        """The index of files with these (sample id, rationale) keys, whose rows follow each other.

        Raises IntegrityError when the rationales of a sample are not together and in order.
        """
        names: list[bytes] = []
        firsts: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        row = 0
        for keys in files:
            own = [(name, [k for _, k in group]) for name, group in itertools.groupby(keys, key=lambda key: key[0])]
            sizes = np.array([len(places) for _, places in own], dtype=np.uint32)
            if any(places != list(range(len(places))) for _, places in own):
                raise IntegrityError("an embedding file does not have the rationales of a sample in order")
            names.append("\n".join(name for name, _ in own).encode())
            firsts.append(row + np.cumsum(sizes, dtype=np.uint64) - sizes)
            counts.append(sizes)
            row += len(keys)
        kind = _ENTRY if row < 2**32 else _LONG_ENTRY
        entries = np.zeros(sum(map(len, counts)), kind)
        if len(entries):
            entries["first"], entries["count"] = np.concatenate(firsts), np.concatenate(counts)
        for salt in range(8):
            hashes = (_hash(name, salt) for each in names if each for name in each.decode().split("\n"))
            entries["hash"] = np.fromiter(hashes, np.uint64, len(entries))
            found = np.sort(entries, order="hash")
            if not (found["hash"][1:] == found["hash"][:-1]).any():
                return cls(found, salt)
        raise IntegrityError("two embedding files have the same sample")

    def rows(self, keys: Sequence[tuple[str, int]]) -> np.ndarray:
        """[n] int64: the rows of n rationales; -1 for one that is missing."""
        hashes = np.fromiter((_hash(name, self.salt) for name, _ in keys), np.uint64, len(keys))
        wanted = np.fromiter((k for _, k in keys), np.int64, len(keys))
        if not len(self.entries):
            return np.full(len(keys), -1)
        found = self._entries[_first_not_less(self._entries["hash"], hashes).clip(max=len(self._entries) - 1)]
        there = (found["hash"] == hashes) & (wanted >= 0) & (wanted < found["count"])
        return np.where(there, found["first"].astype(np.int64) + wanted, -1)


def _first_not_less(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`np.searchsorted` for a column of a table, which that function would copy as a whole at each call."""
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(ordered))
    for _ in range(len(ordered).bit_length()):
        middle = (low + high) // 2
        less = ordered[middle.clip(max=len(ordered) - 1)] < wanted
        low, high = np.where(less & (low < high), middle + 1, low), np.where(less, high, middle)
    return low


def _hash(name: str, salt: int) -> int:
    salted = salt.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, salt=salted).digest(), "little")


@dataclass(frozen=True)
class KnownFiles:
    """What an index file says about the embedding files."""

    index: RationaleIndex
    counts: list[int]
    """Rows of each file."""
    offsets: list[int]
    """Offset of the first row in each file, in bytes."""
    stamps: list[tuple[int, int, int]]


@dataclass(frozen=True)
class IndexFile:
    """The stored index of finished embeddings: a header of JSON in one line, then the array."""

    path: Path
    embeddings: str
    """Digest of the embeddings' manifest."""

    @classmethod
    def beside(cls, directory: Path, embeddings: str) -> IndexFile:
        """The index file of an embeddings folder."""
        return cls(directory.with_name(f".{directory.name}.index"), embeddings)

    def read(self) -> KnownFiles | None:
        """The index, mapped; None when there is none of these embeddings, or it is damaged."""
        try:
            with self.path.open("rb") as stream:
                header = json.loads(stream.readline())
                start = stream.tell()
            if header["embeddings"] != self.embeddings:
                return None
            kind = _ENTRY if header["width"] == _ENTRY.itemsize else _LONG_ENTRY
            size = header["entries"]
            entries = np.memmap(self.path, kind, "r", start, (size,)) if size else np.zeros(0, kind)
            if hashlib.sha256(entries.view(np.uint8).data).hexdigest() != header["sha256"]:
                return None
            files = header["files"]
            return KnownFiles(
                RationaleIndex(entries, header["salt"]),
                [count for count, _, _ in files],
                [offset for _, offset, _ in files],
                [(inode, size, time) for _, _, (inode, size, time) in files],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, files: Sequence[tuple[int, int, tuple[int, int, int]]], index: RationaleIndex) -> None:
        """Store the index of files that were compared, where this process may write.

        `files` are (rows, offset of the first row in bytes, stamp) of each.
        """
        header = {
            "embeddings": self.embeddings,
            "entries": len(index.entries),
            "width": index.entries.dtype.itemsize,
            "salt": index.salt,
            "sha256": hashlib.sha256(index.entries.view(np.uint8).data).hexdigest(),
            "files": files,
        }
        with contextlib.suppress(PstError, OSError), atomic_path(self.path) as partial:
            with partial.open("wb") as stream:
                stream.write(canonical_json(header).encode() + b"\n")
                index.entries.tofile(stream)
