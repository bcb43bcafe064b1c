"""Checkpoints that are complete or absent, found by scanning the disk and never by a pointer file.

Every rank writes its file into a new directory and hashes it. When all are done, rank zero writes the manifest last and
renames the directory into place. Loading compares every digest first. The contents of the files are defined in
`training.engines.fragments` and fit every engine and every number of ranks.
The student that validation chose is kept separately, as a plain Hugging Face folder.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pst_dist.distributed.progress import at, working
from pst_dist.distributed.ranks import Ranks, from_main, gathered, main_first_errors, together
from pst_dist.errors import EnvironmentFault, IntegrityError, StaleError
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import disk_errors, remove_directory
from pst_dist.storage.json_files import read_typed
from pst_dist.storage.leftovers import remove_leftovers
from pst_dist.storage.manifest import (
    describe_files,
    hashed_file,
    write_json,
)
from pst_dist.student.finite import refuse_non_finite
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.checkpoints.verifying import verify_together
from pst_dist.training.engines.engine import Engine
from pst_dist.training.engines.fragments import Fragment, copied, named_tensors, write_fragments
from pst_dist.training.fingerprint import check_changes, chosen_alike

log = logging.getLogger(__name__)
_STATE = "run_state.json"
_NAMES = "checkpoint-*"


def checkpoint_path(root: Path, step: int) -> Path:
    """`root/checkpoint-<step>`, spelled as in Hugging Face."""
    return root / f"checkpoint-{step}"


@dataclass(frozen=True)
class Part:
    """One rank's part of a checkpoint: the contents of the one file it writes."""

    final: Path
    """Final path of the checkpoint, for messages."""
    name: str
    fragments: list[Fragment]
    adam_step: int


def prepare_checkpoint(engine: Engine, root: Path, state: RunState, *, copy: bool = False) -> tuple[Path, Part]:
    """Create a checkpoint's temporary directory and return it with this rank's part; collective.

    With `copy` the part is a copy in host memory, so training may continue; otherwise it holds the engine's tensors.
    Raises DivergedError, naming the tensor, when a weight or a moment is not finite.
    """
    final = checkpoint_path(root, state.step)
    partial = final.with_name(f".{final.name}.partial")
    at("checkpoint", state.step)
    with together(engine.ranks), working():
        fragments, adam_step = engine.state()
        refuse_non_finite(named_tensors(fragments), final)
        part = Part(final, engine.state_file, copied(fragments) if copy else fragments, adam_step)
    with main_first_errors(engine.ranks):
        if engine.ranks.is_main:
            remove_leftovers(root, _NAMES, locked=True)
            partial.mkdir(parents=True)
    return partial, part


def write_part(partial: Path, part: Part) -> dict[str, dict[str, Any]]:
    """Write, hash and sync one rank's file; returns its description for the manifest. Not collective, any thread."""
    with disk_errors(part.final), hashed_file(partial / part.name) as stream:
        write_fragments(stream, part.fragments, adam_step=part.adam_step)
    return {part.name: stream.description}


def publish_checkpoint(
    ranks: Ranks, partial: Path, written: Callable[[], dict[str, dict[str, Any]]], state: RunState, *, keep: int
) -> None:
    """Give a checkpoint its manifest and its name once every rank has `written` its part; collective."""
    final = checkpoint_path(partial.parent, state.step)
    try:
        with together(ranks), working():
            files = written()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # otherwise a full disk stays full
        raise
    parts = gathered(files)
    with main_first_errors(ranks):
        if ranks.is_main:
            try:
                write_json(partial / _STATE, asdict(state))
                described = describe_files(partial, [_STATE])
                for part in parts:
                    described |= part
                checkpoint = Artefact(final, "checkpoint")
                checkpoint.publish_prepared(partial, state.fingerprint, described, {"step": state.step})
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            remove_old(partial.parent, state, keep=keep)


def remove_old(root: Path, state: RunState, *, keep: int) -> None:
    """Remove leftovers of killed saves and all checkpoints but the newest `keep` and the best; on rank zero."""
    for old in _by_step(root)[:-keep]:
        if old != checkpoint_path(root, state.best_step or 0):
            remove_directory(old)
    remove_leftovers(root, _NAMES, locked=True)


def _by_step(root: Path) -> list[Path]:
    """Published checkpoint directories, oldest step first."""
    return sorted((path for path in root.glob(_NAMES) if re.fullmatch(r"checkpoint-[0-9]+", path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def newest_valid(root: Path, ranks: Ranks, *, at_most: int | None = None) -> tuple[Path, RunState] | None:
    """The newest checkpoint whose digests all match, the same on every rank; None when there are no checkpoints.

    `at_most` ignores the checkpoints of later steps. Damaged ones are logged and skipped. Raises IntegrityError when
    checkpoints exist but none is valid: starting from zero would silently discard the training.
    """
    candidates: list[Path] = []
    with main_first_errors(ranks):
        if ranks.is_main:
            candidates = [path for path in _by_step(root) if at_most is None or _step_of(path) <= at_most]
    candidates = from_main(candidates)
    for path in reversed(candidates):
        try:
            return path, _verified_state(path, ranks)
        except (IntegrityError, EnvironmentFault) as error:  # damaged, or not readable on some rank
            log.warning("skipping a damaged checkpoint: %s", error)
    if candidates:
        raise IntegrityError(
            f"none of the {len(candidates)} checkpoints here is intact",
            "restore one, or remove them to start from the beginning",
            path=root,
        )
    return None


def _verified_state(path: Path, ranks: Ranks) -> RunState:
    """The state in a checkpoint after all ranks have compared its files, each some of them; collective.

    Raises IntegrityError or EnvironmentFault, each on every rank.
    """
    manifest = state = None
    with main_first_errors(ranks):
        if ranks.is_main:
            manifest = Artefact(path, "checkpoint").manifest()
            if manifest is None:
                raise IntegrityError("no manifest, so it was never finished", path=path)
    verify_together(path, from_main(manifest), ranks)
    with main_first_errors(ranks):
        state = read_typed(path / _STATE, RunState) if ranks.is_main else None
    return from_main(state)


def resume(
    engine: Engine, root: Path, fresh: RunState, *, at_most: int | None = None, accept_changes: bool = False
) -> RunState:
    """Load the newest valid checkpoint into the engine and return its state, or `fresh` when there is none.

    The checkpoint may come from another engine or number of ranks. Raises StaleError when its settings differ in a way
    that needs a new training or, unless `accept_changes`, differ at all.
    """
    found = newest_valid(root, engine.ranks, at_most=at_most)
    if found is None:
        return fresh
    path, state = found
    if state.fingerprint != fresh.fingerprint:
        try:
            changes = check_changes(state.settings, fresh.settings, accept=accept_changes)
        except StaleError as error:
            raise StaleError(error.what, error.remedy, path=path) from None
        log.warning("resuming with changed settings: %s", ", ".join(changes))
    with working():
        engine.load(path)
    log.info("resumed step %d from %s", state.step, path)
    if (state.engine, state.world_size) != (fresh.engine, fresh.world_size):
        log.info("the checkpoint was saved by %d rank(s), engine %s", state.world_size, state.engine)
    return replace(
        state,
        fingerprint=fresh.fingerprint,
        settings=fresh.settings,
        engine=fresh.engine,
        world_size=fresh.world_size,
        best_value=state.best_value if chosen_alike(state.settings, fresh.settings) else None,
    )
