"""What an artefact directory holds: files with a sha256 for each, and a manifest that is written last.

A directory without a `manifest.json` is unfinished and is never read. Manifests hold no clock and no host, so equal
inputs give equal bytes. How a file comes to be whole or absent is `atomic`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pst_dist.errors import IntegrityError
from pst_dist.storage.atomic import disk_errors, write_text

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_HASHED_CHUNK = 4 << 20
REMAKE = {
    "shards": "run `pst shard` again",
    "embeddings": "run `pst embed` again",
    "student": "run `pst train` again",
    "evaluation": "run `pst evaluate --rebuild`",
    "export": "run `pst export` again",
    "checkpoint": "`pst train` passes it over and goes on from an older one",
}
"""The command that makes each kind of directory anew when it is damaged."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the form that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


class HashedFile:
    """A file being written whose sha256 is taken of the very bytes on their way to it; see `hashed_file`."""

    def __init__(self, stream: BinaryIO, hasher: Executor) -> None:
        self._stream, self._hasher = stream, hasher
        self._digest, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash; `data` is free again on return. A large piece is hashed beside its writing."""
        view = memoryview(data)
        for start in range(0, len(view), _HASHED_CHUNK):
            piece = view[start : start + _HASHED_CHUNK]
            if len(piece) < _CHUNK:  # not worth a word with another thread
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
        """What `describe_files` says of the finished file, without reading it."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


@contextlib.contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Write a new file into a directory that is not published yet; at the end it is on disk and described."""
    with ThreadPoolExecutor(1, thread_name_prefix="pst-hash") as hasher, path.open("xb") as stream:
        file = HashedFile(stream, hasher)
        yield file
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote; raises IntegrityError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"not JSON: {error}", "delete it and run the command that made it", path=path) from error


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line and flush it; a torn last line is the reader's to skip."""
    with disk_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(canonical_json(value) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file that `append_line` wrote; a torn last line is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


@dataclass(frozen=True)
class Manifest:
    """What a finished artefact directory holds and what it was made from."""

    kind: str
    """`shards`, `embeddings`, `checkpoint`, `student`, `evaluation` or `export`."""
    fingerprint: str
    """sha256 over everything that determines the content: inputs, settings, schema version."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative path -> {"bytes", "sha256", …}."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else a reader needs: counts, encoder, step…"""

    @property
    def digest(self) -> str:
        """sha256 of the manifest itself: the name by which the next stage refers to this artefact."""
        return digest_of({"kind": self.kind, "fingerprint": self.fingerprint, "files": self.files, "extra": self.extra})


def describe_files(
    directory: Path, names: Iterable[str], *, on_file: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of each named file below `directory`; `on_file` is called before each."""
    described = {}
    for name in sorted(names):
        on_file()
        described[name] = {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
    return described


def bytes_below(directory: Path) -> int:
    """Bytes of every file below a directory; 0 when it is not there."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def all_files(directory: Path) -> list[str]:
    """Relative paths of every file below a directory but its manifest, sorted."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`: the last act of every stage."""
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
    """The manifest of a finished directory, or None when there is none; raises IntegrityError when damaged."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    raw = read_json(path)
    try:
        manifest = Manifest(raw["kind"], raw["fingerprint"], raw["files"], raw["extra"])
        intact = manifest.digest == raw["digest"] and manifest.kind == kind
    except (KeyError, TypeError):
        intact = False
    if not intact:
        raise IntegrityError(
            f"not an intact {kind} manifest", "delete it and run the command that made this directory", path=path
        )
    return manifest


def verify_files(
    directory: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
    *,
    on_file: Callable[[], None] = lambda: None,
) -> None:
    """Compare size and sha256 of files with the manifest; raises IntegrityError naming the first that differs.

    `on_file` is called before each file.
    """
    remedy = REMAKE.get(manifest.kind, f"make the {manifest.kind} again")
    for name in sorted(manifest.files) if names is None else names:
        on_file()
        path, promised = directory / name, manifest.files[name]
        if not path.is_file():
            raise IntegrityError("file is missing", remedy, path=path)
        size = path.stat().st_size
        if size != promised["bytes"]:
            raise IntegrityError(f"{size} bytes, manifest says {promised['bytes']}", remedy, path=path)
        if sha256_file(path) != promised["sha256"]:
            raise IntegrityError("sha256 differs from the manifest", remedy, path=path)
