"""The stages of a run, each skipped when its artefact already exists for the same inputs.

rows -> shards -> embeddings -> training -> evaluation -> export -> report. A fingerprint over all inputs of a stage
shows whether it is complete, so after deleting an artefact the next run recreates only that one and those that depend
on it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.config.loading import load_config
from pst_dist.config.locate import RESOLVED
from pst_dist.config.run_dir import expand_arms, fetch_data, recorded, run_dir
from pst_dist.config.schema import Config
from pst_dist.config.stage import tell_stage
from pst_dist.diagnostics.artefacts import Finding
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import InputError
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import Manifest
from pst_dist.storage.object_store import RemoteFolder

if TYPE_CHECKING:
    from pst_dist.embedding.embed import Executor

log = logging.getLogger(__name__)


def make_shards(config: Config, *, rebuild: bool = False) -> Manifest:
    """Read the sources and pack them into shards; does nothing when the same rows are already packed.

    Raises StaleError when different rows are packed there and `rebuild` is false.
    """
    from pst_dist.data.packing import pack_rows
    from pst_dist.student.row_rules import student_rules

    return pack_rows(config, student_rules(config), rebuild=rebuild)


def make_embeddings(config: Config, *, rebuild: bool = False) -> Manifest:
    """Encode the rationales of all shards whose embeddings are missing or stale."""
    from pst_dist.data.shards import ShardSet
    from pst_dist.embedding.embed import embed_all

    run = run_dir(config)
    if run.remote is not None:
        with directory_lock(run.data):
            return _make_remote_embeddings(config, run.remote, rebuild=rebuild)
    # Each process verifies the shards that it encodes; with Ray these are on many machines. Shards that change from now
    # on are refused because of their digests.
    shards = ShardSet.open(run.shards, verify=config.embed.backend == "local")
    return embed_all(
        config.embed,
        shards,
        run.embeddings,
        rebuild=rebuild,
        executor=_executor(config),
        lock=directory_lock(run.data),
    )


def _make_remote_embeddings(config: Config, remote: RemoteFolder, *, rebuild: bool) -> Manifest:
    """The same for data in object storage; this process needs only the manifest of the shards."""
    from pst_dist.data.shards import ShardSet
    from pst_dist.embedding.embed import embed_all

    run = run_dir(config)
    remote.check()
    manifest = remote.child("shards").manifest("shards")
    if manifest is None:
        raise InputError("no finished shards found", "run `pst shard` first", path=remote.url)
    return embed_all(
        config.embed,
        ShardSet(run.shards, manifest),
        run.embeddings,
        rebuild=rebuild,
        remote=remote,
        executor=_executor(config),
    )


def _executor(config: Config) -> Executor | None:
    """What encodes the shards: Ray actors, or None for this process."""
    if config.embed.backend != "ray":
        return None
    from pst_dist.clusters.ray.embed import embed_with_ray

    return embed_with_ray


def make_student(config: Config, *, rebuild: bool = False) -> Any:
    """Train one arm in this process or on Ray; `rebuild` first removes the files of an earlier training."""
    if config.train.backend == "ray":
        from pst_dist.clusters.ray.train import train_with_ray
        from pst_dist.data.shards import ShardSet

        fetch_data(config)
        ShardSet.open(run_dir(config).shards, verify=False)  # fails here, before workers are started
        return train_with_ray(config, rebuild=rebuild)
    from pst_dist.training.trainer import train

    return train(config, rebuild=rebuild)


def make_scores(config: Config, *, rebuild: bool = False, other_rows: bool = False) -> dict[str, Any] | None:
    """Score one trained arm in this process, on all ranks of its process group, or on Ray.

    `other_rows` scores the rows of data.test instead of the run's own. None on all ranks but zero.
    """
    import torch

    from pst_dist.distributed.ranks import Ranks
    from pst_dist.evaluation.evaluate import evaluate
    from pst_dist.evaluation.on_ranks import evaluate_on_ranks
    from pst_dist.evaluation.other_rows import evaluate_rows

    score = functools.partial(evaluate_rows if other_rows else evaluate, config, rebuild=rebuild)
    if config.evaluate.backend == "ray":
        from pst_dist.clusters.ray.evaluate import OnRay

        with OnRay(config) as executor:
            return score(executor=executor)
    ranks = Ranks.from_environment() if torch.distributed.is_initialized() else Ranks()
    return evaluate_on_ranks(ranks, config, lambda executor: score(executor=executor))


def run_all(config: Config, *, rebuild: bool = False, command: str | None = None) -> list[Path]:
    """Every stage for every arm, then the report and, for several arms, the comparison; returns the pages written.

    `command` is what the run's record says about how it was made; the command line of this process when not given.
    What can be known to fail is refused before anything is written, by `preflight`. Raises DataError before training
    when the split that is to be scored has no rows.
    """
    from pst_dist.diagnostics.preflight import no_rows, preflight

    preflight(config)
    pages = []
    arms = expand_arms(config)
    with recorded(config, command=command):
        manifest = _stage("shard", lambda: make_shards(config, rebuild=rebuild))
        split = config.evaluate.split
        if not manifest.extra["counts"].get(split):
            raise no_rows(split)
        if needs_embeddings(config):
            _stage("embed", lambda: make_embeddings(config, rebuild=rebuild))
        for arm in arms:
            with recorded(arm, command=command) if config.arms else contextlib.nullcontext():
                _stage(f"train {arm.arm}", functools.partial(make_student, arm, rebuild=rebuild))
            pages.append(finish_arm(arm, rebuild=rebuild))
        if len(arms) > 1:
            pages.append(_stage("compare", lambda: compare_arms(config)))
    return pages


def finish_arm(config: Config, *, rebuild: bool = False) -> Path:
    """Evaluate, export and report one trained arm."""
    from pst_dist.publish.export import export
    from pst_dist.publish.run_page import report

    _stage(f"evaluate {config.arm}", lambda: make_scores(config, rebuild=rebuild))
    _stage(f"export {config.arm}", lambda: export(config, rebuild=rebuild))
    return _stage(f"report {config.arm}", lambda: report(run_dir(config).path))


def compare_arms(config: Config) -> Path:
    """Write one page with all arms of a config side by side; returns its path."""
    from pst_dist.publish.run_page import compare_report

    return compare_report([run_dir(arm).path for arm in expand_arms(config)], run_dir(config).report)


def _stage(name: str, work: Callable[[], Any]) -> Any:
    started = time.monotonic()
    tell_stage(name)
    result = work()
    log.info("stage %s: %.1f s", name, time.monotonic() - started)
    return result


def repair(root: Path, findings: list[Finding]) -> None:
    """Remove damaged artefacts and recreate those that can be made from rows, shards or a student on this machine.

    Damaged checkpoints are removed if an intact one is left. Students are left to `pst train`, which returns to the
    newest intact checkpoint. Raises InputError when `root` is not a run directory with a saved config.
    """
    from pst_dist.evaluation.evaluate import is_evaluation_of_other_rows

    if not (root / RESOLVED).is_file():
        raise InputError("is not a run directory: it has no saved config", "run the commands named above", path=root)
    bad = {finding.kind for finding in findings if finding.is_problem}
    for finding in findings:
        if finding.state == "leftover":
            shutil.rmtree(finding.path)
    intact = {finding.path.parent for finding in findings if finding.kind == "checkpoint" and not finding.is_problem}
    for finding in findings:
        if finding.kind == "checkpoint" and finding.is_problem:
            folder = finding.path if finding.path.name.startswith("checkpoint-") else finding.path.parent
            if folder.parent in intact:
                log.warning("removing damaged %s; an intact checkpoint is left", folder)
                shutil.rmtree(folder, ignore_errors=True)
    config = load_config(str(root))
    for finding in findings:
        folder = finding.path if finding.path.is_dir() else finding.path.parent
        if finding.is_problem and finding.kind == "evaluation" and is_evaluation_of_other_rows(folder):
            log.warning("removing the scores of other rows in %s: run `pst evaluate` on those rows again", folder)
            shutil.rmtree(folder, ignore_errors=True)
    _rebuild(config, bad)


def _rebuild(config: Config, bad: set[str]) -> None:
    from pst_dist.evaluation.evaluate import evaluate
    from pst_dist.publish.export import export
    from pst_dist.publish.gguf.artefact import export_gguf
    from pst_dist.publish.gguf.types import TYPES

    if "shards" in bad:
        make_shards(config, rebuild=True)
    if "embeddings" in bad:
        make_embeddings(config)
    if "student" in bad:
        return  # scores and export would belong to the damaged student
    for arm in expand_arms(config):
        if "evaluation" in bad:
            evaluate(arm, rebuild=True)
        if "export" in bad:
            export(arm, rebuild=True)
        if "gguf" in bad or "export" in bad:
            for folder in sorted(run_dir(arm).path.glob("gguf/*")):
                if folder.name in TYPES:
                    export_gguf(arm, folder.name)
