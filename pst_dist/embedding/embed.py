"""Embeds the rationales of all shards: one file per shard, each computed once, on any machine.

Shards are embedded here or by an executor (Ray actors); then their summaries are added and the manifest is written
last. This process reads no vectors itself, so even with 100,000 shards it does not slow down the actors.
`embedding.embed_shard` embeds one shard, `embedding.store` reads the files.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.config.schema import EmbedConfig
from pst_dist.data.shards import ShardInfo, ShardSet, read_shard, synthetic_of
from pst_dist.embedding.embed_shard import FRACTION_BITS, EmbeddedShard, check_shard, embed_shard
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.files import Files, FolderFiles, RemoteFiles, file_name
from pst_dist.embedding.known_encoder import known_identity, remember_identity
from pst_dist.embedding.vector_file import STATISTICS, write_tensor
from pst_dist.errors import DataError, EnvironmentFault, StaleError
from pst_dist.logs import Progress, progress
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import MANIFEST, Manifest, describe_files, digest_of, write_manifest
from pst_dist.storage.object_store import RemoteFolder

log = logging.getLogger(__name__)


# Shapes in this file: E encoder width
_OURS = re.compile(r"[a-z][a-z0-9_]{0,40}-\d{6}\.safetensors|statistics\.safetensors|manifest\.json")
_COMPARED = 64
"""Number of rationales on which another engine is compared with torch."""
_VISIBLE_SECONDS = 60.0
"""How long another machine's new file may take to appear: NFS clients cache a folder's listing for up to a minute."""


Executor = Callable[
    [EmbedConfig, dict[str, Any], Files, list[ShardInfo], Callable[[ShardInfo, EmbeddedShard], None], Progress], None
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
    if not rebuild and (manifest := _complete(config, shards, directory, files)) is not None:
        log.info("embed: %s is complete, nothing to do", files.where)
        return manifest
    # With an executor, its workers encode; here only the encoder's identity is needed.
    encoder = TextEncoder(config, device="cpu" if executor is not None else None)
    identity = encoder.identity
    fingerprint = _fingerprint(identity, shards)
    if not rebuild:
        _check_encoder(files, identity)
        manifest = files.finished(fingerprint)
        if manifest is not None:  # found without the lock: the directory may be read-only
            remember_identity(directory, config, identity)
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
        manifest = _finish(files, shards, identity, tally, fingerprint, closeness)
        remember_identity(directory, config, identity)
        return manifest


def _fingerprint(identity: dict[str, Any], shards: ShardSet) -> str:
    return digest_of({"encoder": identity, "shards": shards.manifest.digest})


def _complete(config: EmbedConfig, shards: ShardSet, directory: Path, files: Files) -> Manifest | None:
    """The manifest of embeddings that are complete, if that can be told without loading the encoder."""
    manifest = files.manifest()
    if manifest is None or manifest.extra.get("shards_digest") != shards.manifest.digest:
        return None
    identity = known_identity(directory, config)
    return files.finished(_fingerprint(identity, shards)) if identity is not None else None


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
    """Delete embedding files that are not `wanted`; returns the names that remain.

    The caller holds the lock. Deletes only names that an embedding has; the folder may contain other weights.
    """
    kept, present = set(wanted), files.names()
    for name in present - kept:
        if _OURS.fullmatch(name):
            files.remove(name)
    return present & kept


class _Tally:
    """Adds up the summaries of the shards; its size is E numbers for the mean and two manifest lines per shard."""

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
        whole = max(1, self.train_rows) << FRACTION_BITS
        return np.array([int(total) / whole for total in self._sums], dtype="<f4")  # int / int rounds once


def _closeness(
    encoder: TextEncoder, config: EmbedConfig, shards: ShardSet, remote: RemoteFolder | None
) -> dict[str, Any]:
    """The cosines of another engine's vectors to those of torch in float32, on some rationales of one shard."""
    shard = next(shard for shard in shards.shards() if shards.rationale_count(shard))
    with tempfile.TemporaryDirectory(prefix="pst-embed-") as folder:
        path = shards.directory / shard.name
        if not path.is_file() and remote is not None:
            path = Path(folder) / shard.name
            remote.child("shards").fetch(shard.name, path, shard.sha256)
        check_shard(path, shard)
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
            # 1 means that all vectors are equal, 0 that they cancel out.
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
