"""Read the rows that a source spec in the config names: files, globs, folders, URLs, hub datasets, generators.

`root` says what a word stands for, `remote` fetches what is in object storage, `readers` reads a single file and
`saved_datasets` those of the datasets library. Each source has a digest: of the bytes of a file, the fingerprint of a
hub dataset, or the rows of a generator.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pst_dist.data.sources.compressed import data_stem, data_suffix
from pst_dist.data.sources.generators import generate
from pst_dist.data.sources.readers import check_file, stream_file, table_row
from pst_dist.data.sources.remote import RemoteSource, bring, remote_sources
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import Entry, Input
from pst_dist.data.sources.saved_datasets import dataset_folder, files_below, from_folder, from_hub
from pst_dist.data.sources.source import Done, Source
from pst_dist.data.sources.strict_json import Line
from pst_dist.errors import ConfigError, InputError
from pst_dist.storage.manifest import digest_of
from pst_dist.storage.stored_objects import StoredObject


def read_specs(spec: str | list[str], split: str, root: SourceRoot) -> list[Source]:
    """Everything that data.train, data.validation or data.test names, in order.

    A missing file is found here, anything else while rows are read. Raises InputError or DataError with the path of
    what cannot be read, EnvironmentFault when a hub dataset cannot be fetched or object storage does not answer, and
    ConfigError for an invalid spec.
    """
    sources = []
    seen: set[str] = set()
    for word in [spec] if isinstance(spec, str) else spec:
        for target in _targets(word, split, root):
            source = _source(target, split, root)
            real = os.path.realpath(target) if isinstance(target, Path) else source.path
            if real in seen:
                raise InputError(f"data.{split} names the same source twice", "name it once", path=source.path)
            seen.add(real)
            sources.append(source)
    if not sources:
        raise ConfigError(f"data.{split} is an empty list", "name a file, or leave the key out")
    return sources


def fetch(sources: Iterable[Source], root: SourceRoot) -> None:
    """Fetch all remote sources together, so that their progress is one; raises as `remote.bring`."""
    bring([source.remote for source in sources if source.remote is not None], root.copies)


def stream_specs(spec: str | list[str], split: str, root: SourceRoot, digests: list[str]) -> Iterator[Entry]:
    """The rows of `read_specs` one after another, for files larger than memory; adds the digest of each source."""
    for word in [spec] if isinstance(spec, str) else spec:
        for target in _targets(word, split, root):
            source = _source(target, split, root)
            yield from source.rows()
            digests.append(source.sha256)


def input_names(spec: str | list[str], split: str, root: SourceRoot) -> Iterator[tuple[str, StoredObject | None]]:
    """The names of the inputs (`Input.name`) that reading a spec would give, in order, and what a store says of each
    that is in one."""
    for word in [spec] if isinstance(spec, str) else spec:
        for target in _targets(word, split, root):
            if isinstance(target, RemoteSource):
                yield from target.inputs()
            elif isinstance(target, str):
                yield target, None
            elif target.is_dir():
                yield from ((os.path.abspath(file), None) for file in files_below(dataset_folder(target, split)))
            else:
                yield os.path.abspath(target), None


def _targets(word: str, split: str, root: SourceRoot) -> Iterator[Path | str | RemoteSource]:
    """The files and folders that a word names; a hub dataset or a generator as its spec."""
    if word.startswith(("hf:", "gen:")):
        yield word
        return
    if not word.strip():
        raise ConfigError("a data path is empty", "name a file, or leave the key out")
    path = root.place(word)
    if isinstance(path, str):
        yield from remote_sources(path, root.copies, split)
        return
    if not path.exists() and glob.has_magic(word):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise InputError("no file matches", "check the pattern and data.root", path=path)
        yield from map(Path, found)
        return
    yield path


def _source(target: Path | str | RemoteSource, split: str, root: SourceRoot) -> Source:
    if isinstance(target, RemoteSource):
        return _from_remote(target, split, root)
    if isinstance(target, str):
        return _generated(target, split) if target.startswith("gen:") else from_hub(target)
    if target.is_dir():
        return from_folder(target, split)
    check_file(target)
    return _from_file(target)


def _from_file(path: Path) -> Source:
    def read(done: Done) -> Iterator[Line | Entry]:
        return stream_file(path, lambda one: done(one.sha256, (one,)))

    return Source(str(path), data_stem(path.name), read, is_whole=data_suffix(path.name) == ".json")


def _from_remote(remote: RemoteSource, split: str, root: SourceRoot) -> Source:
    """The copy of a remote file or folder, under its URL."""
    name = remote.copy.name

    def read(done: Done) -> Iterator[Line | Entry]:
        bring([remote], root.copies)
        with remote.errors():
            copy = from_folder(remote.copy, split) if remote.is_folder else _from_file(remote.copy)
            named = copy.read(lambda sha256, inputs: done(sha256, tuple(map(remote.input, inputs))))
            yield from map(remote.renamed, named)

    if remote.is_folder:
        return Source(remote.where, name, read, remote=remote)
    return Source(remote.where, data_stem(name), read, is_whole=data_suffix(name) == ".json", remote=remote)


def _generated(spec: str, split: str) -> Source:
    name, samples = generate(spec, split)

    def read(done: Done) -> Iterator[Entry]:
        rows = [
            {"question": one.question, "answer": one.answer, **_worded(one.rationales), "id": one.id} for one in samples
        ]
        for number, row in enumerate(rows, 1):
            yield table_row(row, spec, f"gen:{name}", number)
        digest = digest_of(rows)
        done(digest, (Input(spec, digest),))

    return Source(spec, name, read, generated=True, is_whole=True)


def _worded(rationales: tuple[str, ...]) -> dict[str, Any]:
    """A generator's rationale, or its wordings, under the column name that a file would use."""
    return {"rationale": rationales[0]} if len(rationales) == 1 else {"rationales": list(rationales)}
