"""What the words of a config that name sources stand for: `data.root`, URLs, and where copies of remote files are kept.

`specs` and `completions` find the files that a word names, `remote` fetches those in object storage.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sources.remote import RemoteSource, bring, remote_sources
from pst_dist.data.sources.rows import Input
from pst_dist.errors import ConfigError, InputError
from pst_dist.text.redaction import is_redacted, redact
from pst_dist.text.urls import has_scheme, is_whole_url

_LOCAL = ("file://", "local://")


@dataclass(frozen=True)
class SourceRoot:
    """Where the relative paths of a config start, and where the copies of its remote files are."""

    root: str
    """A folder or a URL; empty for the working directory."""
    copies: Path
    """A folder of this machine; it is created when something is fetched."""

    @classmethod
    def of(cls, config: Config) -> SourceRoot:
        """`data.root`, and a folder in data_cache or in the run's data."""
        return cls(config.data.root or "", Path(config.data_cache or run_dir(config).data) / "rows")

    @property
    def here(self) -> SourceRoot:
        """The same with paths that start at the working directory, as those on a command line do."""
        return SourceRoot("", self.copies)

    def place(self, word: str) -> Path | str:
        """The path that a word names, or else its URL; raises ConfigError or InputError for a URL without its secret
        or its second slash."""
        root = "" if is_whole_url(word) else self.root
        path = Path(word).expanduser()
        if is_whole_url(root) and not path.is_absolute():
            relative = posixpath.normpath(word)
            if relative.startswith(".."):
                raise InputError(f"{word!r} is outside of data.root", "name it by its URL", path=redact(root))
            word = f"{root.rstrip('/')}/{relative}"
        if word.startswith(_LOCAL):
            return Path(word.partition("://")[2])
        if is_whole_url(word):
            if is_redacted(word):
                raise ConfigError(f"{word}: its secret was not saved", "give the URL again")
            return word
        full = Path("" if is_whole_url(root) else root).expanduser() / path
        if has_scheme(word) and not full.exists():
            raise InputError("is a URL with a single slash", "give it as text, not as a pathlib.Path", path=word)
        return full

    def find(self, word: str) -> DataFile | RemoteSource:
        """The one file that a word names; fetches nothing. A missing file of this machine is found when it is read."""
        place = self.place(word)
        if isinstance(place, Path):
            return DataFile(place)
        found = remote_sources(place, self.copies)
        if len(found) > 1:
            raise InputError("matches several objects", "name one", path=redact(place))
        return found[0]

    def file(self, word: str) -> DataFile | RemoteSource:
        """The same, and fetched."""
        found = self.find(word)
        if isinstance(found, RemoteSource):
            bring([found], self.copies)
        return found


@dataclass(frozen=True)
class DataFile:
    """A file of this machine, with what a `RemoteSource` has."""

    copy: Path

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.copy)

    def inputs(self) -> Iterator[tuple[str, None]]:
        """The name of the input that reading it will give."""
        yield os.path.abspath(self.copy), None

    def input(self, one: Input) -> Input:
        """The record of what was read."""
        return one

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Errors name the path as it is."""
        return contextlib.nullcontext()
