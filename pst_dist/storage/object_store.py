"""Files in object storage, through fsspec: `s3://bucket/path`, `gs://…`, `file://…`.

An object store makes a PUT atomic, as `storage.atomic` does with a rename; so the same rules apply: files first, the
manifest last, and nobody reads a folder without one. It has no locks: two writers of one folder are not kept apart.
Their files have the same bytes, because a stage's output is a function of its inputs, and the last writer wins. Every
error is one line with the URL, raised within `_SECONDS` of the first contact. `stored_objects` reads single objects
that others wrote.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pst_dist.errors import EnvironmentFault, InputError, IntegrityError, PstError, first_line
from pst_dist.logs import LOG_EVERY_SECONDS
from pst_dist.storage.atomic import atomic_path
from pst_dist.storage.leftovers import remove_leftovers
from pst_dist.storage.locks import taking_turns
from pst_dist.storage.manifest import MANIFEST, Manifest, read_manifest, sha256_file
from pst_dist.text.redaction import redact

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_SECONDS = 30.0
"""Time limit of the first contact; the libraries' own retries take minutes."""
_PACKAGES = {
    **{"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"},
    **{"abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp"},
}
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
        within_seconds(self.names, self.url)

    def names(self) -> set[str]:
        """The names of the folder's files; empty when there is no such folder."""
        with store_errors(self.url):
            system, path = open_url(self.url)
            try:
                listing = system.ls(path, detail=False)
            except FileNotFoundError:
                if lacks_bucket(system, path, self.url):
                    raise InputError(
                        "there is no such bucket", "create it or correct data_dir", path=self.url
                    ) from None
                return set()
        return {str(entry).rstrip("/").rpartition("/")[2] for entry in listing}

    def has(self, name: str) -> bool:
        """Whether one file exists."""
        with store_errors(self.url):
            system, path = open_url(self.url)
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
            with store_errors(where):
                system, path = open_url(self.url)
                system.get_file(f"{path}/{name}", str(partial))
            if sha256 is not None and sha256_file(partial) != sha256:
                raise IntegrityError("sha256 differs from the manifest", "recreate it with --rebuild", path=where)

    def put(self, source: Path, name: str | None = None) -> None:
        """Upload a finished file atomically, under its own or another name."""
        name = name or source.name
        with store_errors(f"{self.url}/{name}"):
            system, path = open_url(self.url)
            if protocol_of(self.url) == "file":  # a local folder: copied to a temporary name and renamed
                with atomic_path(Path(path) / name) as partial:
                    partial.write_bytes(source.read_bytes())
            else:
                system.put_file(str(source), f"{path}/{name}")

    def remove(self, name: str) -> None:
        """Delete a file; a missing one is not an error."""
        with store_errors(self.url), contextlib.suppress(FileNotFoundError):
            system, path = open_url(self.url)
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


def protocol_of(url: str) -> str:
    """The part before `://`, in lower case."""
    return url.partition("://")[0].lower()


@functools.lru_cache(maxsize=64)
def _system(protocol: str, url: str) -> tuple[Any, str]:
    import fsspec

    given = _OPTIONS.get("s3" if protocol == "s3a" else protocol, {})
    options = _http_options() if protocol in ("http", "https") else given
    # Listings are cached by default, and the cache would hide files that actors have uploaded since.
    listings = {} if protocol == "file" else {"use_listings_cache": False}
    return fsspec.core.url_to_fs(url.rstrip("/"), **options, **listings)


def _http_options() -> dict[str, Any]:
    """Bytes as the server stores them, no limit on the whole download (aiohttp's is five minutes), and proxies."""
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    headers = {"Accept-Encoding": "identity"}
    return {"client_kwargs": {"timeout": limits, "headers": headers, "auto_decompress": False, "trust_env": True}}


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path inside it."""
    system, path = _system(protocol_of(url), url)
    return system, path.rstrip("/")


def lacks_bucket(system: Any, path: str, url: str) -> bool:
    """Whether a path is missing because its whole bucket is."""
    bucket = path.partition("/")[0]
    return bucket != "" and protocol_of(url) not in ("file", "http", "https") and not system.exists(bucket)


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turn every exception of a storage library into one of ours."""
    protocol = protocol_of(where)
    try:
        yield
    except PstError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(protocol, "an fsspec package for it")
        raise EnvironmentFault(f"{protocol}:// needs {package}", f"pip install {package}", path=where) from error
    except FileNotFoundError as error:
        raise IntegrityError("is missing", "recreate it with --rebuild", path=where) from error
    except Exception as error:  # botocore, aiohttp, google and OS errors alike: the user's remedy is the same
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise InputError(f"{protocol}:// is not a known kind of storage", "correct the URL", path=where) from error
        raise EnvironmentFault(
            f"the object storage failed ({type(error).__name__}: {redact(first_line(error))[:160]})",
            "check credentials, endpoint and network",
            path=where,
        ) from error


def within_seconds(function: Callable[[], _T], where: str, seconds: float | None = None) -> _T:
    """The result of `function`; raises EnvironmentFault when it takes longer than `seconds` (default `_SECONDS`)."""
    left = _SECONDS if seconds is None else seconds
    told = f"no answer from the storage within {left:.0f} s"
    work = InBackground(function)
    while not work.ended(min(left, LOG_EVERY_SECONDS)):
        left -= LOG_EVERY_SECONDS
        if left <= 0:
            raise EnvironmentFault(told, "check credentials, endpoint and network", path=where)
        log.info("waiting for an answer about %s", redact(where))
    return work.result()


class InBackground(Generic[_T]):
    """A call of a storage library in its own thread, so that this one can report, or give up on, a hanging one."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._outcome: list[tuple[_T | None, BaseException | None]] = []

        def run() -> None:
            try:
                self._outcome.append((function(), None))
            except BaseException as error:
                self._outcome.append((None, error))

        self._thread = threading.Thread(target=run, daemon=True)  # a hanging one must not keep the process alive
        self._thread.start()

    def ended(self, seconds: float) -> bool:
        """Wait at most so long for its end."""
        self._thread.join(seconds)
        return bool(self._outcome)

    def result(self) -> _T:
        """What it returned, once it has ended; raises what it raised."""
        value, error = self._outcome[0]
        if error is not None:
            raise error
        return cast("_T", value)
