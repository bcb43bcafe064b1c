"""Teacher rationales made into vectors: one file a shard, each done once, wherever it is done.

`embed_shard` turns one shard into one `.safetensors` file and is a pure function of encoder and shard, so it may
run anywhere and any number of times. `embed_all` has every shard looked at, here or by an executor (Ray actors),
adds up what they tell and writes the manifest last: it reads no vectors itself, so it is as fast with a hundred
thousand shards as its actors are. Reading is `embedding_store`, the encoder is `encoder`, the samples are `shards`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.config.schema import EmbedConfig
from pst_dist.data.shards import ShardInfo, ShardSet, read_shard
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.files import Files, FolderFiles, RemoteFiles, file_name
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.embedding.vector_file import STATISTICS, ShardVectors, read_vectors, write_tensor, write_vectors
from pst_dist.errors import DataError, EnvironmentFault, IntegrityError, StaleError
from pst_dist.logs import Progress, progress
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import MANIFEST, Manifest, describe_files, digest_of, sha256_file, write_manifest
from pst_dist.storage.object_store import RemoteFolder

log = logging.getLogger(__name__)

__all__ = ["EmbeddedShard", "EmbeddingStore", "TextEncoder", "difference", "embed_all", "embed_shard"]

# Shapes in this file: n rationales of a shard, E encoder width
_OURS = re.compile(r"[a-z][a-z0-9_]{0,40}-\d{6}\.safetensors|statistics\.safetensors|manifest\.json")
_FRACTION_BITS = 36
_VISIBLE_SECONDS = 60.0
"""How long another machine's new file may take to show: NFS clients keep a folder's listing for up to a minute."""


@dataclass(frozen=True, eq=False)
class EmbeddedShard:
    """What there is to know of one finished embedding file without reading it again; a few kilobytes."""

    file: str
    bytes: int
    sha256: str
    """Of the whole file."""
    rows: int
    truncated: int
    sums: np.ndarray
    """[E] int64, the sum of its vectors in units of 2^-36; see `fixed_point_sums`."""
    encoded: bool
    """False when the file was there already and was found to be whole and of this shard and encoder."""


def embed_shard(
    encoder: TextEncoder,
    shards_directory: Path,
    shard: ShardInfo,
    target: Path,
    *,
    advance: Callable[[int], None] | None = None,
) -> EmbeddedShard:
    """Make `target` the embedding file of one shard, unless it is that already, and sum it up.

    Raises IntegrityError when the shard is not the promised one or a vector is zero or not finite; then no file
    is written. `advance` is told of texts as they are encoded, and of none when the file was there.
    """
    path = shards_directory / shard.name
    if not path.is_file() or sha256_file(path) != shard.sha256:
        raise IntegrityError("shard is missing or is not the one the manifest names", "run `pst shard`", path=path)
    samples = read_shard(path)
    keys = [(sample.id, k) for sample in samples for k in range(len(sample.rationales))]
    content = _current(target, encoder.identity, shard, keys)
    if content is not None:
        return _summary(target, content, encoded=False)
    texts = [rationale for sample in samples for rationale in sample.rationales]
    try:
        vectors = encoder.encode(texts, advance=advance)
    except IntegrityError as error:
        raise IntegrityError(f"{shard.name}: {error.what}", error.remedy, path=path) from error
    if vectors.shape != (len(keys), encoder.dimension):
        raise IntegrityError(f"{len(keys)} rationales gave vectors of shape {vectors.shape}", path=path)
    content = ShardVectors(keys, vectors, encoder.identity, shard.sha256, encoder.count_truncated(texts))
    write_vectors(target, content)
    return _summary(target, content, encoded=True)


def _current(
    path: Path, identity: dict[str, Any], shard: ShardInfo, keys: list[tuple[str, int]]
) -> ShardVectors | None:
    """The content of a file that is whole and was made from this shard by this encoder, else None."""
    if not path.is_file():
        return None
    try:
        content = read_vectors(path)
    except IntegrityError as error:
        log.warning("embed: %s", error)
        return None
    found = (content.identity, content.shard_sha256, content.keys)
    return content if found == (identity, shard.sha256, keys) else None


def _summary(target: Path, content: ShardVectors, *, encoded: bool) -> EmbeddedShard:
    sums = fixed_point_sums(content.vectors)
    size, digest = target.stat().st_size, sha256_file(target)
    return EmbeddedShard(target.name, size, digest, len(content.keys), content.truncated, sums, encoded)


def fixed_point_sums(vectors: np.ndarray) -> np.ndarray:
    """[E] int64: the sums of n unit vectors [n, E] in units of 2^-36, each element rounded before it is added.

    Integers add up to the same whatever the order and the grouping, floating-point numbers do not; so the mean is
    the same bits however many actors there were and whichever finished first. Elements of 2^-12 and more are
    float32 multiples of 2^-36 and lose nothing, smaller ones at most 2^-37. An int64 holds 2^26 rows.
    """
    total = np.zeros(vectors.shape[1], dtype=np.int64)
    for start in range(0, len(vectors), 4096):  # in blocks, so that the float64 copy stays small
        block = vectors[start : start + 4096].astype(np.float64)
        total += np.rint(np.ldexp(block, _FRACTION_BITS)).astype(np.int64).sum(axis=0)
    return total


Executor = Callable[
    [EmbedConfig, dict[str, Any], Files, list[ShardInfo], Callable[[ShardInfo, "EmbeddedShard"], None], Progress], None
]
"""Sees to the file of every shard in a list; calls back once for each, and advances the bar."""


def embed_all(
    config: EmbedConfig,
    shards: ShardSet,
    directory: Path,
    *,
    rebuild: bool = False,
    remote: RemoteFolder | None = None,
    executor: Executor | None = None,
    lock: contextlib.AbstractContextManager[None] | None = None,
) -> Manifest:
    """Encode every shard that has no current file, then write the centring mean and the manifest.

    `executor` sees to all shards on other processes (`clusters.ray.embed`); without one, this process does.
    With `remote`, a data_dir in object storage, shards and embeddings lie there, and `directory` is what this machine
    has of the latter. Finished embeddings of other shards keep the files whose shard is the same; those of another
    encoder are refused with StaleError unless `rebuild`. A killed run leaves whole files and no manifest, and the next
    one goes on. `lock` is held while anything is written, besides the directory's own. Raises DataError when no sample
    has a rationale.
    """
    texts = {shard.name: shards.rationale_count(shard) for shard in shards.shards()}
    if not any(texts.values()):
        raise DataError("no sample has a rationale: there is nothing to embed", path=shards.directory)
    here = FolderFiles(shards.directory, directory)
    files: Files = here if remote is None else RemoteFiles(remote, directory.parent)
    # With an executor its workers encode; here the encoder is only asked who it is.
    encoder = TextEncoder(config, device="cpu" if executor is not None else None)
    identity = encoder.identity
    fingerprint = digest_of({"encoder": identity, "shards": shards.manifest.digest})
    if not rebuild:
        _check_encoder(files, identity)
        manifest = files.finished(fingerprint)
        if manifest is not None:  # found without the lock: the directory may be read-only
            log.info("embed: %s is complete, nothing to do", files.where)
            return manifest
    with lock or contextlib.nullcontext(), directory_lock(directory):
        # From here to the end there is no manifest: the directory is unfinished, and says so.
        files.remove(MANIFEST)
        files.remove_leftovers()
        present = _remove_others(files, [] if rebuild else map(file_name, shards.shards()))
        # Looking at a finished file is quick: those come first, and the speed that is shown is that of encoding.
        # Then the largest, so that the last ones to end are small.
        order = sorted(shards.shards(), key=lambda shard: (file_name(shard) not in present, -shard.bytes, shard.name))
        tally = _Tally(identity["dimension"])
        with progress("embed", total=sum(texts.values()), unit="texts") as bar:
            if executor is not None:
                del encoder
                executor(config, identity, files, order, tally.add, bar)
            else:
                for shard in order:
                    with files.at_hand(shard) as (folder, target):
                        result = embed_shard(encoder, folder, shard, target, advance=bar.advance)
                    if not result.encoded:
                        bar.skip(result.rows)
                    tally.add(shard, result)
        return _finish(files, shards, identity, tally, fingerprint)


def _check_encoder(files: Files, identity: dict[str, Any]) -> None:
    """Raises StaleError when finished embeddings are by another encoder."""
    manifest = files.manifest()
    if manifest is None:
        return
    made_by = manifest.extra.get("encoder")
    if made_by != identity:
        raise StaleError(
            f"embeddings are by {difference(made_by if isinstance(made_by, dict) else {}, identity)}",
            "run again with --rebuild, or choose another data_dir",
            path=files.where,
        )


def difference(made_by: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`encoder 'a', wanted 'b'` for each setting in which two identities differ, short enough for a line."""
    names = [name for name in {**wanted, **made_by} if made_by.get(name) != wanted.get(name)]
    if "encoder" in names:
        names = ["encoder"]  # the rest follows from it
    return ", ".join(f"{name} {str(made_by.get(name))[:60]!r}, wanted {str(wanted.get(name))[:60]!r}" for name in names)


