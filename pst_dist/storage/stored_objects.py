"""Single objects in storage that others wrote: what the store says about them, and their download to this machine.

An object is recognised by its size and by what the store changes with its content: a generation, an ETag, a digest, or
else the time of the last change. `object_store` opens the storage and names its errors.
"""

from __future__ import annotations

import datetime
import email.utils
import glob
import os
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.storage.atomic import OUT_OF_ROOM, atomic_path, fault_of
from pst_dist.storage.object_store import (
    InBackground,
    lacks_bucket,
    open_url,
    protocol_of,
    store_errors,
    within_seconds,
)

_LISTING_SECONDS = 600.0
_WATCH_SECONDS = 0.5
_VERSIONS = ("generation", "ETag", "etag", "content_md5", "Content-MD5", "md5Hash")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")
_COARSEST_TIME_SECONDS = 2.0
"""HTTP gives times in whole seconds; a second change within one leaves the time alone."""
_WEB = ("http", "https")


@dataclass(frozen=True)
class StoredObject:
    """An object, or a folder of them, as the store described it."""

    url: str = field(repr=False)
    """As it is opened; it may contain a secret."""
    bytes: int | None = None
    """None where an HTTP server does not say."""
    version: str | None = None
    """Changes with the content; None where the store gives nothing of that kind."""
    settled: bool = False
    """Whether any later change will change the version; not so for a time that is only moments ago."""
    is_folder: bool = False

    @property
    def lasting_version(self) -> str | None:
        """The version, if an equal one will mean equal content."""
        return self.version if self.settled else None


def look_up(url: str) -> StoredObject:
    """What is stored at a URL.

    Raises InputError when nothing is, and EnvironmentFault, in bounded time, when the store cannot be reached, refuses
    access or needs a package.
    """
    return within_seconds(lambda: _look_up(url), url)


def _look_up(url: str) -> StoredObject:
    with store_errors(url):
        system, path = open_url(url)
        try:
            info = system.info(path)
        except FileNotFoundError as error:
            cause = error.__cause__
            status = getattr(cause, "status", None)
            if protocol_of(url) in _WEB and cause is not None and status not in (404, 410):
                if status in (401, 403):
                    raise EnvironmentFault(
                        f"the server refuses access (HTTP {status})", "check the credentials", path=url
                    ) from None
                raise cause from None  # fsspec calls every failure of a web server a missing file
            if lacks_bucket(system, path, url):
                raise InputError("there is no such bucket", "check the URL", path=url) from None
            raise InputError("there is no such object", "check the URL", path=url) from None
        return _described(url, info)


def has_pattern(url: str) -> bool:
    """Whether a URL is a pattern for several objects; a `?` in a web address begins its query."""
    if protocol_of(url) in _WEB:
        return "*" in urllib.parse.urlsplit(url).path
    return glob.has_magic(url)


def match(pattern: str) -> list[StoredObject]:
    """The objects and folders that match a URL with `*`, `?` or `[`, sorted by name. Raises as `look_up` does, except
    when none matches, and InputError for a web address, whose server has no list."""
    if protocol_of(pattern) in _WEB:
        raise InputError("a web server does not list its files", "name each file", path=pattern)
    magic = min(pattern.index(character) for character in "*?[" if character in pattern)
    base = pattern[: pattern.rindex("/", 0, magic) + 1]

    def listed() -> list[StoredObject]:
        with store_errors(pattern):
            system, path = open_url(pattern)
            found = system.glob(path, detail=True)
            if not found and lacks_bucket(system, path, pattern):
                raise InputError("there is no such bucket", "check the URL", path=pattern)
            return _below(base, system, found)

    return within_seconds(listed, pattern, _LISTING_SECONDS)


def find(folder: str) -> list[StoredObject]:
    """All objects below a folder, sorted by name; raises as `look_up` does."""
    base = folder.rstrip("/") + "/"

    def listed() -> list[StoredObject]:
        with store_errors(folder):
            system, path = open_url(folder)
            found = _below(base, system, system.find(path, detail=True))
            # Some programs store an empty object for each folder.
            return [one for one in found if not one.is_folder and not one.url.endswith("/")]

    return within_seconds(listed, folder, _LISTING_SECONDS)


def _below(base: str, system: Any, found: Mapping[str, Mapping[str, Any]]) -> list[StoredObject]:
    """What a listing has, with its URLs; `base` ends with a slash."""
    length = len(system._strip_protocol(base).rstrip("/"))
    return [_described(base + name[length:].lstrip("/"), info) for name, info in sorted(found.items())]


def _described(url: str, info: Mapping[str, Any]) -> StoredObject:
    if info["type"] == "directory":
        return StoredObject(url, is_folder=True)
    for key in _VERSIONS:
        if info.get(key):
            return StoredObject(url, info.get("size"), f"{key} {info[key]}", settled=True)
    for key in _TIMES:
        if info.get(key):
            changed = _seconds(info[key])
            settled = changed is not None and changed < time.time() - _COARSEST_TIME_SECONDS
            # A listing may give fractions of a second, and another name, where the object itself does not.
            when = info[key] if changed is None else int(changed)
            return StoredObject(url, info.get("size"), f"changed {when}", settled)
    return StoredObject(url, info.get("size"))


def _seconds(when: Any) -> float | None:
    """A time as seconds since 1970; None where it cannot be read."""
    try:
        if isinstance(when, str):
            when = email.utils.parsedate_to_datetime(when)
        return when.timestamp() if isinstance(when, datetime.datetime) else float(when)
    except (TypeError, ValueError):
        return None


def download(found: StoredObject, target: Path, on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Write an object to `target`, whole or not at all; `on_bytes` is told twice a second how many more have arrived.

    Raises InputError when the object is not the one that was `found`, or changed meanwhile, and EnvironmentFault when
    the download fails or ends early.
    """
    from fsspec.callbacks import Callback

    arrived, told = Callback(), 0

    def fetch() -> None:
        with store_errors(found.url):
            system, path = open_url(found.url)
            try:
                system.get_file(path, str(partial), callback=arrived)
            except FileNotFoundError:
                raise InputError("the object was removed while it was read", "check the URL", path=found.url) from None
            except OSError as error:  # the libraries give errors of the store these types and numbers, too
                fault = fault_of(error, target) if error.errno in OUT_OF_ROOM else None
                raise fault or error from error

    with atomic_path(target) as partial:
        work = InBackground(fetch)
        ended = False
        while not ended:
            ended = work.ended(_WATCH_SECONDS)
            count = int(arrived.value)
            on_bytes(count - told)
            told = count
        work.result()
        size = os.stat(partial).st_size
        now = look_up(found.url)
        if (now.version, now.bytes) != (found.version, found.bytes):
            raise InputError("the object changed while it was read", "run again when it is complete", path=found.url)
        if found.bytes is not None and size != found.bytes:
            raise EnvironmentFault(
                f"the download ended after {size:,} of {found.bytes:,} bytes",
                "check the network and run the same command again",
                path=found.url,
            )
