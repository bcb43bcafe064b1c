"""Files in object storage, through fsspec: `s3://bucket/path`, `gs://…`, `file://…`.

An object store makes a PUT atomic, as `storage.atomic` does with a rename; so the same rules apply: files first, the
manifest last, and nobody reads a folder without one. It has no locks: two writers of one folder are not kept apart.
Their files have the same bytes, because a stage's output is a function of its inputs, and the last writer wins. Every
error is one line with the URL, raised within `_SECONDS` of the first contact.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pst_dist.errors import EnvironmentFault, InputError, IntegrityError, PstError, first_line
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.leftovers import remove_leftovers
from pst_dist.storage.locks import taking_turns
from pst_dist.storage.manifest import MANIFEST, Manifest, read_manifest, sha256_file

_T = TypeVar("_T")
_SECONDS = 30.0
"""Time limit of the first contact; the libraries' own retries take minutes."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3}}}
}


def is_url(place: str | None) -> bool:
    """Whether a `data_dir` is a URL of object storage rather than a folder."""
    return place is not None and "://" in place


@dataclass(frozen=True)
class RemoteFolder:
    """One folder of files at a URL; may be pickled and used on any machine that can reach it."""

    url: str

    def child(self, name: str) -> RemoteFolder:
        """A subfolder."""
        return RemoteFolder(f"{self.url.rstrip('/')}/{name}")

    def check(self) -> None:
        """Raise EnvironmentFault or InputError, in bounded time, when the URL cannot be reached."""
        _within_seconds(self.names, self.url)

    def names(self) -> set[str]:
        """The names of the folder's files; empty when there is no such folder."""
        with _told(self.url):
            system, path = _open(self.url)
            try:
                listing = system.ls(path, detail=False)
            except FileNotFoundError:
                bucket = path.partition("/")[0]
                if _protocol(self.url) != "file" and not system.exists(bucket):
                    raise InputError(
                        "there is no such bucket", "create it or correct data_dir", path=self.url
                    ) from None
                return set()
        return {str(entry).rstrip("/").rpartition("/")[2] for entry in listing}

    def has(self, name: str) -> bool:
        """Whether one file exists."""
        with _told(self.url):
            system, path = _open(self.url)
            return bool(system.isfile(f"{path}/{name}"))

    def manifest(self, kind: str) -> Manifest | None:
        """The manifest of the finished artefact here, else None; raises IntegrityError when damaged."""
        if not self.has(MANIFEST):
            return None
        with tempfile.TemporaryDirectory(prefix="pst-") as folder:
            self.fetch(MANIFEST, Path(folder) / MANIFEST)
            try:
                return read_manifest(Path(folder), kind)
            except IntegrityError as error:
                raise IntegrityError(error.what, error.remedy, path=f"{self.url}/{MANIFEST}") from error

    def fetch(self, name: str, target: Path, sha256: str | None = None) -> None:
        """Download a file to `target` atomically; raises IntegrityError when its digest is not `sha256`."""
        where = f"{self.url}/{name}"
        with atomic_path(target) as partial:
            with _told(where):
                system, path = _open(self.url)
                system.get_file(f"{path}/{name}", str(partial))
            if sha256 is not None and sha256_file(partial) != sha256:
                raise IntegrityError("sha256 differs from the manifest", "recreate it with --rebuild", path=where)

    def put(self, source: Path, name: str | None = None) -> None:
        """Upload a finished file atomically, under its own or another name."""
        name = name or source.name
        with _told(f"{self.url}/{name}"):
            system, path = _open(self.url)
            if _protocol(self.url) == "file":  # a local folder: copied to a temporary name and renamed
                with atomic_path(Path(path) / name) as partial:
                    partial.write_bytes(source.read_bytes())
            else:
                system.put_file(str(source), f"{path}/{name}")

    def remove(self, name: str) -> None:
        """Delete a file; a missing one is not an error."""
        with _told(self.url), contextlib.suppress(FileNotFoundError):
            system, path = _open(self.url)
            system.rm_file(f"{path}/{name}")


