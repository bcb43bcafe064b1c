"""Load the rows of a run: of one kind, or a mixture of sources with their own tasks.

Each source of a mixture is read by `load` on its own, with the settings of `data` that it does not set itself. Then the
splits are joined, source after source. A training question that another source tests is a leak like any other.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pst_dist.config.schema import Config, RowSource
from pst_dist.data.sample import SPLITS, ReasoningSample, normalise_question
from pst_dist.data.sources import load
from pst_dist.data.sources.load import LoadedData, Unreadable
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
    return _joined(config, parts, {name: load.survey(part, unreadable) for name, part in parts.items()})


def enforce(config: Config, loaded: LoadedData) -> None:
    """The checks of `load_data` on bad rows, rationales and leaks; raises DataError."""
    if not config.data.mixture:
        load.enforce(config, loaded)
        return
    assert isinstance(loaded, MixedData)
    for name, part in parts_of(config).items():
        load.enforce(part, loaded.parts[name])
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
    splits: dict[str, list[ReasoningSample]] = {split: [] for split in SPLITS}
    for name, loaded in read.items():
        task = get_task(parts[name].task, parts[name].data.answer_type).name
        for split in SPLITS:
            splits[split] += [replace(sample, part=name, task=task) for sample in loaded.splits[split]]
    leaks = _leaks(splits)
    if config.data.leaks != "keep":
        for split, gone in leaks.items():
            splits[split] = [sample for place, sample in enumerate(splits[split]) if place not in gone]
    _number(splits)
    report = _report(config, parts, read, splits)
    report["leaks_between_sources"] = len(leaks["train"])
    rejects = [reject for loaded in read.values() for reject in loaded.rejects]
    digest = digest_of([[name, loaded.source_digest] for name, loaded in read.items()])
    inputs = [one for loaded in read.values() for one in loaded.inputs]
    return MixedData(splits, rejects, report, digest, inputs, read)


def _leaks(splits: dict[str, list[ReasoningSample]]) -> dict[str, set[int]]:
    """Places of the training and validation rows whose question a later split of another source has."""
    owners: dict[str, dict[str, set[str]]] = {split: {} for split in SPLITS}
    for split, samples in splits.items():
        for sample in samples:
            owners[split].setdefault(normalise_question(sample.question), set()).add(sample.part)
    later = {"train": ("validation", "test"), "validation": ("test",)}
    return {
        split: {
            place
            for place, sample in enumerate(splits[split])
            if any(owners[held].get(normalise_question(sample.question), set()) - {sample.part} for held in helds)
        }
        for split, helds in later.items()
    }


def _number(splits: dict[str, list[ReasoningSample]]) -> None:
    """Give rows of different sources with the same id different ones."""
    taken: set[str] = set()
    for samples in splits.values():
        for place, sample in enumerate(samples):
            name, number = sample.id, 1
            while name in taken:
                number += 1
                base = f"{sample.part}-{sample.id}"[:110]
                name = base if number == 2 else f"{base}-{number}"
            taken.add(name)
            if name != sample.id:
                samples[place] = replace(sample, id=name)


def _report(
    config: Config,
    parts: dict[str, Config],
    read: dict[str, LoadedData],
    splits: dict[str, list[ReasoningSample]],
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
    counts = {split: Counter(sample.part for sample in splits[split]) for split in SPLITS}
    report["parts"] = {
        name: {
            "task": get_task(part.task, part.data.answer_type).name,
            "weight": weights[name],
            **{f"{split}_rows": counts[split][name] for split in SPLITS},
        }
        for name, part in parts.items()
    }
    return report


def runs_of(samples: Sequence[ReasoningSample], report: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources in the order of the training rows, each with its rows and its weight; [] without a mixture."""
    if "parts" not in report:
        return []
    counts = Counter(sample.part for sample in samples)
    return [{"name": name, "rows": rows, "weight": report["parts"][name]["weight"]} for name, rows in counts.items()]
