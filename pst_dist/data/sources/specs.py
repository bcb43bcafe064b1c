"""Read the rows that a source spec in the config names: files, globs, folders, URLs, hub datasets, generators.

`readers` reads a single file; this module finds the files and reads the other sources. `root` says what a word stands
for, and `remote` fetches what is in object storage. Each source has a digest: of the bytes of a file, the fingerprint
of a hub dataset, or the rows of a generator.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.data.sources.arrow_probe import probe
from pst_dist.data.sources.arrow_values import ArrowValues
from pst_dist.data.sources.compressed import data_stem, data_suffix, expansion_limit
from pst_dist.data.sources.generators import generate
from pst_dist.data.sources.readers import SUFFIXES, check_file, input_of, parsed, stream_file, table_row
from pst_dist.data.sources.remote import RemoteSource, bring, remote_sources
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import Entry, Input, RawRow
from pst_dist.data.sources.strict_json import Line
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, first_line
from pst_dist.storage.manifest import digest_of, sha256_file
from pst_dist.storage.regular_files import open_regular
from pst_dist.storage.stored_objects import StoredObject

_HUB = re.compile(r"hf:(?P<name>[^:@\[\]]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:\[\]]+))?:(?P<split>.+)")


Done = Callable[[str, tuple[Input, ...]], None]
"""Receives the digest of a source and its inputs when all its rows were read."""


@dataclass
class Source:
    """The rows of one file, folder, dataset or generator, which may be read several times."""

    path: str
    stem: str
    """Short name; ids that we create start with it."""
    read: Callable[[Done], Iterator[Line | Entry]]
    """Reads all rows once, good and bad, in order."""
    generated: bool = False
    is_whole: bool = False
    """Whether it cannot be read without having all rows in memory; they are then kept from the first time on."""
    sha256: str = ""
    """Known, like `inputs`, when all rows were read."""
    inputs: tuple[Input, ...] = ()
    """The files that were read; for a hub dataset or a generator its spec."""
    remote: RemoteSource | None = None
    """Where it is in object storage; it is fetched by `fetch`, or when it is first read."""
    _kept: list[Line | Entry] | None = None

    def rows(self) -> Iterator[Entry]:
        """The rows one after another; raises as `read_specs` does, and InputError for a source that changed."""
        return map(parsed, self.items())

    def items(self) -> Iterator[Line | Entry]:
        """The rows, those of JSON Lines as lines that are not parsed yet; raises as `rows`."""
        if self.is_whole and self._kept is None:
            self._kept = list(self.read(self._done))
        yield from self.read(self._done) if self._kept is None else self._kept

    def head(self, most: int) -> list[dict[str, Any]]:
        """The first good rows."""
        good = (row.value for row in self.rows() if isinstance(row, RawRow))
        return list(itertools.islice(good, most))

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """All rows, kept in memory."""
        return list(self.rows())

    def _done(self, sha256: str, inputs: tuple[Input, ...]) -> None:
        if self.sha256 not in ("", sha256):
            raise InputError("the file changed while it was read", "run again when it is complete", path=self.path)
        self.sha256, self.inputs = sha256, inputs


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
                yield from ((os.path.abspath(file), None) for file in _files_below(_dataset_folder(target, split)))
            else:
                yield os.path.abspath(target), None


def hub_digest(spec: str) -> str:
    """Digest of a hub dataset's fingerprint, without reading its rows; raises as `read_specs` does."""
    return digest_of(_hub_dataset(spec)._fingerprint)


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
        return _generated(target, split) if target.startswith("gen:") else _from_hub(target)
    if target.is_dir():
        return _from_folder(target, split)
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
            copy = _from_folder(remote.copy, split) if remote.is_folder else _from_file(remote.copy)
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


def _from_folder(folder: Path, split: str) -> Source:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    folder = _dataset_folder(folder, split)
    datasets = _datasets(folder)

    def read(done: Done) -> Iterator[Entry]:
        opened = time.time_ns()
        files = _files_below(folder)
        stats = [file.stat() for file in files]
        found = False
        try:
            arrow = [file for file in files if file.suffix == ".arrow"]
            probe(arrow, expansion_limit(sum(file.stat().st_size for file in arrow)))
            for entry in _dataset_rows(datasets.load_from_disk(str(folder)), str(folder), folder.name):
                found = True
                yield entry
        except Exception as error:  # the library raises pyarrow's exceptions, OSError and its own
            what = f"cannot read the dataset: {first_line(error, 160)}"
            raise DataError(what, "save it again", path=folder) from error
        _refuse_empty(found, folder)
        inputs = [input_of(file, sha256_file(file), stat, opened) for file, stat in zip(files, stats, strict=True)]
        done(digest_of([one.sha256 for one in inputs]), tuple(inputs))

    return Source(str(folder), folder.name, read)


