"""Teacher rationales as vectors: one file a shard, joined by id and digest, refused when stale.

`embed_shard` turns one shard into one `.safetensors` file and is a pure function of encoder and shard, so it may
run anywhere and any number of times; `embed_all` does what is missing, here or through `ray_jobs`, and writes the
manifest last; `EmbeddingStore` reads. The encoder itself is `encoder`, the samples are `shards`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pst_dist.config import EmbedConfig
from pst_dist.embedding_format import EMBED_AGAIN, ShardVectors, read_tensor, read_vectors, write_tensor, write_vectors
from pst_dist.encoder import TextEncoder, encoder_name
from pst_dist.errors import DataError, InputError, IntegrityError, StaleError
from pst_dist.progress import progress
from pst_dist.shards import ShardInfo, ShardSet, read_shard
from pst_dist.storage import (
    MANIFEST,
    Manifest,
    describe_files,
    digest_of,
    directory_lock,
    read_manifest,
    sha256_file,
    verify_files,
    write_manifest,
)

log = logging.getLogger(__name__)

__all__ = ["EmbeddingStore", "TextEncoder", "embed_all", "embed_shard"]

# Shapes in this file: n rationales of a shard or split, E encoder width
STATISTICS = "statistics.safetensors"
_OURS = re.compile(r"[a-z][a-z0-9_]{0,40}-\d{6}\.safetensors|statistics\.safetensors|manifest\.json")
_PARTIAL = re.compile(rf"\.(?:{_OURS.pattern})\.[0-9a-f]+\.partial")


def embed_shard(
    encoder: TextEncoder,
    shards_directory: Path,
    shard: ShardInfo,
    target: Path,
    *,
    advance: Callable[[int], None] | None = None,
) -> int:
    """Encode all rationales of one shard into the file `target`; returns how many.

    Does nothing when `target` is already that file. Raises IntegrityError when the shard is not the promised one
    or a vector is zero or not finite; then no file is written. `advance` is told of texts as they are done.
    """
    path = shards_directory / shard.name
    if not path.is_file() or sha256_file(path) != shard.sha256:
        raise IntegrityError("shard is missing or is not the one the manifest names", "run `pst shard`", path=path)
    samples = read_shard(path)
    keys = [(sample.id, k) for sample in samples for k in range(len(sample.rationales))]
    if _is_current(target, encoder.identity, shard, keys):
        if advance is not None:
            advance(len(keys))
        return len(keys)
    texts = [rationale for sample in samples for rationale in sample.rationales]
    try:
        vectors = encoder.encode(texts, advance=advance)
    except IntegrityError as error:
        raise IntegrityError(f"{shard.name}: {error.what}", error.remedy, path=path) from error
    if vectors.shape != (len(keys), encoder.dimension):
        raise IntegrityError(f"{len(keys)} rationales gave vectors of shape {vectors.shape}", path=path)
    truncated = encoder.count_truncated(texts)
    write_vectors(target, ShardVectors(keys, vectors, encoder.identity, shard.sha256, truncated))
    return len(keys)


def _is_current(path: Path, identity: dict[str, Any], shard: ShardInfo, keys: list[tuple[str, int]]) -> bool:
    """Whether a file is whole and was made from this shard by this encoder."""
    if not path.is_file():
        return False
    try:
        content = read_vectors(path)
    except IntegrityError as error:
        log.warning("embed: %s", error)
        return False
    return (content.identity, content.shard_sha256, content.keys) == (identity, shard.sha256, keys)


def embed_all(config: EmbedConfig, shards: ShardSet, directory: Path, *, rebuild: bool = False) -> Manifest:
    """Encode every shard that has no current file, then write the centring mean and the manifest.

    Finished embeddings of other shards keep the files whose shard is the same; those of another encoder are
    refused with StaleError unless `rebuild`. A killed run leaves whole files and no manifest, and the next one
    goes on. Raises DataError when no sample has a rationale.
    """
    keys = {shard.name: shards.rationale_keys(shard) for shard in shards.shards()}
    if not any(keys.values()):
        raise DataError("no sample has a rationale: there is nothing to embed", path=shards.directory)
    # With Ray the actors encode; here the encoder is only asked who it is.
    encoder = TextEncoder(config, device="cpu" if config.backend == "ray" else None)
    identity = encoder.identity
    fingerprint = digest_of({"encoder": identity, "shards": shards.manifest.digest})
    manifest = None if rebuild else _existing(directory, identity)
    if manifest is not None and manifest.fingerprint == fingerprint and _verified(directory, manifest):
        log.info("embed: %s is complete, nothing to do", directory)  # found before the lock: it may be read-only
        return manifest
    with directory_lock(directory):
        # From here to the end there is no manifest: the directory is unfinished, and says so.
        (directory / MANIFEST).unlink(missing_ok=True)
        _remove_leftovers(directory, [] if rebuild else keys)
        todo = [
            shard
            for shard in shards.shards()
            if not _is_current(directory / f"{shard.stem}.safetensors", identity, shard, keys[shard.name])
        ]
        if config.backend == "ray" and todo:
            from pst_dist.ray_jobs import embed_with_ray

            del encoder
            embed_with_ray(config, shards, directory, todo)
        elif todo:
            with progress("embed", total=sum(len(keys[shard.name]) for shard in todo), unit="texts") as bar:
                for shard in todo:
                    target = directory / f"{shard.stem}.safetensors"
                    embed_shard(encoder, shards.directory, shard, target, advance=bar.advance)
        return _finish(directory, shards, identity, keys, fingerprint)


def _existing(directory: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of finished embeddings by the same encoder; raises StaleError for another one."""
    manifest = read_manifest(directory, "embeddings")
    if manifest is not None and manifest.extra.get("encoder") != identity:
        raise StaleError(
            f"embeddings are by {_difference(manifest.extra.get('encoder') or {}, identity)}",
            "run again with --rebuild, or choose another data_dir",
            path=directory,
        )
    return manifest


