"""Reads finished embeddings: opened with their shards, joined by id and digest, refused when stale or damaged.

`embedding.embed` writes them, `embedding.vector_file` defines the bytes of a file, and `embedding.targets` turns the
vectors into training targets.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from pst_dist.data.shards import ShardInfo, ShardSet
from pst_dist.embedding.index import IndexFile, RationaleIndex
from pst_dist.embedding.vector_file import EMBED_AGAIN, STATISTICS, ShardVectors, read_tensor, read_vectors
from pst_dist.errors import InputError, IntegrityError, StaleError
from pst_dist.models.locate import encoder_name
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.json_files import typed
from pst_dist.storage.manifest import MANIFEST, Manifest

# Shapes in this file: n rationales of a split or file, E encoder width


@dataclass(frozen=True)
class VectorFile:
    """The position of the vectors in one embedding file. The file is neither mapped nor kept open: there may be 100,000
    of them, and a process is limited to about a thousand open files and 65,530 maps."""

    path: Path
    count: int
    """Number of rows."""
    offset: int
    """Offset of the first row, in bytes."""
    stamp: tuple[int, int, int]
    """Inode, size in bytes and modification time at the moment the digests were compared."""

    @classmethod
    def of(cls, path: Path, content: ShardVectors) -> VectorFile:
        """The entry for a file that has just been read."""
        offset = content.vectors.offset if isinstance(content.vectors, np.memmap) else 0
        return cls(path, len(content.keys), offset, _stamp(os.stat(path)))

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(sample id, rationale index) of each row, read from the file."""
        return read_vectors(self.path, verify=False).keys

    def read(self, row: int, count: int, width: int) -> np.ndarray:
        """[count, E] float32, starting at row `row`; raises IntegrityError when the file has changed since."""
        return self.read_rows([range(row, row + count)], width)

    def read_rows(self, runs: Iterable[range], width: int) -> np.ndarray:
        """[n, E] float32: the rows of some runs, one run after another; raises as `read`."""
        pieces = []
        try:
            with self.path.open("rb", buffering=0) as stream:
                intact = _stamp(os.fstat(stream.fileno())) == self.stamp
                for run in runs:
                    size = 4 * width * len(run)
                    pieces.append(os.pread(stream.fileno(), size, self.offset + 4 * width * run.start))
                    intact = intact and len(pieces[-1]) == size
        except OSError as error:
            raise IntegrityError(f"cannot be read: {error.strerror}", EMBED_AGAIN, path=self.path) from error
        if not intact:
            raise IntegrityError("changed while it was in use", "run the same command again", path=self.path)
        return np.frombuffer(b"".join(pieces), "<f4").reshape(-1, width)


class _Encoder(BaseModel):
    encoder: str
    dimension: Annotated[int, Field(gt=0)]


class _Row(BaseModel):
    shard: str
    shard_sha256: str


class _Extra(BaseModel):
    """The fields of the manifest that are read, besides its files."""

    encoder: _Encoder
    shards_digest: str
    table: list[_Row]


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


