"""Embeds teacher rationales: one file per shard, each computed once, on any machine.

`embed_shard` turns one shard into one `.safetensors` file. It is a pure function of encoder and shard, so it may run
anywhere and any number of times. `embed_all` has every shard processed, here or by an executor (Ray actors), sums their
summaries and writes the manifest last. It reads no vectors itself, so even with 100,000 shards it does not slow down
its actors. `embedding.store` reads the files, `embedding.encoder` encodes, `data.shards` provides the samples.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.config.schema import EmbedConfig
from pst_dist.data.shards import ShardInfo, ShardSet, read_shard, synthetic_of
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
_COMPARED = 64
"""Rationales on which another engine than torch is compared with it."""
_VISIBLE_SECONDS = 60.0
"""How long another machine's new file may take to appear: NFS clients cache a folder's listing for up to a minute."""


@dataclass(frozen=True, eq=False)
class EmbeddedShard:
    """Summary of one finished embedding file, a few kilobytes, so that it need not be read again."""

    file: str
    bytes: int
    sha256: str
    """Of the whole file."""
    rows: int
    truncated: int
    sums: np.ndarray
    """[E] int64, the sum of its vectors in units of 2^-36; see `fixed_point_sums`."""
    encoded: bool
    """False when a complete file of this shard and encoder already existed."""


def embed_shard(
    encoder: TextEncoder,
    shards_directory: Path,
    shard: ShardInfo,
    target: Path,
    *,
    advance: Callable[[int], None] | None = None,
) -> EmbeddedShard:
    """Write the embedding file of one shard to `target`, unless it is there already, and return its summary.

    Raises IntegrityError, and writes no file, when the shard differs from its manifest or a vector is zero or not
    finite. `advance` receives the number of texts as they are encoded; nothing when the file existed.
    """
    path = shards_directory / shard.name
    _check_shard(path, shard)
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


def _check_shard(path: Path, shard: ShardInfo) -> None:
    if not path.is_file() or sha256_file(path) != shard.sha256:
        raise IntegrityError("shard is missing or differs from its manifest", "run `pst shard`", path=path)


def _current(
    path: Path, identity: dict[str, Any], shard: ShardInfo, keys: list[tuple[str, int]]
) -> ShardVectors | None:
    """The content of a complete file made from this shard by this encoder; otherwise None."""
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

    Unlike floating-point sums, integer sums do not depend on order and grouping. So the mean has the same bits however
    many actors there are and whichever finishes first. Elements of 2^-12 and more are multiples of 2^-36 in float32 and
    lose nothing; smaller ones lose at most 2^-37. An int64 holds the sum of 2^26 rows.
    """
    total = np.zeros(vectors.shape[1], dtype=np.int64)
    for start in range(0, len(vectors), 4096):  # in blocks, so that the float64 copy stays small
        block = vectors[start : start + 4096].astype(np.float64)
        total += np.rint(np.ldexp(block, _FRACTION_BITS)).astype(np.int64).sum(axis=0)
    return total


Executor = Callable[
    [EmbedConfig, dict[str, Any], Files, list[ShardInfo], Callable[[ShardInfo, "EmbeddedShard"], None], Progress], None
]
"""Embeds every shard in a list; calls back once per shard and advances the bar."""


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

    `executor` embeds the shards in other processes (`clusters.ray.embed`); without one, this process does.
    `remote` is a data_dir in object storage that holds shards and embeddings; `directory` is then the local copy of the
    embeddings. Finished embeddings of other shards keep the files of unchanged shards. Those of another encoder raise
    StaleError unless `rebuild`. A killed run leaves complete files but no manifest, and the next run resumes. `lock` is
    held during all writing, in addition to the directory's own lock. Raises DataError when no sample has a rationale.
    """
    texts = {shard.name: shards.rationale_count(shard) for shard in shards.shards()}
    if not any(texts.values()):
        raise DataError("no sample has a rationale, so there is nothing to embed", path=shards.directory)
    here = FolderFiles(shards.directory, directory)
    files: Files = here if remote is None else RemoteFiles(remote, directory.parent)
    # With an executor, its workers encode; here only the encoder's identity is needed.
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
        # From here to the end there is no manifest, which marks the directory as unfinished.
        files.remove(MANIFEST)
        files.remove_leftovers()
        closeness = None if config.engine == "torch" else _closeness(encoder, config, shards, remote)
        present = _remove_others(files, [] if rebuild else map(file_name, shards.shards()))
        # Finished files come first: checking them is quick, so the speed shown later is that of encoding.
        # The rest is in descending order of size, so that the last ones to finish are small.
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
        return _finish(files, shards, identity, tally, fingerprint, closeness)


def _check_encoder(files: Files, identity: dict[str, Any]) -> None:
    """Raises StaleError when the finished embeddings were made by another encoder."""
    manifest = files.manifest()
    if manifest is None:
        return
    made_by = manifest.extra.get("encoder")
    if made_by != identity:
        raise StaleError(
            f"the embeddings were made by {difference(made_by if isinstance(made_by, dict) else {}, identity)}",
            "run again with --rebuild, or choose another data_dir",
            path=files.where,
        )


def difference(made_by: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`encoder 'a', wanted 'b'` for each setting in which two identities differ, short enough for a line."""
    names = [name for name in {**wanted, **made_by} if made_by.get(name) != wanted.get(name)]
    if "encoder" in names:
        names = ["encoder"]  # the other differences follow from it
    return ", ".join(f"{name} {str(made_by.get(name))[:60]!r}, wanted {str(wanted.get(name))[:60]!r}" for name in names)


