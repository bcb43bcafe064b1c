"""The one place that writes files: whole or absent, with a sha256 for each.

Every artefact directory ends with a `manifest.json`, written last; a directory without one is unfinished
and is never read. Manifests hold no clock and no host, so equal inputs give equal bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.errors import EnvironmentFault, IntegrityError, LockedError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_CLOCK_SECONDS = 30.0
_FULL = ("os error 28", "No space left on device", "PytorchStreamWriter failed writing", "file write failed")
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})([0-9a-f]{8})([0-9a-f]{4})\.(partial|replaced)")
_FOREIGN_SECONDS = 24 * 3600.0
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


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one line that names path and remedy."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError):
            # safetensors and torch write by themselves and raise kinds of their own when the disk is full.
            if not any(words in str(error) for words in _FULL):
                raise
            raise EnvironmentFault("cannot write: No space left on device", _make_room(path), path=path) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = _make_room(path)
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = "choose a directory that this user may write to"
        elif error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
            remedy = "no file can be made there: choose another place"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            remedy = "something else stands at that place: move it or choose another directory"
        else:
            raise
        raise EnvironmentFault(f"cannot write: {error.strerror}", remedy, path=path) from error


def _make_room(path: Path) -> str:
    free = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free
    return f"{free / 2**20:.0f} MiB are free: make room and run the same command again"


@functools.cache
def _origin() -> str:
    """8 hex digits for the set of processes whose ids can be told apart here: this boot, this container."""
    facts = [os.uname().nodename]
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            facts.append(os.readlink(place) if place.endswith("pid") else Path(place).read_text())
    return digest_of(facts)[:8]


def _temporary(path: Path, ending: str) -> Path:
    """A name beside `path` that no other process uses and that says whose it is; see `_remove_abandoned`."""
    return path.with_name(f".{path.name}.{_origin()}{os.getpid():08x}{uuid.uuid4().hex[:4]}.{ending}")


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left while they wrote `path`: theirs are the names whose process is no more.

    Those of other machines and earlier boots are taken for abandoned when nothing has touched them for a day.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = _TEMPORARY.fullmatch(leftover.name)
        if found is None or leftover.name != f".{path.name}.{found[1]}{found[2]}{found[3]}.{found[4]}":
            continue
        with contextlib.suppress(OSError):
            if found[1] == _origin():
                abandoned = not _is_running(int(found[2], 16))
            else:
                abandoned = time.time() - leftover.stat().st_mtime > _FOREIGN_SECONDS
            if abandoned and leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif abandoned:
                leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed, on failure removed."""
    partial = _temporary(path, "partial")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            yield partial
            _fsync_path(partial)
            os.replace(partial, path)
            _fsync_path(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success its files are fsynced and it takes that name.

    An older directory of that name is replaced: it is renamed away first and removed afterwards, so a reader
    sees the old one, the new one, or (for one instant) none, but never a mixture.
    """
    partial = _temporary(path, "partial")
    with disk_errors(path):
        try:
            _remove_abandoned(path)
            partial.mkdir(parents=True)
            yield partial
            publish_directory(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish_directory(partial: Path, path: Path) -> None:
    """fsync every file of `partial` and rename it to `path`, replacing what was there."""
    with disk_errors(path):
        for entry in sorted(partial.rglob("*")):
            _fsync_path(entry)
        _fsync_path(partial)
        replaced = None
        if path.exists():
            replaced = _temporary(path, "replaced")
            os.replace(path, replaced)
        os.replace(partial, path)
        _fsync_path(path.parent)
        if replaced is not None:
            shutil.rmtree(replaced)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


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


@contextlib.contextmanager
def directory_lock(directory: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold `directory/.lock` for this process; raises LockedError when another process holds it.

    The lock is the kernel's (flock), so it vanishes with its process however that ends. `wait_seconds` is for whoever
    knows that the holder is about to end.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / ".lock").open("a+")
    with stream:
        patient_until = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < patient_until:
                    time.sleep(0.1)
                    continue
                stream.seek(0)
                owner = stream.read().strip() or "another process"
                raise LockedError(
                    f"in use by {owner}", "wait for it to end or choose another directory", path=directory
                ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {os.uname().nodename}")
        stream.flush()
        yield


def try_place(folder: Path) -> list[str]:
    """Write, fsync, lock, rename and remove in a temporary folder below `folder`; returns what does not work there.

    The directory that is tried is the nearest one that exists; nothing is left behind. Raises EnvironmentFault when
    nothing can be written at all. What can hang here is the file system: the caller limits the time.
    """
    ground = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    faults = []
    with disk_errors(ground):
        place = Path(tempfile.mkdtemp(prefix=".pst-try-", dir=ground))
        try:
            write_text(place / "old", "old")
            write_text(place / "new", "x" * _CHUNK)
            # As every artefact is published: over an older one, and whole directories too.
            os.replace(place / "new", place / "old")
            if (place / "new").exists() or (place / "old").stat().st_size != _CHUNK:
                faults.append("a rename does not replace the older file")
            skew = (place / "old").stat().st_mtime - time.time()
            if abs(skew) > _CLOCK_SECONDS:
                faults.append(f"its clock and this machine's differ by {abs(skew):.0f} s")
            with contextlib.ExitStack() as stack:
                streams = [stack.enter_context((place / "lock").open("a+")) for _ in range(2)]
                try:
                    fcntl.flock(streams[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    faults.append(f"files cannot be locked ({error.strerror})")
                else:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(streams[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                        faults.append("a lock does not keep a second process out")
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return faults


def lock_holder(directory: Path) -> str | None:
    """Who holds `directory/.lock`, as `directory_lock` wrote it there; None when nobody does. Changes nothing."""
    try:
        stream = (directory / ".lock").open("r")
    except OSError:
        return None
    with stream:
        try:
            # Shared, and for an instant only; a lock that is held is exclusive and refuses it.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "another process"
    return None


@contextlib.contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for this process, waiting for it; the kernel's, as `directory_lock` is."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