def _difference(made_by: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`encoder 'a', wanted 'b'` for each setting in which two identities differ, short enough for a line."""
    names = [name for name in {**wanted, **made_by} if made_by.get(name) != wanted.get(name)]
    if "encoder" in names:
        names = ["encoder"]  # the rest follows from it
    return ", ".join(f"{name} {str(made_by.get(name))[:60]!r}, wanted {str(wanted.get(name))[:60]!r}" for name in names)


def _verified(directory: Path, manifest: Manifest) -> bool:
    try:
        verify_files(directory, manifest)
    except IntegrityError as error:
        log.warning("embed: %s; only what is damaged is made again", error)
        return False
    return True


def _remove_leftovers(directory: Path, shard_names: Iterable[str]) -> None:
    """Delete files of shards that are no more and the temporary files of killed runs; we hold the lock.

    Only names that this module gives: the folder may be one that somebody else keeps weights in.
    """
    wanted = {name.removesuffix(".tar") + ".safetensors" for name in shard_names}
    for path in sorted(directory.iterdir()):
        ours = _OURS.fullmatch(path.name) or _PARTIAL.fullmatch(path.name)
        if ours and path.name not in wanted:
            path.unlink(missing_ok=True)


def _finish(
    directory: Path,
    shards: ShardSet,
    identity: dict[str, Any],
    keys: dict[str, list[tuple[str, int]]],
    fingerprint: str,
) -> Manifest:
    """Check that every file is there, take the mean over the training rationales, write the manifest."""
    table: list[dict[str, Any]] = []
    total, rows = np.zeros(identity["dimension"], dtype=np.float64), 0
    for shard in shards.shards():
        name = f"{shard.stem}.safetensors"
        content = read_vectors(directory / name)
        if (content.identity, content.shard_sha256, content.keys) != (identity, shard.sha256, keys[shard.name]):
            differs = _difference(content.identity, identity) or "another version of this shard"
            raise IntegrityError(
                f"was made by {differs}", "every machine needs the same encoder and shards", path=directory / name
            )
        row = {"file": name, "shard": shard.name, "shard_sha256": shard.sha256}
        table.append({**row, "rows": len(content.keys), "truncated": content.truncated})
        if shard.split == "train":
            total += content.vectors.sum(axis=0, dtype=np.float64)
            rows += len(content.keys)
    mean = (total / max(1, rows)).astype("<f4")
    write_tensor(directory / STATISTICS, "mean", mean, {"split": "train", "rows": rows})
    manifest = Manifest(
        kind="embeddings",
        fingerprint=fingerprint,
        files=describe_files(directory, [STATISTICS, *(str(row["file"]) for row in table)]),
        extra={
            "encoder": identity,
            "shards_digest": shards.manifest.digest,
            "table": table,
            "rows": sum(row["rows"] for row in table),
            "truncated": sum(row["truncated"] for row in table),
            "train_rows": rows,
            # How nearly parallel the vectors are: 1 would mean that all are the same.
            "mean_length": round(float(np.linalg.norm(mean.astype(np.float64))), 6),
        },
    )
    write_manifest(directory, manifest)
    if manifest.extra["truncated"]:
        log.warning(
            "embed: %d of %d rationales are longer than the encoder's %s tokens and lose their end",
            manifest.extra["truncated"],
            manifest.extra["rows"],
            identity["max_seq_length"],
        )
    log.info("embed: %d vectors of width %d", manifest.extra["rows"], identity["dimension"])
    return manifest


class EmbeddingStore:
    """Finished embeddings, opened for reading and joined to their shards by id."""

    def __init__(self, manifest: Manifest, mean: np.ndarray, splits: dict[str, list[ShardVectors]]) -> None:
        self.manifest, self.mean, self._splits = manifest, mean, splits
        self.identity: dict[str, Any] = manifest.extra["encoder"]
        self.dimension: int = self.identity["dimension"]
        self._place = {
            key: (vectors, row)
            for files in splits.values()
            for vectors in files
            for row, key in enumerate(vectors.keys)
        }

    @classmethod
    def open(
        cls, directory: Path, shards: ShardSet, *, encoder: str | None = None, verify: bool = True
    ) -> EmbeddingStore:
        """Open the embeddings of exactly these shards, by `encoder` (an `embed.encoder` value) when one is given.

        Raises InputError when there are none, StaleError when they are of other shards or by another encoder,
        IntegrityError when they are damaged.
        """
        manifest = read_manifest(directory, "embeddings")
        if manifest is None:
            raise InputError("no finished embeddings here", f"{EMBED_AGAIN} first", path=directory)
        try:
            table = {row["shard"]: row for row in manifest.extra["table"]}
            made_by, shards_digest = manifest.extra["encoder"]["encoder"], manifest.extra["shards_digest"]
        except (KeyError, TypeError) as error:
            raise IntegrityError("manifest lacks its table", EMBED_AGAIN, path=directory) from error
        if encoder is not None and encoder_name(encoder) != made_by:
            raise StaleError(
                f"embeddings are by encoder {made_by!r}, the config wants {encoder_name(encoder)!r}",
                f"{EMBED_AGAIN} --rebuild, or set embed.encoder={made_by}",
                path=directory,
            )
        if shards_digest != shards.manifest.digest:
            changed = [s.name for s in shards.shards() if table.get(s.name, {}).get("shard_sha256") != s.sha256]
            which = f"{', '.join(changed[:5])} ({len(changed)} in all)" if changed else "other shards"
            raise StaleError(f"embeddings are older than the shards: {which}", f"{EMBED_AGAIN} again", path=directory)
        if verify:
            verify_files(directory, manifest)
        splits: dict[str, list[ShardVectors]] = {split: [] for split in shards.manifest.extra["counts"]}
        for shard in shards.shards():
            path = directory / f"{shard.stem}.safetensors"
            content = read_vectors(path, verify=verify)
            if content.shard_sha256 != shard.sha256 or content.keys != shards.rationale_keys(shard):
                raise StaleError(
                    f"embeddings are not of the rationales of {shard.name}", f"{EMBED_AGAIN} again", path=path
                )
            if content.identity != manifest.extra["encoder"]:
                raise IntegrityError(
                    "is by another encoder than the manifest says", f"{EMBED_AGAIN} --rebuild", path=path
                )
            splits[shard.split].append(content)
        mean = read_tensor(directory / STATISTICS, "mean", verify=verify)[1]
        return cls(manifest, np.array(mean), splits)

    def vector(self, sample_id: str, rationale: int = 0) -> np.ndarray:
        """[E] float32, the unit vector of one rationale; raises IntegrityError when there is none."""
        try:
            vectors, row = self._place[(sample_id, rationale)]
        except KeyError:
            raise IntegrityError(f"no embedding for rationale {rationale} of {sample_id!r}", EMBED_AGAIN) from None
        return np.array(vectors.vectors[row])

    def centred(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors [..., E] float32 around the training mean; rows of zeros (no rationale) stay zeros."""
        moved = np.where(np.any(vectors != 0, axis=-1, keepdims=True), vectors - self.mean, 0).astype(np.float64)
        norms = np.linalg.norm(moved, axis=-1, keepdims=True)
        return np.divide(moved, norms, out=np.zeros_like(moved), where=norms > 0).astype(np.float32)

    def rows(self, split: str) -> tuple[list[tuple[str, int]], np.ndarray]:
        """All (id, rationale index) of a split in shard order, and their vectors [n, E] float32."""
        if split not in self._splits:
            raise InputError(f"no split {split!r}", f"there are {', '.join(sorted(self._splits))}")
        files = self._splits[split]
        keys = [key for content in files for key in content.keys]
        empty = np.empty((0, self.dimension), dtype=np.float32)
        return keys, np.concatenate([empty, *(content.vectors for content in files)])