def _remove_others(files: Files, wanted: Iterable[str]) -> set[str]:
    """Delete embedding files of shards that no longer exist; returns the names that stay.

    The caller holds the lock. Only names that this module gives: somebody may keep other weights in the folder.
    """
    kept, present = set(wanted), files.names()
    for name in present - kept:
        if _OURS.fullmatch(name):
            files.remove(name)
    return present & kept


class _Tally:
    """What the shards' summaries come to: O(E) for the mean, and the two lines that the manifest has for each."""

    def __init__(self, dimension: int) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.encoded = self.train_rows = 0
        self._sums = np.zeros(dimension, dtype=object)  # Python's integers: any number of rows fits

    def add(self, shard: ShardInfo, result: EmbeddedShard) -> None:
        assert shard.name not in self.rows
        self.files[result.file] = {"bytes": result.bytes, "sha256": result.sha256}
        row = {"file": result.file, "shard": shard.name, "shard_sha256": shard.sha256}
        self.rows[shard.name] = {**row, "rows": result.rows, "truncated": result.truncated}
        self.encoded += result.encoded
        if shard.split == "train":
            self._sums += result.sums
            self.train_rows += result.rows

    def mean(self) -> np.ndarray:
        """[E] float32, the mean over the training rationales; zeros when there are none."""
        whole = max(1, self.train_rows) << _FRACTION_BITS
        return np.array([int(total) / whole for total in self._sums], dtype="<f4")  # int / int rounds once