class EmbeddingStore:
    """Finished embeddings, opened for reading and joined to their shards by id."""

    def __init__(
        self,
        manifest: Manifest,
        mean: np.ndarray,
        splits: dict[str, list[VectorFile]],
        index: RationaleIndex | None = None,
    ) -> None:
        """`index` finds the rows of all files; without one it is made from the files."""
        self.manifest, self.mean, self._splits = manifest, mean, splits
        self.identity: dict[str, Any] = manifest.extra["encoder"]
        self.dimension: int = self.identity["dimension"]
        self._files = [file for files in splits.values() for file in files]
        self._starts = [0, *itertools.accumulate(file.count for file in self._files)]
        self._index = RationaleIndex.of(file.keys for file in self._files) if index is None else index

    @classmethod
    def open(
        cls, directory: Path, shards: ShardSet, *, encoder: str | None = None, verify: bool = True
    ) -> EmbeddingStore:
        """Open the embeddings of exactly these shards, made by `encoder` (an `embed.encoder` value) if given.

        Raises InputError when there are none, StaleError when they belong to other shards or another encoder,
        IntegrityError when they are damaged.
        """
        artefact = Artefact(directory, "embeddings", remembers=True)
        manifest = artefact.manifest()
        if manifest is None:
            raise InputError("no finished embeddings here", f"{EMBED_AGAIN} first", path=directory)
        extra = typed(manifest.extra, _Extra, directory / MANIFEST, EMBED_AGAIN)
        table = {row.shard: row.shard_sha256 for row in extra.table}
        made_by, shards_digest = extra.encoder.encoder, extra.shards_digest
        if encoder is not None and encoder_name(encoder) != made_by:
            raise StaleError(
                f"the embeddings were made by encoder {made_by!r}, but the config asks for {encoder_name(encoder)!r}",
                f"{EMBED_AGAIN} --rebuild, or set embed.encoder={made_by}",
                path=directory,
            )
        if shards_digest != shards.manifest.digest:
            changed = [s.name for s in shards.shards() if table.get(s.name) != s.sha256]
            which = f"{', '.join(changed[:5])} ({len(changed)} in all)" if changed else "other shards"
            raise StaleError(f"the embeddings do not match the shards: {which}", f"{EMBED_AGAIN} again", path=directory)
        order = [shard for split in shards.manifest.extra["counts"] for shard in shards.shards(split)]
        paths = [directory / f"{shard.stem}.safetensors" for shard in order]
        known = IndexFile.beside(directory, manifest.digest).read() if verify else None
        if known is not None and known.stamps == [_stamp_or_none(path) for path in paths]:
            # All files were compared when the index was made, and have not changed since.
            artefact.verified()
            index = known.index
            known_files = zip(paths, known.counts, known.offsets, known.stamps, strict=True)
            files = [VectorFile(path, count, offset, stamp) for path, count, offset, stamp in known_files]
        else:
            if verify:
                artefact.verified()
            files, index = _compared(paths, order, shards, manifest, verify)
            if verify:
                IndexFile.beside(directory, manifest.digest).write(
                    [(file.count, file.offset, file.stamp) for file in files], index
                )
        splits: dict[str, list[VectorFile]] = {split: [] for split in shards.manifest.extra["counts"]}
        for shard, file in zip(order, files, strict=True):
            splits[shard.split].append(file)
        mean = read_tensor(directory / STATISTICS, "mean", verify=verify)[1]
        return cls(manifest, np.array(mean), splits, index)

    def vector(self, sample_id: str, rationale: int = 0) -> np.ndarray:
        """[E] float32, the unit vector of one rationale; raises IntegrityError when it is missing."""
        return self.vectors([(sample_id, rationale)])[0]

    def vectors(self, keys: Sequence[tuple[str, int]]) -> np.ndarray:
        """[n, E] float32, the unit vectors of n rationales in order; each file is opened once. Raises as `vector`."""
        rows = self._index.rows(keys)
        lost = np.flatnonzero(rows < 0)
        if len(lost):
            sample_id, rationale = keys[int(lost[0])]
            raise IntegrityError(f"no embedding for rationale {rationale} of {sample_id!r}", EMBED_AGAIN)
        found = np.empty((len(rows), self.dimension), dtype=np.float32)
        order = np.argsort(rows, kind="stable")
        owners = np.searchsorted(self._starts, rows[order], side="right") - 1
        for part in np.split(order, np.flatnonzero(np.diff(owners)) + 1):
            if len(part):
                number = bisect.bisect_right(self._starts, int(rows[part[0]])) - 1
                runs = [range(row, row + 1) for row in (rows[part] - self._starts[number]).tolist()]
                found[part] = self._files[number].read_rows(runs, self.dimension)
        return found

    def centred(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors [..., E] float32 after subtracting the training mean; rows of zeros (no rationale) stay zero."""
        moved = np.where(np.any(vectors != 0, axis=-1, keepdims=True), vectors - self.mean, 0).astype(np.float64)
        norms = np.linalg.norm(moved, axis=-1, keepdims=True)
        return np.divide(moved, norms, out=np.zeros_like(moved), where=norms > 0).astype(np.float32)

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self._splits)

    def keys(self, split: str) -> list[tuple[str, int]]:
        """All (id, rationale index) of a split in shard order; raises InputError for an unknown split."""
        self._check_split(split)
        return [key for file in self._splits[split] for key in file.keys]

    def first_rows(self, split: str, most: int) -> np.ndarray:
        """[n, E] float32: the first `most` vectors of a split in shard order, or all if there are fewer."""
        self._check_split(split)
        total = sum(file.count for file in self._splits[split])
        vectors = np.empty((min(most, total), self.dimension), dtype=np.float32)
        start = 0
        for file in self._splits[split]:
            count = min(file.count, len(vectors) - start)
            if count:
                vectors[start : start + count] = file.read(0, count, self.dimension)
                start += count
        return vectors

    def rows(self, split: str) -> tuple[list[tuple[str, int]], np.ndarray]:
        """All (id, rationale index) of a split in shard order, and their vectors [n, E] float32."""
        keys = self.keys(split)
        return keys, self.first_rows(split, len(keys))

    def _check_split(self, split: str) -> None:
        if split not in self._splits:
            raise InputError(f"no split {split!r}", f"there are {', '.join(sorted(self._splits))}")


def _compared(
    paths: Sequence[Path], order: Sequence[ShardInfo], shards: ShardSet, manifest: Manifest, verify: bool
) -> tuple[list[VectorFile], RationaleIndex]:
    """Compare every file with its shard; raises as `EmbeddingStore.open`."""
    files: list[VectorFile] = []

    def keys() -> Iterator[list[tuple[str, int]]]:
        for path, shard in zip(paths, order, strict=True):
            content = read_vectors(path, verify=verify)
            if content.shard_sha256 != shard.sha256 or content.keys != shards.rationale_keys(shard):
                raise StaleError(
                    f"the embeddings do not match the rationales of {shard.name}", f"{EMBED_AGAIN} again", path=path
                )
            if content.identity != manifest.extra["encoder"]:
                raise IntegrityError(
                    "was made by an encoder other than the manifest's", f"{EMBED_AGAIN} --rebuild", path=path
                )
            files.append(VectorFile.of(path, content))
            yield content.keys

    index = RationaleIndex.of(keys())
    return files, index


def _stamp_or_none(path: Path) -> tuple[int, int, int] | None:
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None
