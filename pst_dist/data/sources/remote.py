"""Rows in object storage: each file is copied to this machine once, and then read like any other.

A copy is complete or absent, and a note beside it says which version of which object it is. The store says whether it
still has that version, so an unchanged file is not fetched again. Rows, errors and records name the URL, without its
secrets; only this module knows both.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pst_dist.data.sources.compressed import data_suffix
from pst_dist.data.sources.readers import SUFFIXES, refuse_other_formats
from pst_dist.data.sources.rows import Entry, Input
from pst_dist.data.sources.strict_json import Line
from pst_dist.errors import InputError, PstError
from pst_dist.logs import progress
from pst_dist.storage.json_files import read_object
from pst_dist.storage.locks import taking_turns
from pst_dist.storage.manifest import write_json
from pst_dist.storage.stamps import stamp_of
from pst_dist.storage.stored_objects import StoredObject, download, find, has_pattern, look_up, match
from pst_dist.text.redaction import redact
from pst_dist.text.urls import url_name


@dataclass
class RemoteSource:
    """A file in object storage, or a folder of one dataset, and the place of its copy."""

    where: str
    """The URL without secrets, by which rows, errors and records name it."""
    copy: Path
    """A file or folder of this machine, once `bring` has fetched it."""
    objects: Mapping[Path, StoredObject]
    """The copy of each file -> what the store says about it; in the order of the copies' paths."""
    is_folder: bool = False
    is_here: bool = False
    """Whether `bring` has seen to the copy in this process."""

    def inputs(self) -> Iterator[tuple[str, StoredObject]]:
        """The name and the object of each input that reading the copy will give."""
        return ((redact(one.url), one) for one in self.objects.values())

    def input(self, one: Input) -> Input:
        """The record of a copy that was read, as a record of the object."""
        stored = self.objects[Path(one.name)]
        return replace(one, name=redact(stored.url), version=stored.lasting_version, mtime_ns=None, ctime_ns=None)

    def renamed(self, item: Line | Entry) -> Line | Entry:
        """A row of the copy with the URL as its path."""
        return item._replace(path=self.where) if isinstance(item, Line) else replace(item, path=self.where)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Let errors about the copy name the URL."""
        try:
            yield
        except PstError as error:
            names = {str(path): redact(one.url) for path, one in self.objects.items()} | {str(self.copy): self.where}
            if str(error.path) not in names:
                raise
            raise type(error)(error.what, error.remedy, path=names[str(error.path)], line=error.line) from error

    def missing(self) -> dict[Path, StoredObject]:
        """The files without a copy of this version."""
        if self.is_here:
            return {}
        held = self._noted()
        return {
            path: stored
            for path, stored in self.objects.items()
            if stored.lasting_version is None or held.get(self._name(path)) != _held(path, stored)
        }

    def keep(self, path: Path) -> None:
        """Note that a file has its copy."""
        held = self._noted()
        names = [self._name(one) for one in self.objects]
        held = {name: held[name] for name in names if name in held}
        write_json(self._note, {**held, self._name(path): _held(path, self.objects[path])})

    @property
    def _note(self) -> Path:
        return self.copy.with_name(f".{self.copy.name}.json")

    def _noted(self) -> dict[str, Any]:
        with contextlib.suppress(PstError):
            return read_object(self._note)
        return {}

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.copy.parent))


def _held(path: Path, stored: StoredObject) -> dict[str, Any]:
    return {"version": stored.lasting_version, "bytes": stored.bytes, "copy": stamp_of(path)}


def remote_sources(url: str, copies: Path, split: str = "") -> list[RemoteSource]:
    """The files, or the folder of a dataset's `split`, at a URL or pattern; fetches nothing. No `split`: files only.

    Raises InputError if nothing is stored there or it cannot be a source, and EnvironmentFault, in bounded time, if the
    store does not answer.
    """
    found = match(url) if has_pattern(url) else [look_up(url)]
    if not found:
        raise InputError("no object matches", "check the pattern and data.root", path=redact(url))
    return [_folder(one, copies, split) if one.is_folder else _file(one, copies, split) for one in found]


def _file(stored: StoredObject, copies: Path, split: str) -> RemoteSource:
    copy, where = _place(stored.url, copies), redact(stored.url)
    if split:
        try:
            refuse_other_formats(copy)
        except InputError as error:
            raise InputError(error.what, error.remedy, path=where) from None
    return RemoteSource(where, copy, {copy: stored})


def _folder(stored: StoredObject, copies: Path, split: str) -> RemoteSource:
    """A folder written by `save_to_disk`; of several splits only the one that is read."""
    url = stored.url.rstrip("/")
    found = {one.url.removeprefix(url).lstrip("/"): one for one in find(url)}
    if split and "dataset_dict.json" in found:
        names = sorted({name.partition("/")[0] for name in found if "/" in name})
        if split not in names:
            remedy = f"name the folder of one of its splits: {', '.join(names)}"
            raise InputError(f"the dataset has no split {split!r}", remedy, path=redact(url))
        found = {name.removeprefix(f"{split}/"): one for name, one in found.items() if name.startswith(f"{split}/")}
        url = f"{url}/{split}"
    if not split or "state.json" not in found:
        suffixes = sorted(data_suffix(name) for name in found if "/" not in name and data_suffix(name) in SUFFIXES)
        what = "is a folder, but was not written by save_to_disk" if split else "is a folder"
        remedy = f"to read the files in it use '{redact(url)}/*{suffixes[0]}'" if suffixes else "name a file"
        raise InputError(what, remedy, path=redact(url))
    for name in found:
        if ".." in name.split("/") or "\0" in name:
            raise InputError(f"has an object named {name!r}", "remove it", path=redact(url))
    copy = _place(url, copies)
    objects = {copy / name: one for name, one in found.items()}
    return RemoteSource(redact(url), copy, {path: objects[path] for path in sorted(objects)}, is_folder=True)


def _place(url: str, copies: Path) -> Path:
    """Where the copy is: its name is that of the file, because the ids of rows begin with it."""
    name = url_name(url)
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise InputError("names no file", "check the URL", path=redact(url))
    # Two signed addresses of a file differ in their secrets only.
    return copies.absolute() / hashlib.sha256(redact(url).encode()).hexdigest()[:16] / name


def bring(sources: Sequence[RemoteSource], copies: Path) -> None:
    """Fetch what is missing or has changed, with progress; processes of one machine take turns.

    Raises as `download`, and EnvironmentFault when the copies cannot be written.
    """
    if any(source.missing() for source in sources):
        with taking_turns(copies / ".fetch", "fetches rows"):
            _fetch([(source, path) for source in sources for path in source.missing()])
            for source in sources:
                _remove_others(source)
    for source in sources:
        source.is_here = True


def _fetch(wanted: Sequence[tuple[RemoteSource, Path]]) -> None:
    if not wanted:
        return  # another process fetched it
    sizes = [source.objects[path].bytes for source, path in wanted]
    what = f"{len(wanted)} files" if len(wanted) > 1 else wanted[0][1].name
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with progress(f"fetch {what}", total, "bytes") as bar:
        for source, path in wanted:
            download(source.objects[path], path, bar.advance)
            source.keep(path)


def _remove_others(source: RemoteSource) -> None:
    """Remove files that an earlier version of a dataset had."""
    if source.is_folder:
        for path in source.copy.rglob("*"):
            if not path.is_dir() and path not in source.objects:
                path.unlink()
