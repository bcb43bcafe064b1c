"""Read the rows that a source spec in the config names: files, globs, folders, hub datasets, generators.

`readers` reads a single file; this module finds the files and reads the other sources. Each source has a digest: of the
bytes of a file, the fingerprint of a hub dataset, or the rows of a generator.
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.data.sources.arrow_probe import probe
from pst_dist.data.sources.compressed import data_stem, data_suffix, expansion_limit
from pst_dist.data.sources.generators import generate
from pst_dist.data.sources.readers import SUFFIXES, input_of, read_file, stream_file, table_row
from pst_dist.data.sources.rows import Entry, Input
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, first_line
from pst_dist.storage.manifest import digest_of, sha256_file
from pst_dist.storage.regular_files import open_regular

_HUB = re.compile(r"hf:(?P<name>[^:@\[\]]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:\[\]]+))?:(?P<split>.+)")


@dataclass(frozen=True)
class Source:
    """The rows of one file, folder, dataset or generator."""

    path: str
    stem: str
    """Short name; ids that we create start with it."""
    entries: list[Entry]
    sha256: str
    generated: bool = False
    inputs: tuple[Input, ...] = ()
    """The files that were read; for a hub dataset or a generator its spec."""


def read_specs(spec: str | list[str], split: str, root: Path) -> list[Source]:
    """Read everything that data.train, data.validation or data.test names, in order.

    Raises InputError or DataError with the path of what cannot be read, EnvironmentFault when a hub dataset cannot be
    fetched, and ConfigError for an invalid spec.
    """
    sources = []
    seen: set[str] = set()
    for word in [spec] if isinstance(spec, str) else spec:
        for target in _targets(word, root):
            real = os.path.realpath(target) if isinstance(target, Path) else target
            if real in seen:
                raise InputError(f"data.{split} names the same source twice", "name it once", path=target)
            seen.add(real)
            sources.append(_read(target, split))
    if not sources:
        raise ConfigError(f"data.{split} is an empty list", "name a file, or leave the key out")
    return sources


def stream_specs(spec: str | list[str], split: str, root: Path, digests: list[str]) -> Iterator[Entry]:
    """The rows of `read_specs` one after another, for files larger than memory; adds the digest of each source."""
    for word in [spec] if isinstance(spec, str) else spec:
        for target in _targets(word, root):
            if isinstance(target, Path) and not target.is_dir():
                yield from stream_file(target, lambda one: digests.append(one.sha256))
            else:
                source = _read(target, split)
                yield from source.entries
                digests.append(source.sha256)


def input_names(spec: str | list[str], split: str, root: Path) -> Iterator[str]:
    """The names of the inputs (`Input.name`) that reading a spec would give, in order."""
    for word in [spec] if isinstance(spec, str) else spec:
        for target in _targets(word, root):
            if not isinstance(target, Path):
                yield target
            elif target.is_dir():
                yield from map(os.path.abspath, _files_below(_dataset_folder(target, split)))
            else:
                yield os.path.abspath(target)


def hub_digest(spec: str) -> str:
    """Digest of a hub dataset's fingerprint, without reading its rows; raises as `read_specs` does."""
    return digest_of(_hub_dataset(spec)._fingerprint)


def _targets(word: str, root: Path) -> Iterator[Path | str]:
    if word.startswith(("hf:", "gen:")):
        yield word
        return
    if not word.strip():
        raise ConfigError("a data path is empty", "name a file, or leave the key out")
    path = root / Path(word).expanduser()
    if not path.exists() and glob.has_magic(word):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise InputError("no file matches", "check the pattern and data.root", path=path)
        yield from map(Path, found)
        return
    yield path


def _read(target: Path | str, split: str) -> Source:
    if isinstance(target, Path):
        if target.is_dir():
            return _read_folder(target, split)
        rows = read_file(target)
        return Source(rows.path, data_stem(target.name), rows.entries, rows.input.sha256, inputs=(rows.input,))
    if target.startswith("gen:"):
        name, samples = generate(target, split)
        generated = [
            {"question": one.question, "answer": one.answer, **_worded(one.rationales), "id": one.id} for one in samples
        ]
        entries = [table_row(row, target, f"gen:{name}", number) for number, row in enumerate(generated, 1)]
        digest = digest_of(generated)
        return Source(target, name, entries, digest, generated=True, inputs=(Input(target, digest),))
    return _read_hub(target)


def _read_folder(folder: Path, split: str) -> Source:
    """Read a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    folder = _dataset_folder(folder, split)
    datasets = _datasets(folder)
    opened = time.time_ns()
    files = _files_below(folder)
    stats = [file.stat() for file in files]
    try:
        arrow = [file for file in files if file.suffix == ".arrow"]
        probe(arrow, expansion_limit(sum(file.stat().st_size for file in arrow)))
        dataset = datasets.load_from_disk(str(folder))
        entries = list(_dataset_rows(dataset, str(folder), folder.name))
    except Exception as error:  # the library raises pyarrow's exceptions, OSError and its own
        raise DataError(f"cannot read the dataset: {first_line(error, 160)}", "save it again", path=folder) from error
    inputs = tuple(input_of(file, sha256_file(file), found, opened) for file, found in zip(files, stats, strict=True))
    digest = digest_of([one.sha256 for one in inputs])
    return _not_empty(Source(str(folder), folder.name, entries, digest, inputs=inputs))


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


def _read_hub(spec: str) -> Source:
    """Read `hf:NAME[@REVISION][:CONFIG]:SPLIT` through the datasets library and its cache."""
    match = _hub_match(spec)
    name, split = match["name"], match["split"]
    dataset = _hub_dataset(spec)
    entries = list(_dataset_rows(dataset, spec, f"{name}/{split}"))
    digest = digest_of(dataset._fingerprint)
    stem = f"{name.rsplit('/', 1)[-1]}-{split}"
    return _not_empty(Source(spec, stem, entries, digest, inputs=(Input(spec, digest),)))


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


def _not_empty(source: Source) -> Source:
    if not source.entries:
        raise DataError("the dataset has no rows", "use a dataset with at least one row", path=source.path)
    return source


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
    """Rows of a `datasets.Dataset` as plain values. Class labels become their names, as their numbers are arbitrary."""
    features = dataset.features or {}  # a streamed dataset may not know them
    labels = {column: feature for column, feature in features.items() if hasattr(feature, "int2str")}
    for row in dataset.with_format(None):
        for column, feature in labels.items():
            if isinstance(row[column], int) and row[column] >= 0:
                row[column] = feature.int2str(row[column])
        yield row


def _worded(rationales: tuple[str, ...]) -> dict[str, Any]:
    """A generator's rationale, or its wordings, under the column name that a file would use."""
    return {"rationale": rationales[0]} if len(rationales) == 1 else {"rationales": list(rationales)}
