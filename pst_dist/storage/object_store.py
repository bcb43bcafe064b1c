"""Files in object storage, through fsspec: `s3://bucket/path`, `gs://…`, `file://…`, each fetched whole and put whole.

An object store makes a PUT appear whole or not at all, which is what `storage` does with a rename; so the same rules
hold there: files first, the manifest last, and nobody reads a folder without one. What it lacks is a lock. Two writers
of one folder are not kept apart; their files have the same bytes, since a stage's output is a function of its inputs,
and the last one wins. Every error is one line naming the URL, within `_SECONDS` of the first contact.
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
"""The longest that a first contact may take; the libraries' own retries go on for minutes."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3}}}
}


def is_url(place: str | None) -> bool:
    """Whether a `data_dir` names object storage rather than a folder."""
    return place is not None and "://" in place


@dataclass(frozen=True)
class RemoteFolder:
    """One folder of files behind a URL; may be pickled and used on any machine that can reach it."""

    url: str

    def child(self, name: str) -> RemoteFolder:
        """A folder in this one."""
        return RemoteFolder(f"{self.url.rstrip('/')}/{name}")

    def check(self) -> None:
        """Raise EnvironmentFault or InputError, in bounded time, when the place cannot be reached."""
        _within_seconds(self.names, self.url)

    def names(self) -> set[str]:
        """The files that lie in the folder; none when there is no such folder."""
        with _told(self.url):
            system, path = _open(self.url)
            try:
                listing = system.ls(path, detail=False)
            except FileNotFoundError:
                bucket = path.partition("/")[0]
                if _protocol(self.url) != "file" and not system.exists(bucket):
                    raise InputError("there is no such bucket", "make it, or see data_dir", path=self.url) from None
                return set()
        return {str(entry).rstrip("/").rpartition("/")[2] for entry in listing}

    def has(self, name: str) -> bool:
        """Whether one file is there."""
        with _told(self.url):
            system, path = _open(self.url)
            return bool(system.isfile(f"{path}/{name}"))

    def manifest(self, kind: str) -> Manifest | None:
        """The manifest of the finished stage that lies there, else None; raises IntegrityError when damaged."""
        if not self.has(MANIFEST):
            return None
        with tempfile.TemporaryDirectory(prefix="pst-") as folder:
            self.fetch(MANIFEST, Path(folder) / MANIFEST)
            try:
                return read_manifest(Path(folder), kind)
            except IntegrityError as error:
                raise IntegrityError(error.what, error.remedy, path=f"{self.url}/{MANIFEST}") from error

    def fetch(self, name: str, target: Path, sha256: str | None = None) -> None:
        """Copy a file to `target`, whole or not at all; raises IntegrityError when it is not the promised one."""
        where = f"{self.url}/{name}"
        with atomic_path(target) as partial:
            with _told(where):
                system, path = _open(self.url)
                system.get_file(f"{path}/{name}", str(partial))
            if sha256 is not None and sha256_file(partial) != sha256:
                raise IntegrityError("sha256 differs from the manifest", "make it again with --rebuild", path=where)

    def put(self, source: Path, name: str | None = None) -> None:
        """Copy a finished file there under its own or another name, whole or not at all."""
        name = name or source.name
        with _told(f"{self.url}/{name}"):
            system, path = _open(self.url)
            if _protocol(self.url) == "file":  # a folder, after all: copied beside and renamed
                with atomic_path(Path(path) / name) as partial:
                    partial.write_bytes(source.read_bytes())
            else:
                system.put_file(str(source), f"{path}/{name}")

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        with _told(self.url), contextlib.suppress(FileNotFoundError):
            system, path = _open(self.url)
            system.rm_file(f"{path}/{name}")


def fetch_folder(
    remote: RemoteFolder, mirror: Path, kind: str, *, on_file: Callable[[], None] = lambda: None
) -> Manifest | None:
    """Make `mirror` the finished folder that `remote` is: fetch what is not there with the promised bytes.

    `on_file` is called before each file. None when there is no finished folder. Processes of one machine take turns, so
    that one fetches and the others find everything there. Raises IntegrityError when a fetched file is not what the
    manifest promises.
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
            here.unlink(missing_ok=True)  # until all is there the mirror is unfinished, and says so
        for name, promised in sorted(manifest.files.items()):
            on_file()
            target = mirror / name
            if not target.is_file() or sha256_file(target) != promised["sha256"]:
                remote.fetch(name, target, promised["sha256"])
        if not here.is_file():
            remote.fetch(MANIFEST, here)
    return manifest


def _is_manifest_of(mirror: Path, kind: str, manifest: Manifest) -> bool:
    """Whether a mirror's own manifest is this one; a damaged one is not."""
    with contextlib.suppress(IntegrityError):
        return read_manifest(mirror, kind) == manifest
    return False


def publish_folder(folder: Path, manifest: Manifest, remote: RemoteFolder) -> None:
    """Put a finished folder there: its files first, then the manifest, then away with files of an older one.

    Nothing is moved when it is there already.
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
    # Listings are kept by default, and would hide what actors have put there since.
    listings = {} if protocol == "file" else {"use_listings_cache": False}
    return fsspec.core.url_to_fs(url.rstrip("/"), **options, **listings)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    system, path = _system(_protocol(url), url)
    return system, path.rstrip("/")


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn whatever a storage library raises into one line."""
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
        raise InputError(f"there is no storage {protocol}://", "see data_dir", path=where) from error
    except FileNotFoundError as error:
        raise IntegrityError("is not there", "make it again with --rebuild", path=where) from error
    except Exception as error:  # botocore, aiohttp, google and OS errors alike: the user's remedy is the same
        raise EnvironmentFault(
            f"storage does not answer as it should ({type(error).__name__}: {first_line(error, 160)})",
            "check credentials, endpoint and network",
            path=where,
        ) from error


def _within_seconds(function: Callable[[], _T], where: str) -> _T:
    """What `function` returns; raises EnvironmentFault when it takes longer than a person will wait."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, function()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)  # one that hangs must not keep the process
    thread.start()
    thread.join(_SECONDS)
    if not outcome:
        raise EnvironmentFault(
            f"storage has not answered within {_SECONDS:.0f} s", "check credentials, endpoint and network", path=where
        )
    good, value = outcome
    if not good:
        raise value
    return value