def _finish(files: Files, shards: ShardSet, identity: dict[str, Any], tally: _Tally, fingerprint: str) -> Manifest:
    """Write the mean and, when every file is seen to be there, the manifest."""
    table = [tally.rows[shard.name] for shard in shards.shards()]
    _wait_for(files, set(tally.files))
    mean = tally.mean()
    described: dict[str, dict[str, Any]] = {}

    def write_mean(folder: Path) -> None:
        write_tensor(folder / STATISTICS, "mean", mean, {"split": "train", "rows": tally.train_rows})
        described.update(describe_files(folder, [STATISTICS]))

    files.keep([STATISTICS], write_mean)
    manifest = Manifest(
        kind="embeddings",
        fingerprint=fingerprint,
        files={**described, **tally.files},
        extra={
            "encoder": identity,
            "shards_digest": shards.manifest.digest,
            "table": table,
            "rows": sum(row["rows"] for row in table),
            "truncated": sum(row["truncated"] for row in table),
            "train_rows": tally.train_rows,
            # How nearly parallel the vectors are: 1 would mean that all are the same.
            "mean_length": round(float(np.linalg.norm(mean.astype(np.float64))), 6),
        },
    )
    files.keep([MANIFEST], lambda folder: write_manifest(folder, manifest))
    if manifest.extra["truncated"]:
        log.warning(
            "embed: %d of %d rationales are longer than the encoder's %s tokens and lose their end",
            manifest.extra["truncated"],
            manifest.extra["rows"],
            identity["max_seq_length"],
        )
    rows, width = manifest.extra["rows"], identity["dimension"]
    log.info("embed: %d vectors of width %d, %d of %d shards encoded now", rows, width, tally.encoded, len(table))
    return manifest


def _wait_for(files: Files, names: set[str]) -> None:
    """Return when this machine sees all files; raises EnvironmentFault when some stay away.

    Temporary files of actors that died while they wrote are removed first.
    """
    files.remove_leftovers()
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while missing := names - _remove_others(files, names):
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"{len(missing)} of {len(names)} files were written where this machine cannot see them",
                "put data_dir on storage that all machines of the cluster share",
                path=files.where,
            )
        time.sleep(1)
