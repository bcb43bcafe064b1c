"""The first stage of a run: rows from their sources become shards, unless the same rows are packed already.

Whether they are is decided without reading a row: beside the shards, `.shards.inputs.json` lists the files that they
were made from, with size, time and sha256, and a digest of everything else that decides the rows. The list is not part
of the shards: it has paths and times of this machine, and equal rows give equal shards. What the student decides about
its rows is handed in (`StudentRules`), since no module of this package knows students.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.config.run_dir import RunDir, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import SCHEMA_VERSION
from pst_dist.data.sources.rows import Input
from pst_dist.errors import PstError
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.json_files import read_typed
from pst_dist.storage.leftovers import remove_leftovers
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import Manifest, canonical_json, digest_of, write_json
from pst_dist.storage.object_store import fetch_folder, publish_folder
from pst_dist.text.redaction import redact
from pst_dist.text.urls import is_whole_url

if TYPE_CHECKING:
    from pst_dist.data.row_store import StoredRows
    from pst_dist.data.sources import LoadedData
    from pst_dist.data.sources.load import Unreadable

log = logging.getLogger(__name__)
_RECORD = ".shards.inputs.json"
_READERS = ("pst_dist", "pyarrow", "datasets", "math-verify", "transformers", "tokenizers")
"""Packages that decide what is in a row. After an upgrade the rows are read once more."""


@dataclass(frozen=True)
class StudentRules:
    """What the student that will be trained decides about the rows."""

    unreadable: Callable[[], Unreadable | None]
    """Gives the check for rows that it cannot be asked. It loads a tokenizer, so it is called only to read rows."""
    tokenizer: Any
    """Stamps of the files on this machine that decide what that check says; None when there are none."""
    keeps_turns: bool
    """Whether its prompt may hold a row's system text and earlier turns as turns."""


@dataclass(frozen=True)
class _Made:
    """What finished shards were made from."""

    settings: str
    """Digest of everything but the inputs that decides which rows are packed, and how."""
    manifest: str
    """Digest of the shards' manifest."""
    inputs: list[Input]


def pack_rows(config: Config, rules: StudentRules, *, rebuild: bool = False) -> Manifest:
    """Read the sources and pack them into shards; does nothing when the same rows are already packed.

    Raises StaleError when different rows are packed there and `rebuild` is false.
    """
    from pst_dist.data.shard_writer import reusable_shards, write_shards
    from pst_dist.data.sources import load_data
    from pst_dist.data.sources.mixture import runs_of
    from pst_dist.data.sources.rows import write_rejects

    run = run_dir(config)
    settings = _settings(config, rules)
    if not rebuild and (found := _recognised(config, run, settings)) is not None:
        log.info("shards: %s is complete and its sources have not changed, nothing to do", run.shards)
        return found
    # Read before writing anything, so that bad rows leave nothing on disk, not even a lock.
    loaded = load_data(config, rules.unreadable())
    parts = runs_of(loaded.report)
    mixture = {"parts": parts} if parts else {}
    splits, fingerprint = _as_packed(config, rules, loaded, mixture, None if rebuild else run.shards)
    if run.remote is None and not rebuild:
        # Without a lock, which requires write permission: a colleague may own the directory.
        found = reusable_shards(run.shards, fingerprint, config.shards.samples_per_shard)
        if found is not None:
            log.info("shards: %s is complete, nothing to do", run.shards)
            _record(run, _Made(settings, found.digest, loaded.inputs))
            return found
    with directory_lock(run.data):
        if loaded.rejects or (run.data / "rejects.jsonl").is_file():
            write_rejects(run.data / "rejects.jsonl", loaded.rejects, inside=run.data)
        if run.remote is not None and rebuild:
            remove_leftovers(run.shards, locked=True)
        elif run.remote is not None:  # the remote shards decide what is kept or refused
            fetch_folder(run.remote.child("shards"), run.shards, "shards")
            splits, fingerprint = _as_packed(config, rules, loaded, mixture, run.shards)
        manifest = write_shards(
            splits,
            run.shards,
            samples_per_shard=config.shards.samples_per_shard,
            fingerprint=fingerprint,
            workers=config.shards.workers,
            extra={"report": loaded.report, "task": config.task, "source_digest": loaded.source_digest, **mixture},
            rebuild=rebuild,
        )
        if run.remote is not None:
            publish_folder(run.shards, manifest, run.remote.child("shards"))
        _record(run, _Made(settings, manifest.digest, loaded.inputs))
        return manifest