def _dataset_folder(folder: Path, split: str) -> Path:
    """The folder of a dataset's split; raises InputError for a folder of anything else."""
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            names = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
            raise InputError(
                f"the dataset has no split {split!r}", f"name the folder of one of its splits: {names}", path=folder
            )
        folder = folder / split
    if not (folder / "state.json").is_file():
        raise InputError(
            "is a folder, but was not written by save_to_disk",
            _files_in(folder),
            path=folder,
        )
    return folder


def _files_below(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if not file.is_dir())
    for file in files:
        open_regular(file, remedy="save the dataset again").close()
    return files


def _files_in(folder: Path) -> str:
    """A remedy for a folder that merely contains data files."""
    suffixes = [file.suffix for file in sorted(folder.iterdir()) if data_suffix(file.name) in SUFFIXES]
    if not suffixes:
        return "name a data file or a save_to_disk folder"
    return f"to read the files in it use '{folder.absolute()}/*{suffixes[0]}'"


def _from_hub(spec: str) -> Source:
    """`hf:NAME[@REVISION][:CONFIG]:SPLIT` through the datasets library and its cache."""
    match = _hub_match(spec)
    name, split = match["name"], match["split"]

    def read(done: Done) -> Iterator[Entry]:
        dataset, found = _hub_dataset(spec), False
        for entry in _dataset_rows(dataset, spec, f"{name}/{split}"):
            found = True
            yield entry
        _refuse_empty(found, spec)
        digest = digest_of(dataset._fingerprint)
        done(digest, (Input(spec, digest),))

    return Source(spec, f"{name.rsplit('/', 1)[-1]}-{split}", read)


def _hub_match(spec: str) -> re.Match[str]:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise ConfigError(f"{spec!r} is not hf:NAME[:CONFIG]:SPLIT", "for example hf:openai/gsm8k:main:train")
    return match


def _hub_dataset(spec: str) -> Any:
    """The dataset of a spec, from the library's cache or the hub, without reading its rows."""
    match, datasets = _hub_match(spec), _datasets(spec)
    name, split = match["name"], match["split"]
    try:
        # trust_remote_code is never set, so the library refuses a dataset that needs to run its own code.
        return datasets.load_dataset(name, match["config"], split=split, revision=match["revision"])
    except (ConnectionError, OSError, TimeoutError) as error:
        raise EnvironmentFault(
            f"cannot fetch the dataset: {first_line(error, 160)}",
            "check its name, the network and HF_TOKEN; HF_HUB_OFFLINE=1 allows only cached datasets",
            path=spec,
        ) from error
    except Exception as error:  # unknown config or split, or remote code: each raises a different exception
        raise InputError(
            f"cannot load the dataset: {first_line(error, 160)}", "check name, config and split", path=spec
        ) from error


def _refuse_empty(found: bool, path: Path | str) -> None:
    if not found:
        raise DataError("the dataset has no rows", "use a dataset with at least one row", path=path)


def _datasets(path: Path | str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            "reading it needs the datasets library", "pip install 'pst-dist[data]'", path=path
        ) from error
    return datasets


def _dataset_rows(dataset: Any, path: str, name: str) -> Iterator[Entry]:
    for number, row in enumerate(dataset_rows(dataset), 1):
        yield table_row(row, path, name, number)


def dataset_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset` as plain values, with the names of class labels."""
    values, features = ArrowValues({}, {}), dataset.features
    if features:  # a streamed dataset may not know them
        labels = {column: feature.names for column, feature in features.items() if hasattr(feature, "int2str")}
        values = ArrowValues.of(features.arrow_schema, labels)
    for row in dataset.with_format(None):
        yield values.corrected(row)


def _worded(rationales: tuple[str, ...]) -> dict[str, Any]:
    """A generator's rationale, or its wordings, under the column name that a file would use."""
    return {"rationale": rationales[0]} if len(rationales) == 1 else {"rationales": list(rationales)}
