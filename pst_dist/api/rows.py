"""Rows in and out: a teacher writes rationales for them, and finished shards become a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_dist.api.configs import Source, load_config
from pst_dist.api.faults import our_errors
from pst_dist.api.results import TeachResult
from pst_dist.config.run_dir import run_dir
from pst_dist.errors import ConfigError
from pst_dist.logs import shown_by_default


def as_dataset(source: Source, split: str | None = None, *, streaming: bool = False) -> Any:
    """The rows of finished shards as a Hugging Face dataset; all splits as a `DatasetDict` without `split`.

    `source` is a shard directory, a data or run directory, or a config. Columns: id, question, answer, rationales,
    answer_type, choices, turns (`{"role", "content"}`, ending with the question); None for a row without rationales,
    choices or earlier turns. With `streaming`, rows are read from the shards as they are needed. Raises InputError when
    there are no finished shards.
    """
    from pst_dist.data.interchange import dataset_of
    from pst_dist.data.shards import ShardSet

    with our_errors(), shown_by_default():
        directory = _shards_of(source)
        if split is not None:
            return dataset_of(directory, split, streaming=streaming)
        counts = ShardSet.open(directory).manifest.extra["counts"]
        made = {name: dataset_of(directory, name, streaming=streaming) for name, count in counts.items() if count}
        import datasets

        return datasets.IterableDatasetDict(made) if streaming else datasets.DatasetDict(made)


def _shards_of(source: Source) -> Path:
    """The shard directory that a folder is or contains, or that a config names."""
    from pst_dist.storage.manifest import MANIFEST, kind_written_in

    if isinstance(source, str | Path):
        folder = Path(source)
        if (folder / MANIFEST).is_file() and kind_written_in(folder) == "shards":
            return folder
        if (folder / "shards" / MANIFEST).is_file():
            return folder / "shards"
    return run_dir(load_config(source)).shards


def teach(rows: Any, output: str | Path, *overrides: str, config: Source = None, **settings: Any) -> TeachResult:
    """Ask a teacher for rationales (and new questions) for the rows; what `pst teach` does.

    `rows` is what data.train takes (paths, or the rows themselves), or None for the training rows of `config`.
    `overrides` are words as in `load_config` ("task=gsm8k"). `settings` are those of the command, with underscores:
    `endpoint=..., model=..., prompts=["few_shot"], samples=4, max_cost=5.0`; see `teacher.settings.TeachSettings`.
    The same call resumes an interrupted one, and pays for no reply twice.

    Raises ConfigError for a wrong setting, EnvironmentFault when the teacher does not answer, and StaleError when the
    journal beside `output` belongs to other settings. Reaching a cap is not an error: see `TeachResult.cap`.
    """
    from pst_dist.teacher.settings import TeachSettings
    from pst_dist.teacher.teach import teach

    with our_errors(), shown_by_default():
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        for name in ("prompts", "avoid", "omit"):
            if isinstance(given.get(name), str):  # one of them, as on the command line
                given[name] = (given[name],)
        try:
            asked = TeachSettings(output=Path(output), **given)
        except TypeError as error:
            raise ConfigError(f"teach: {str(error).partition(') ')[2] or error}", "see `pst teach --help`") from error
        keys: dict[str, Any] = {} if rows is None else {"data": {"train": rows}}
        if rows is not None:
            # Rows given as Python objects are written beside the journal.
            keys |= {"data_dir": str(asked.folder)}
        outcome = teach(load_config(config, *overrides, **keys), asked)
        return TeachResult(
            path=asked.output,
            folder=asked.folder,
            rows=outcome.rows,
            report=outcome.report,
            cap=outcome.cap,
        )
