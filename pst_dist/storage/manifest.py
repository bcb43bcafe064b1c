"""The manifest of an artefact directory: each file with its size and sha256; it is written last.

A directory without a `manifest.json` is unfinished and is never read. Manifests contain no time and no host, so equal
inputs give equal bytes; a manifest whose bytes are not exactly those that `write_manifest` writes is damaged.
`artefact` decides whether an artefact is complete, `names` which file names are allowed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pst_dist.errors import IntegrityError, PstError
from pst_dist.storage.json_files import (
    append_line,
    canonical_json,
    json_text,
    parse_json,
    read_content,
    read_json,
    read_lines,
    read_object,
    reading,
    write_json,
)
from pst_dist.storage.names import bad_names

__all__ = [
    "MANIFEST",
    "REMAKE",
    "HashedFile",
    "Manifest",
    "all_files",
    "append_line",
    "bytes_below",
    "canonical_json",
    "describe_files",
    "digest_of",
    "hashed_file",
    "kind_written_in",
    "read_json",
    "read_lines",
    "read_manifest",
    "sha256_file",
    "verify_files",
    "write_json",
    "write_manifest",
]

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_HASHED_CHUNK = 4 << 20
_SIGN_BYTES = 64 << 20
"""`on_file` is called again after so many bytes of a file."""
REMAKE = {
    "shards": "run `pst shard` again",
    "messages": "run `pst shard --to messages` again",
    "parquet": "run `pst shard --to parquet` again",
    "embeddings": "run `pst embed` again",
    "student": "run `pst train` again",
    "evaluation": "run `pst evaluate --rebuild`",
    "export": "run `pst export` again",
    "gguf": "run `pst export --gguf TYPE` again",
    "encoder": "run `pst encoder train` again",
    "checkpoint": "`pst train` skips it and resumes from an older one",
}
"""The command that recreates each kind of directory when it is damaged."""


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path, *, on_part: Callable[[], None] = lambda: None) -> str:
    """sha256 of a file, read in 1 MiB chunks; `on_part` is called after every 64 MiB."""
    digest, unsaid = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            unsaid += len(piece)
            if unsaid >= _SIGN_BYTES:
                on_part()
                unsaid = 0
    return digest.hexdigest()


class HashedFile:
    """A file whose sha256 is computed while it is written; see `hashed_file`."""

    def __init__(self, stream: BinaryIO, hasher: Executor) -> None:
        self._stream, self._hasher = stream, hasher
        self._digest, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash; the caller may reuse `data` on return. Large pieces are hashed in a second thread."""
        view = memoryview(data)
        for start in range(0, len(view), _HASHED_CHUNK):
            piece = view[start : start + _HASHED_CHUNK]
            if len(piece) < _CHUNK:  # too small to be worth a second thread
                self._digest.update(piece)
                self._stream.write(piece)
            else:
                hashed = self._hasher.submit(self._digest.update, piece)
                try:
                    self._stream.write(piece)
                finally:
                    hashed.result()
            self._bytes += len(piece)

    @property
    def description(self) -> dict[str, Any]:
        """The entry that `describe_files` gives for the finished file, without reading it again."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


@contextlib.contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Write a new file into an unpublished directory; at the end it is fsynced and `description` is complete."""
    with ThreadPoolExecutor(1, thread_name_prefix="pst-hash") as hasher, path.open("xb") as stream:
        file = HashedFile(stream, hasher)
        yield file
        stream.flush()
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class Manifest:
    """What a finished artefact directory contains and what it was made from."""

    kind: str
    """`shards`, `embeddings`, `checkpoint`, `student`, `evaluation`, `export`, `gguf`, `messages` or `parquet`."""
    fingerprint: str
    """sha256 over everything that determines the content: inputs, settings, schema version."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative path -> {"bytes", "sha256", …}."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other facts that a reader needs: counts, encoder, step…"""

    @property
    def digest(self) -> str:
        """sha256 of the manifest itself: the name by which the next stage refers to this artefact."""
        return digest_of({"kind": self.kind, "fingerprint": self.fingerprint, "files": self.files, "extra": self.extra})