def fetch_folder(
    remote: RemoteFolder, mirror: Path, kind: str, *, on_file: Callable[[], None] = lambda: None
) -> Manifest | None:
    """Make `mirror` a local copy of the finished folder `remote`: fetch the files that are missing or differ.

    `on_file` is called before each file. None when there is no finished folder. Processes of one machine take turns, so
    one fetches and the others find the files present. Raises IntegrityError when a fetched file does not match the
    manifest.
    """
    mirror.mkdir(parents=True, exist_ok=True)
    with taking_turns(mirror.parent / f".{mirror.name}.fetch"):
        remove_leftovers(mirror, locked=True)
        remote.check()
        manifest = remote.manifest(kind)
        if manifest is None:
            return None
        here = mirror / MANIFEST
        if not _is_manifest_of(mirror, kind, manifest):
            here.unlink(missing_ok=True)  # the mirror is unfinished until all files have arrived
        for name, promised in sorted(manifest.files.items()):
            on_file()
            target = mirror / name
            if not target.is_file() or sha256_file(target) != promised["sha256"]:
                remote.fetch(name, target, promised["sha256"])
        if not here.is_file():
            remote.fetch(MANIFEST, here)
    return manifest


def _is_manifest_of(mirror: Path, kind: str, manifest: Manifest) -> bool:
    """Whether a mirror's manifest equals this one; False when it is damaged."""
    with contextlib.suppress(IntegrityError):
        return read_manifest(mirror, kind) == manifest
    return False


def publish_folder(folder: Path, manifest: Manifest, remote: RemoteFolder) -> None:
    """Upload a finished folder: its files first, then the manifest; then remove files of an older version.

    Does nothing when the same version is already there.
    """
    remote.check()
    before = None
    with contextlib.suppress(IntegrityError):  # a damaged manifest is replaced
        before = remote.manifest(manifest.kind)
    if before == manifest:
        return
    remote.remove(MANIFEST)
    for name in sorted(manifest.files):
        remote.put(folder / name)
    remote.put(folder / MANIFEST)
    for name in sorted((before.files if before else {}).keys() - manifest.files.keys()):
        remote.remove(name)


def _protocol(url: str) -> str:
    return url.partition("://")[0]


@functools.lru_cache(maxsize=64)
def _system(protocol: str, url: str) -> tuple[Any, str]:
    import fsspec

    options = _OPTIONS.get("s3" if protocol == "s3a" else protocol, {})
    # Listings are cached by default, and the cache would hide files that actors have uploaded since.
    listings = {} if protocol == "file" else {"use_listings_cache": False}
    return fsspec.core.url_to_fs(url.rstrip("/"), **options, **listings)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path inside it."""
    system, path = _system(_protocol(url), url)
    return system, path.rstrip("/")


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn every exception of a storage library into one of ours."""
    protocol = _protocol(where)
    try:
        yield
    except PstError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(protocol, "an fsspec package for it")
        raise EnvironmentFault(f"{protocol}:// needs {package}", f"pip install {package}", path=where) from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise InputError(f"{protocol}:// is not a known kind of storage", "correct data_dir", path=where) from error
    except FileNotFoundError as error:
        raise IntegrityError("is missing", "recreate it with --rebuild", path=where) from error
    except Exception as error:  # botocore, aiohttp, google and OS errors alike: the user's remedy is the same
        raise EnvironmentFault(
            f"the object storage failed ({type(error).__name__}: {first_line(error, 160)})",
            "check credentials, endpoint and network",
            path=where,
        ) from error


def _within_seconds(function: Callable[[], _T], where: str) -> _T:
    """The result of `function`; raises EnvironmentFault when it takes longer than `_SECONDS`."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, function()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)  # a hanging thread must not keep the process alive
    thread.start()
    thread.join(_SECONDS)
    if not outcome:
        raise EnvironmentFault(
            f"no answer from the storage within {_SECONDS:.0f} s", "check credentials, endpoint and network", path=where
        )
    good, value = outcome
    if not good:
        raise value
    return value
