"""Id, number of rationales and question group of every row of a split, in one file that is opened through a memory map.

InfoNCE draws thousands of further rows at every step and needs no more of them than this. The file is made once, by
reading all rows. It is next to the shards but not part of them, and can be deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pst_dist.data.sample import ReasoningSample, question_group
from pst_dist.errors import PstError
from pst_dist.logs import progress
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.json_files import canonical_json

_ENTRY = np.dtype([("group", "<i8"), ("id_end", "<u8"), ("rationales", "<u4")])


class Candidates:
    """What is known of each row without reading it."""

    def __init__(self, entries: np.ndarray, ids: np.ndarray) -> None:
        """`entries` [rows], and [bytes] uint8 of all ids, one after another."""
        # As plain arrays: the class of a map makes each access several times slower.
        self._entries, self._bytes = np.asarray(entries), np.asarray(ids).data

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, index: int) -> tuple[str, int, int]:
        """(id, number of rationales, question group) of one row."""
        (name,), (rationales,), (group,) = self.many([index])
        return name, rationales, group

    def many(self, indices: Sequence[int]) -> tuple[list[str], list[int], list[int]]:
        """(ids, numbers of rationales, question groups) of some rows, in a fifth of the time of `of` for each."""
        places = np.asarray(indices, np.int64)
        found = self._entries[places]
        starts = np.where(places > 0, self._entries[places - 1]["id_end"], 0).tolist()
        names = [
            str(self._bytes[start:end], "utf-8") for start, end in zip(starts, found["id_end"].tolist(), strict=True)
        ]
        return names, found["rationales"].tolist(), found["group"].tolist()


def open_candidates(path: Path, split: str, shards: str, rows: int, samples: Iterable[ReasoningSample]) -> Candidates:
    """The table in a file of the shards with the manifest digest `shards`; made from all samples if it is missing.

    Where the file cannot be written the table stays in memory.
    """
    found = _read(path, shards)
    if found is not None and len(found) == rows:
        return found
    entries, names, end = np.zeros(rows, _ENTRY), [], 0
    with progress(f"index {split}", total=rows, unit="rows") as bar:
        for place, sample in enumerate(samples):
            names.append(sample.id.encode())
            end += len(names[-1])
            entries[place] = (question_group(sample.question), end, len(sample.rationales))
            bar.advance()
    ids = np.frombuffer(b"".join(names), np.uint8)
    made = Candidates(entries, ids)
    header = {"shards": shards, "rows": rows, "id_bytes": len(ids), "sha256": _digest(entries, ids)}
    with contextlib.suppress(PstError, OSError), atomic_path(path) as partial, partial.open("wb") as stream:
        stream.write(canonical_json(header).encode() + b"\n")
        entries.tofile(stream)
        ids.tofile(stream)
    return _read(path, shards) or made


def _digest(entries: np.ndarray, ids: np.ndarray) -> str:
    digest = hashlib.sha256(entries.view(np.uint8).data)
    digest.update(ids.data)
    return digest.hexdigest()


def _read(path: Path, shards: str) -> Candidates | None:
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.readline())
            start = stream.tell()
        if header["shards"] != shards:
            return None
        entries = np.memmap(path, _ENTRY, "r", start, (header["rows"],))
        ids = np.memmap(path, np.uint8, "r", start + entries.nbytes, (header["id_bytes"],))
        return Candidates(entries, ids) if _digest(entries, ids) == header["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