def _remove_others(files: Files, wanted: Iterable[str]) -> set[str]:
    """Delete embedding files of shards that no longer exist; returns the names that remain.

    The caller holds the lock. Deletes only names that this module uses; the folder may contain other weights.
    """
    kept, present = set(wanted), files.names()
    for name in present - kept:
        if _OURS.fullmatch(name):
            files.remove(name)
    return present & kept


class _Tally:
    """The totals of the shards' summaries: O(E) for the mean, plus two manifest lines per shard."""

    def __init__(self, dimension: int) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.encoded = self.train_rows = 0
        self._sums = np.zeros(dimension, dtype=object)  # Python's integers cannot overflow

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


def _closeness(
    encoder: TextEncoder, config: EmbedConfig, shards: ShardSet, remote: RemoteFolder | None
) -> dict[str, Any]:
    """How close another engine's vectors are to torch's in float32, on some rationales of a shard."""
    shard = next(shard for shard in shards.shards() if shards.rationale_count(shard))
    with tempfile.TemporaryDirectory(prefix="pst-embed-") as folder:
        path = shards.directory / shard.name
        if not path.is_file() and remote is not None:
            path = Path(folder) / shard.name
            remote.child("shards").fetch(shard.name, path, shard.sha256)
        _check_shard(path, shard)
        texts = [text for one in read_shard(path) for text in one.rationales]
    chosen = texts[:: -(-len(texts) // _COMPARED)]
    cosines = encoder.cosines_to_torch(chosen)
    found = {
        "mean": round(float(cosines.mean()), 6),
        "lowest": round(float(cosines.min()), 6),
        "rationales": len(chosen),
    }
    log.info(
        "embed: cosine of %s in %s to torch in float32: %.5f on average, at least %.5f, on %d rationales",
        *(config.engine, config.dtype, found["mean"], found["lowest"], len(chosen)),
    )
    return found


def _finish(
    files: Files,
    shards: ShardSet,
    identity: dict[str, Any],
    tally: _Tally,
    fingerprint: str,
    closeness: dict[str, Any] | None,
) -> Manifest:
    """Write the mean and, once every file is visible here, the manifest."""
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
            # How nearly parallel the vectors are; 1 means that all are equal.
            "mean_length": round(float(np.linalg.norm(mean.astype(np.float64))), 6),
            **({} if closeness is None else {"cosine_to_torch_float32": closeness}),
            **synthetic_of(shards.manifest),
        },
    )
    files.keep([MANIFEST], lambda folder: write_manifest(folder, manifest))
    if manifest.extra["truncated"]:
        log.warning(
            "embed: %d of %d rationales exceed the encoder's %s tokens and lose their %s",
            manifest.extra["truncated"],
            manifest.extra["rows"],
            identity["max_seq_length"],
            "beginning" if identity.get("truncation") == "left" else "end",
        )
    rows, width = manifest.extra["rows"], identity["dimension"]
    log.info("embed: %d vectors of width %d, %d of %d shards encoded now", rows, width, tally.encoded, len(table))
    return manifest


def _wait_for(files: Files, names: set[str]) -> None:
    """Wait until this machine sees all files; raises EnvironmentFault when some do not appear.

    Temporary files of actors that died while writing are removed first.
    """
    files.remove_leftovers()
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while missing := names - _remove_others(files, names):
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"{len(missing)} of {len(names)} files were written to a place that this machine cannot see",
                "put data_dir on storage that all machines of the cluster share",
                path=files.where,
            )
        time.sleep(1)
