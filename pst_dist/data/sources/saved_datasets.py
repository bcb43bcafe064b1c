"""Read what the datasets library holds: folders written by `save_to_disk`, and datasets of the hub.

The library is imported when such a source is read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pst_dist.data.sources.arrow_probe import probe
from pst_dist.data.sources.arrow_values import ArrowValues
from pst_dist.data.sources.compressed import data_suffix, expansion_limit
from pst_dist.data.sources.readers import SUFFIXES, input_of, table_row
from pst_dist.data.sources.rows import Entry, Input
from pst_dist.data.sources.source import Done, Source
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, first_line
from pst_dist.models.hub import use_cache_without_hub
from pst_dist.storage.manifest import digest_of, sha256_file
from pst_dist.storage.regular_files import open_regular

_HUB = re.compile(r"hf:(?P<name>[^:@\[\]]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:\[\]]+))?:(?P<split>.+)")


def from_folder(folder: Path, split: str) -> Source:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    folder = dataset_folder(folder, split)
    datasets = _datasets(folder)

    def read(done: Done) -> Iterator[Entry]:
        opened = time.time_ns()
        files = files_below(folder)
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


def dataset_folder(folder: Path, split: str) -> Path:
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


def files_below(folder: Path) -> list[Path]:
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


def from_hub(spec: str) -> Source:
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


def hub_digest(spec: str) -> str:
    """Digest of a hub dataset's fingerprint, without reading its rows; raises as `read_specs` does."""
    return digest_of(_hub_dataset(spec)._fingerprint)


def _hub_match(spec: str) -> re.Match[str]:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise ConfigError(f"{spec!r} is not hf:NAME[:CONFIG]:SPLIT", "for example hf:openai/gsm8k:main:train")
    return match


def _hub_dataset(spec: str) -> Any:
    """The dataset of a spec, from the library's cache or the hub, without reading its rows."""
    match, datasets = _hub_match(spec), _datasets(spec)
    name, split = match["name"], match["split"]
    use_cache_without_hub()
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