def _recognised(config: Config, run: RunDir, settings: str) -> Manifest | None:
    """The manifest of finished, intact shards that were made from these inputs and settings; None if unknown."""
    from pst_dist.data.shard_writer import reusable_shards
    from pst_dist.data.sources.unchanged import unchanged

    try:
        made = read_typed(run.data / _RECORD, _Made)
        held = Artefact(run.shards, "shards").manifest()
    except PstError:
        return None
    if made.settings != settings or held is None or held.digest != made.manifest:
        return None
    inputs = unchanged(config, made.inputs)
    if inputs is None:
        return None
    if run.remote is not None:
        remote = run.remote.child("shards")
        there = remote.manifest("shards")
        if there is None or there.digest != held.digest:
            return None
        with directory_lock(run.data):
            fetch_folder(remote, run.shards, "shards")
    found = reusable_shards(run.shards, held.fingerprint, config.shards.samples_per_shard)
    if found is not None and inputs != made.inputs:
        _record(run, replace(made, inputs=inputs))
    return found


def _record(run: RunDir, made: _Made) -> None:
    """Write down what the shards were made from, where this process may write."""
    with contextlib.suppress(PstError, OSError):
        write_json(run.data / _RECORD, asdict(made))


def _settings(config: Config, rules: StudentRules) -> str:
    """Digest of everything but the inputs that decides which rows are packed, and how."""
    # The names of the inputs stand for data.root, and for a URL without its secret, which may be renewed.
    data = _without_secrets(config.data.model_dump(mode="json", exclude={"root"}))
    return digest_of(
        {
            "schema": SCHEMA_VERSION,
            "data": data,
            "task": config.task,
            "arms": config.arms or [config.arm],
            "shards": config.shards.model_dump(mode="json", exclude={"workers"}),
            "student": config.student.model_dump(mode="json"),
            "layout": config.layout.model_dump(mode="json"),
            "tokenizer": rules.tokenizer,
            "versions": {name: _version(name) for name in _READERS},
            "unicode": unicodedata.unidata_version,
        }
    )


def _without_secrets(value: Any) -> Any:
    """A copy of nested settings in which URLs have no secrets."""
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return redact(value) if isinstance(value, str) and is_whole_url(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_packed(
    config: Config, rules: StudentRules, loaded: LoadedData, mixture: Mapping[str, Any], packed: Path | None
) -> tuple[Mapping[str, StoredRows], str]:
    """The rows as they are in the shards in `packed`, or else new, with the fingerprint of everything that makes them.

    Shards of older versions have no turns; they are kept where the student does not need any.
    """

    def fingerprint(splits: Mapping[str, StoredRows]) -> str:
        return _digest_with_rows(
            {
                "schema": SCHEMA_VERSION,
                "source": loaded.source_digest,
                "samples_per_shard": config.shards.samples_per_shard,
                **mixture,
            },
            splits,
        )

    held = Artefact(packed, "shards").manifest() if packed is not None else None
    if held is not None and not rules.keeps_turns and any(rows.have_turns for rows in loaded.splits.values()):
        older = {name: rows.without_turns() for name, rows in loaded.splits.items()}
        if held.fingerprint == fingerprint(older):
            return older, held.fingerprint
    return loaded.splits, fingerprint(loaded.splits)


def _digest_with_rows(facts: dict[str, Any], splits: Mapping[str, StoredRows]) -> str:
    """`digest_of` the facts and, as `rows`, all samples of each split; hashed row by row.

    Half a surrogate pair counts as the bytes that stand for it; such a row is refused when it is written.
    """
    mark = "rows of all splits"
    before, after = canonical_json({**facts, "rows": mark}).split(canonical_json(mark))
    digest = hashlib.sha256(before.encode())
    for number, name in enumerate(sorted(splits)):
        digest.update(f"{',' if number else '{'}{canonical_json(name)}:[".encode())
        for place, (_, content, _) in enumerate(splits[name].contents()):
            digest.update(b"," + content if place else content)
        digest.update(b"]")
    digest.update(b"}" + after.encode())
    return digest.hexdigest()