def describe_files(
    directory: Path, names: Iterable[str], *, on_file: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of each named file below `directory`; `on_file` is called before each and while it is read."""
    described = {}
    for name in sorted(names):
        on_file()
        described[name] = {
            "bytes": (directory / name).stat().st_size,
            "sha256": sha256_file(directory / name, on_part=on_file),
        }
    return described


def bytes_below(directory: Path) -> int:
    """Total size in bytes of all files below a directory; 0 when it does not exist."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def all_files(directory: Path) -> list[str]:
    """Sorted relative paths of all files below a directory except its manifest."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; every stage does this last."""
    write_json(
        directory / MANIFEST,
        {
            "kind": manifest.kind,
            "fingerprint": manifest.fingerprint,
            "files": manifest.files,
            "extra": manifest.extra,
            "digest": manifest.digest,
        },
    )


def read_manifest(directory: Path, kind: str) -> Manifest | None:
    """The manifest of a finished directory; None when it has no manifest.

    Raises IntegrityError when any byte differs from what `write_manifest` wrote, when it is of another kind, or when
    it contains a file name that is not allowed (`names`). Raises EnvironmentFault when it cannot be read.
    """
    path = directory / MANIFEST
    with reading(path):
        if not path.is_file():
            return None
    content = read_content(path)
    raw = parse_json(content, path)
    problem = _problem(raw, content, kind)
    if problem is not None:
        raise IntegrityError(
            f"not an intact {kind} manifest: {problem}",
            "delete it and rerun the command that made this directory",
            path=path,
        )
    return Manifest(raw["kind"], raw["fingerprint"], raw["files"], raw["extra"])


def kind_written_in(directory: Path) -> str | None:
    """The kind in a directory's manifest, intact or not; None when there is none."""
    try:
        kind = read_object(directory / MANIFEST).get("kind")
    except PstError:
        return None
    return kind if isinstance(kind, str) else None


def _problem(raw: Any, content: bytes, kind: str) -> str | None:
    """What is wrong with a manifest, given its parsed value and its bytes; None when it is intact."""
    if not isinstance(raw, dict) or raw.keys() != {"kind", "fingerprint", "files", "extra", "digest"}:
        return "its fields are not kind, fingerprint, files, extra and digest"
    if not isinstance(raw["kind"], str) or not isinstance(raw["fingerprint"], str):
        return "kind and fingerprint are not strings"
    if not isinstance(raw["files"], dict) or not isinstance(raw["extra"], dict):
        return "files and extra are not objects"
    try:
        digest = Manifest(raw["kind"], raw["fingerprint"], raw["files"], raw["extra"]).digest
        canonical = json_text(raw).encode()
    except (ValueError, RecursionError) as error:  # half a surrogate pair, too deep a nesting
        return str(error)[:160]
    if digest != raw["digest"]:
        return "its digest differs from its content"
    if raw["kind"] != kind:
        return f"its kind is {raw['kind'][:40]!r}"
    if canonical != content:
        return "its bytes differ from those that were written"
    for name, entry in raw["files"].items():
        if not isinstance(entry, dict) or not _is_description(entry):
            return f"the entry of file {name[:80]!r} is not a size and a sha256"
    return bad_names(raw["files"], reserved=MANIFEST)


def _is_description(entry: dict[str, Any]) -> bool:
    size, digest = entry.get("bytes"), entry.get("sha256")
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return whole and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None


def verify_files(
    directory: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
    *,
    on_file: Callable[[], None] = lambda: None,
) -> None:
    """Compare size and sha256 of files with the manifest.

    `on_file` is called before each file and after every 64 MiB of one. Raises IntegrityError naming the first file that
    is missing or differs, and EnvironmentFault for one that cannot be read.
    """
    remedy = REMAKE.get(manifest.kind, f"recreate the {manifest.kind}")
    for name in sorted(manifest.files) if names is None else names:
        on_file()
        path, promised = directory / name, manifest.files[name]
        with reading(path, remedy):
            if not path.is_file():
                raise IntegrityError("file is missing", remedy, path=path)
            size = path.stat().st_size
            if size != promised["bytes"]:
                raise IntegrityError(f"{size} bytes, manifest says {promised['bytes']}", remedy, path=path)
            if sha256_file(path, on_part=on_file) != promised["sha256"]:
                raise IntegrityError("sha256 differs from the manifest", remedy, path=path)
