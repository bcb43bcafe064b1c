"""Our shards in the forms that other training programs read: chat messages, Parquet, and Hugging Face datasets.

`messages` is the form that TRL, axolotl, LLaMA-Factory and ms-swift read: one JSON line per rationale, with the
answer first in the assistant's turn. `parquet` keeps every field, one row per sample, and is read back by this package.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet
from pst_dist.data.sources.conversations import as_messages
from pst_dist.errors import EnvironmentFault
from pst_dist.logs import progress
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.manifest import digest_of

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
Form = Literal["messages", "parquet"]
_VERSION = 2
_COLUMNS = ("id", "question", "answer", "rationales", "answer_type", "choices", "turns")
_BATCH_ROWS = 2048


def write_interchange(shards: ShardSet, form: Form) -> Path:
    """Write `messages` or `parquet` next to the shards, one file per split, and return the folder.

    Does nothing when the same files exist. Raises EnvironmentFault without pyarrow, and InputError when the folder
    holds anything that is not ours.
    """
    directory = shards.directory.with_name(form)
    artefact = Artefact(directory, form)
    fingerprint = digest_of({"version": _VERSION, "shards": shards.manifest.digest, "form": form})
    if artefact.finished(fingerprint) is not None:
        log.info("%s is complete, nothing to do", directory)
        return directory
    counts = {split: len(shards.split(split)) for split in shards.manifest.extra["counts"]}
    write = _write_messages if form == "messages" else _write_parquet
    with (
        artefact.publish(fingerprint, {"shards": shards.manifest.digest}) as draft,
        progress(form, total=sum(counts.values()), unit="rows") as bar,
    ):
        rows = {split: _counted(shards, split, bar.advance) for split, count in counts.items() if count}
        draft.extra["rows"] = {split: write(draft.path, split, samples) for split, samples in rows.items()}
    return directory


def _counted(shards: ShardSet, split: str, on_row: Callable[[int], None]) -> Iterator[ReasoningSample]:
    reader = shards.split(split)
    for place in range(len(reader)):
        yield reader[place]
        on_row(1)


def messages_of(sample: ReasoningSample) -> list[dict[str, Any]]:
    """One conversation per rationale, or one with the answer alone; each has the sample's id, and its earlier turns."""
    asked = as_messages(sample.turns or (("user", sample.question),))
    turns = [f"{sample.answer}\n\n{rationale}" for rationale in sample.rationales] or [sample.answer]
    return [
        {
            "id": sample.id if len(turns) == 1 else f"{sample.id}-{number}",
            "messages": [*asked, {"role": "assistant", "content": turn}],
        }
        for number, turn in enumerate(turns)
    ]


def row_of(sample: ReasoningSample) -> dict[str, Any]:
    """Every field of a sample but its source; a list that would be empty is None."""
    return {
        "id": sample.id,
        "question": sample.question,
        "answer": sample.answer,
        "rationales": list(sample.rationales) or None,
        "answer_type": sample.answer_type,
        "choices": list(sample.choices) or None,
        "turns": as_messages(sample.turns) or None,
    }


def _write_messages(folder: Path, split: str, samples: Iterator[ReasoningSample]) -> int:
    """Write one split as JSON lines and return the number of lines."""
    lines = 0
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
        for sample in samples:
            for row in messages_of(sample):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                lines += 1
    return lines


def _write_parquet(folder: Path, split: str, samples: Iterator[ReasoningSample]) -> int:
    """Write one split as Parquet and return the number of rows."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentFault("Parquet needs the package pyarrow", "pip install 'pst-dist[data]'") from error
    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    kinds = {"rationales": texts, "choices": texts, "turns": turns}
    schema = pyarrow.schema([(name, kinds.get(name, text)) for name in _COLUMNS])
    rows, batch = 0, list[dict[str, Any]]()
    with pyarrow.parquet.ParquetWriter(str(folder / f"{split}.parquet"), schema) as writer:
        for sample in samples:
            batch.append(row_of(sample))
            rows += 1
            if len(batch) == _BATCH_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                batch.clear()
        writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
    return rows


def dataset_of(directory: Path, split: str, *, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a shard directory as a Hugging Face dataset with the columns of `row_of`.

    Without `streaming` it is written once to the datasets cache, under the digest of the shards. With it, rows are read
    from the shards as they are needed, and the shards can be divided among workers. Raises InputError for an unknown
    split and EnvironmentFault without the package datasets.
    """
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault("this needs the package datasets", "pip install 'pst-dist[data]'") from error
    shards = ShardSet.open(directory)
    shards.split(split)
    text = datasets.Value("string")
    turns = datasets.List({"role": text, "content": text})
    kinds = {"rationales": datasets.List(text), "choices": datasets.List(text), "turns": turns}
    arguments = {
        "features": datasets.Features({name: kinds.get(name, text) for name in _COLUMNS}),
        "gen_kwargs": {
            "files": [str(directory / info.name) for info in shards.shards(split)],
            "digest": shards.manifest.digest,
        },
    }
    if not shards.shards(split):
        return datasets.Dataset.from_list([], features=arguments["features"])
    if streaming:
        return datasets.IterableDataset.from_generator(_shard_rows, **arguments)
    return datasets.Dataset.from_generator(_shard_rows, split=datasets.NamedSplit(split), **arguments)


def _shard_rows(files: list[str], digest: str) -> Iterator[dict[str, Any]]:
    """The rows of shard files; `digest` makes the cache of other shards with the same names another one."""
    from pst_dist.data.shard_tar import read_shard

    for file in files:
        yield from map(row_of, read_shard(Path(file)))
