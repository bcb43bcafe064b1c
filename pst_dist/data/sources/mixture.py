"""Load the rows of a run: of one kind, or a mixture of sources with their own tasks.

Each source of a mixture is read by `load` on its own, with the settings of `data` that it does not set itself. Then the
splits are joined, source after source. A training question that is in another source's test split is a leak too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from pst_dist.config.schema import Config, RowSource
from pst_dist.data.row_store import RowStore, StoredRows
from pst_dist.data.sample import SPLITS
from pst_dist.data.sources import load
from pst_dist.data.sources.load import Unreadable
from pst_dist.data.sources.loaded import LoadedData
from pst_dist.data.sources.loaded import enforce as enforce_one
from pst_dist.data.sources.repeats import drop_leaks_between_parts, index_questions
from pst_dist.data.sources.row_ids import final_ids_of_parts
from pst_dist.data.sources.rows import Rejects
from pst_dist.data.tasks import get_task
from pst_dist.errors import ConfigError, DataError
from pst_dist.storage.manifest import digest_of

log = logging.getLogger(__name__)
_SETTINGS = (
    *("validation", "test", "split_file", "teacher_completions", "keep", "columns", "answer_type"),
    *("validation_size", "test_size", "max_bad", "duplicates"),
)


@dataclass(frozen=True)
class MixedData(LoadedData):
    """The rows of a mixture; each sample says which source it belongs to."""

    parts: dict[str, LoadedData] = field(default_factory=dict)
    """Name -> what was read from this source, before the splits were joined."""


def load_data(config: Config, unreadable: Unreadable | None = None) -> LoadedData:
    """Read, check and split the rows that `config.data` names; raises as `load.load_data` does."""
    if not config.data.mixture:
        return load.load_data(config, unreadable)
    loaded = survey(config, unreadable)
    enforce(config, loaded)
    log.info("rows: %s", "  ".join(f"{name} {len(rows):,}" for name, rows in loaded.splits.items()))
    return loaded


def survey(config: Config, unreadable: Unreadable | None = None) -> LoadedData:
    """Like `load_data`, but without refusing bad rows, missing rationales and leaks; for `pst check`."""
    if not config.data.mixture:
        return load.survey(config, unreadable)
    parts = parts_of(config)
    return _joined(config, parts, {name: load.survey(part, unreadable, name) for name, part in parts.items()})


def enforce(config: Config, loaded: LoadedData) -> None:
    """The checks of `load_data` on bad rows, rationales and leaks; raises DataError."""
    if not config.data.mixture:
        enforce_one(config, loaded)
        return
    assert isinstance(loaded, MixedData)
    for name, part in parts_of(config).items():
        enforce_one(part, loaded.parts[name])
    found = loaded.report["leaks_between_sources"]
    if config.data.leaks == "refuse" and found:
        raise DataError(
            f"{found} training questions are also in validation or test of another source", "set data.leaks=drop"
        )


def parts_of(config: Config) -> dict[str, Config]:
    """Name -> the config that reads this source alone; raises ConfigError for two sources of one name."""
    parts: dict[str, Config] = {}
    for source in config.data.mixture:
        name, part = _part(config, source)
        if name in parts:
            raise ConfigError(f"two sources of data.train are named {name}", "give one of them a name: {name: …}")
        parts[name] = part
    return parts


def _part(config: Config, source: RowSource) -> tuple[str, Config]:
    given = {key: getattr(source, key) for key in _SETTINGS if getattr(source, key) is not None}
    task = source.task or (None if source.answer_type else config.task)
    if source.task and not source.answer_type:
        given["answer_type"] = None
    data = config.data.model_copy(update={"train": source.rows, **given})
    part = config.model_copy(update={"task": task, "data": data})
    return source.name or get_task(task, data.answer_type).name, part


def _joined(config: Config, parts: dict[str, Config], read: dict[str, LoadedData]) -> LoadedData:
    store = RowStore()
    place = 0
    for number, split in enumerate(SPLITS):
        for part, loaded in enumerate(read.values()):
            place += _copy_rows(loaded.splits[split].store, store, part, number, place)
    index_questions(store)
    leaks = drop_leaks_between_parts(store, drop=config.data.leaks != "keep")
    final_ids_of_parts(store, list(parts))
    for loaded in read.values():
        for reject in loaded.rejects:
            store.reject(reject.to_json())
    store.finish()
    splits = {split: store.rows_of(split) for split in SPLITS}
    report = _report(config, parts, read, splits)
    report["leaks_between_sources"] = leaks
    digest = digest_of([[name, loaded.source_digest] for name, loaded in read.items()])
    inputs = [one for loaded in read.values() for one in loaded.inputs]
    return MixedData(splits, Rejects(store), report, digest, inputs, read)


def _copy_rows(source: RowStore, target: RowStore, part: int, split: int, first: int) -> int:
    """Append the finished rows of a split to another store, as rows of this part, from place `first` on.

    Returns their number.
    """
    query = (
        "SELECT rows.*, sample FROM packed JOIN rows USING(place) JOIN samples USING(place)"
        " WHERE packed.split=? ORDER BY number"
    )
    number = 0
    for row in source.run(query, (split,)):
        values: list[Any] = list(row[:-1])
        values[0], values[1], values[2] = first + number, split, part
        target.add(tuple(values), row[-1])
        number += 1
    return number


def _report(
    config: Config,
    parts: dict[str, Config],
    read: dict[str, LoadedData],
    splits: dict[str, StoredRows],
) -> dict[str, Any]:
    """The counts of all sources together, and under `parts` those of each."""
    report: dict[str, Any] = {}
    for loaded in read.values():
        for key, value in loaded.report.items():
            if isinstance(value, int):
                report[key] = report.get(key, 0) + value
            elif isinstance(value, str):
                report.setdefault(key, value)
    for split in SPLITS:
        report[f"{split}_rows"] = len(splits[split])
    columns = [(name, one.report["columns"]) for name, one in read.items()]
    report["columns"] = {f"{name} {where}": text for name, own in columns for where, text in own.items()}
    unused = [column for loaded in read.values() for column in loaded.report["unused_text_columns"]]
    report["unused_text_columns"] = list(dict.fromkeys(unused))
    weights = {name: source.weight for name, source in zip(parts, config.data.mixture, strict=True)}
    counts = {split: splits[split].by_part() for split in SPLITS}
    report["parts"] = {
        name: {
            "task": get_task(part.task, part.data.answer_type).name,
            "weight": weights[name],
            **{f"{split}_rows": counts[split].get(number, 0) for split in SPLITS},
        }
        for number, (name, part) in enumerate(parts.items())
    }
    return report


def runs_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources in the order of the training rows, each with its rows and its weight; [] without a mixture."""
    return [
        {"name": name, "rows": part["train_rows"], "weight": part["weight"]}
        for name, part in report.get("parts", {}).items()
        if part["train_rows"]
    ]
