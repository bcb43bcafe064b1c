"""Checks of a run's folders: whether they are usable and large enough, in use, and what they already contain.

Files are compared with the manifests by size only, which is instant; every verb checks digests before it uses a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pst_dist.config.run_dir import expand_arms, run_dir
from pst_dist.config.schema import Config
from pst_dist.diagnostics.cost import Machines, Plan, make_plan
from pst_dist.diagnostics.counted_rows import rows_once
from pst_dist.diagnostics.machine.findings import Finding, ok, problem, size, warning
from pst_dist.errors import IntegrityError, PstError
from pst_dist.storage.atomic import disk_errors, nearest_existing, write_text
from pst_dist.storage.leftovers import final_name
from pst_dist.storage.locks import lock_holder
from pst_dist.storage.manifest import Manifest, bytes_below, read_manifest
from pst_dist.storage.mounts import OF_ONE_MACHINE, filesystem_of

_TRIAL = ".pst-try-"
_MEBIBYTE = 1 << 20
_CLOCK_SECONDS = 30.0
_MAKES = {"shards": "pst shard", "embeddings": "pst embed", "checkpoint": "pst train", "student": "pst train"}


def folders(config: Config) -> dict[str, Path]:
    """Config key -> folder; data_dir only if it is not inside output_dir."""
    run = run_dir(config)
    found = {"output_dir": run.path}
    if run.path.absolute() not in (run.data.absolute(), *run.data.absolute().parents):
        found["data_dir"] = run.data
    return found


def store(config: Config) -> list[Finding]:
    """Whether the object storage of the shards and embeddings can be reached; nothing for a local folder."""
    remote = run_dir(config).remote
    if remote is None:
        return []
    try:
        remote.check()
    except PstError as error:
        return [problem("data_dir", f"{remote.url}: {error.what}", error.remedy)]
    return [ok("data_dir", f"{remote.url}: reachable")]


def place(name: str, folder: Path, nodes: int) -> list[Finding]:
    """Whether files can be written, locked and renamed in a folder, and whether other nodes can see it."""
    kind = filesystem_of(folder, Path("/proc/self/mounts").read_text())
    faults = _try(folder)
    findings = [problem(name, f"{folder} ({kind}): {fault}", "choose another file system") for fault in faults]
    if nodes > 1 and kind in OF_ONE_MACHINE:
        findings.append(
            problem(
                name,
                f"{folder} is on {kind}, which is local to this machine, but there are {nodes} nodes",
                "choose a directory on a shared file system (NFS, Lustre, ...)",
            )
        )
    state = os.statvfs(nearest_existing(folder))
    if state.f_files and state.f_favail < 1000:
        findings.append(
            problem(name, f"{folder}: only {state.f_favail} more files fit", "remove some, or choose another directory")
        )
    free = size(state.f_bavail * state.f_frsize)
    return findings or [ok(name, f"{folder}: {kind}, writable, locks and renames work, {free} free")]


def _try(folder: Path) -> list[str]:
    """Write, fsync, lock, rename and remove in a temporary folder inside `folder`; returns what does not work.

    If `folder` does not exist, its nearest existing parent is tested; nothing is left behind. Raises EnvironmentFault
    when nothing can be written at all. The file system may hang: the caller limits the time.
    """
    ground = nearest_existing(folder)
    faults = []
    with disk_errors(ground):
        trial = Path(tempfile.mkdtemp(prefix=_TRIAL, dir=ground))
        try:
            write_text(trial / "old", "old")
            write_text(trial / "new", "x" * _MEBIBYTE)
            # Every artefact is published like this: renamed over an older one.
            os.replace(trial / "new", trial / "old")
            if (trial / "new").exists() or (trial / "old").stat().st_size != _MEBIBYTE:
                faults.append("a rename does not replace the older file")
            skew = (trial / "old").stat().st_mtime - time.time()
            if abs(skew) > _CLOCK_SECONDS:
                faults.append(f"its clock and this machine's differ by {abs(skew):.0f} s")
            with contextlib.ExitStack() as stack:
                streams = [stack.enter_context((trial / "lock").open("a+")) for _ in range(2)]
                try:
                    fcntl.flock(streams[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    faults.append(f"files cannot be locked ({error.strerror})")
                else:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(streams[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                        faults.append("a lock does not keep a second process out")
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    return faults


def room(config: Config, machines: Machines, machine_memory: int, has_gpus: bool) -> list[Finding]:
    """Compare the disk space and memory that the plan estimates with what is free.

    Raises what planning raises, for example for rows or a student that cannot be read.
    """
    read = rows_once(config)
    plans = [make_plan(arm, machines, read=read) for arm in expand_arms(config)]
    plan = max(plans, key=lambda plan: plan.memory.total)
    findings = list(_space(config, plan))
    if not has_gpus:
        held = plan.host.on_cpu(plan.memory) * machines.gpus
        if held > machine_memory:
            findings.append(
                problem(
                    "memory",
                    f"{machines.gpus} rank(s) need an estimated {size(held)}, but {size(machine_memory)} are free",
                    "lower train.per_device_train_batch_size, set student.gradient_checkpointing=true, or use fewer "
                    "ranks",
                )
            )
    return findings


def _space(config: Config, plan: Plan) -> Iterator[Finding]:
    arms = len(expand_arms(config))
    # Checkpoints (one more than is kept while a new one is written), the best student and its export.
    training = arms * ((config.train.save_total_limit + 1) * plan.checkpoint_bytes + 2 * 4.0 * plan.parameters)
    data = plan.rows.shard_bytes + plan.embedding_bytes
    run = run_dir(config)
    needs = {"output_dir": training} if "data_dir" in folders(config) else {"output_dir": training + data}
    if "data_dir" in folders(config):
        needs["data_dir"] = data
    for name, wanted in needs.items():
        folder = folders(config)[name]
        ground = nearest_existing(folder)
        state = os.statvfs(ground)
        free = state.f_bavail * state.f_frsize + bytes_below(run.path if name == "output_dir" else run.data)
        if wanted > free:
            yield problem(
                name,
                f"the run writes an estimated {size(wanted)}, but {size(free)} are free, including its existing files",
                f"free some space in {folder}, or choose another directory",
            )
        else:
            yield ok(name, f"the run writes an estimated {size(wanted)}")


def contents(config: Config) -> list[Finding]:
    """Held locks and unfinished or damaged artefacts in the folders of every arm."""
    findings: list[Finding] = []
    runs = [run_dir(arm) for arm in expand_arms(config)]
    for folder in dict.fromkeys([runs[0].data, *(run.path for run in runs)]):
        if (holder := lock_holder(folder)) is not None:
            findings.append(problem("in use", f"{folder}: by {holder}", "wait, or choose another directory"))
    findings += _artefact(runs[0].shards, "shards") + _artefact(runs[0].embeddings, "embeddings")
    for run in runs:
        findings += _artefact(run.best, "student") + _checkpoints(run.checkpoints)
        left = [path for path in run.path.rglob(".*") if final_name(path.name) is not None and not _is_trial(path)]
        if left and not any(finding.subject == "in use" for finding in findings):
            taken = sum(bytes_below(path) if path.is_dir() else path.stat().st_size for path in left)
            findings.append(
                warning(
                    "left over",
                    f"{len(left)} unfinished file(s) of a stopped run take {size(taken)}, such as {left[0]}",
                    "running the command again removes or replaces them",
                )
            )
    return findings


def _is_trial(path: Path) -> bool:
    """Whether a file is of `_try`, which may be trying the same folder at this moment."""
    return any(part.startswith(_TRIAL) for part in path.parts)


def _artefact(folder: Path, kind: str) -> list[Finding]:
    if not folder.is_dir():
        return []
    try:
        manifest = read_manifest(folder, kind)
        if manifest is None:
            return [warning(kind, f"{folder}: unfinished", f"`{_MAKES[kind]}` resumes it")]
        _compare_sizes(folder, manifest)
    except PstError as error:
        return [problem(kind, f"{error.where}: {error.what}", f"run `{_MAKES[kind]}` again")]
    return [ok(kind, f"{folder}: complete, {len(manifest.files)} file(s)")]


def _checkpoints(root: Path) -> list[Finding]:
    """The checkpoints of a run; the next start skips a damaged one if another is intact."""
    names = [path.name for path in root.glob("checkpoint-*")]
    steps = sorted(int(name[11:]) for name in names if re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", name))
    whole: list[tuple[int, Finding]] = []
    damaged: list[tuple[int, Finding]] = []
    for step in steps:
        found = _artefact(root / f"checkpoint-{step}", "checkpoint")[0]
        (whole if found.level == "ok" else damaged).append((step, found))
    if damaged and not whole:
        return [
            problem("checkpoint", f"{found.what}; no other is intact", "restore one, or remove them to start over")
            for _, found in damaged
        ]
    findings = [
        warning("checkpoint", found.what, f"the next start skips it; the newest intact step is {whole[-1][0]}")
        for _, found in damaged
    ]
    return findings + ([ok("checkpoint", f"{root}: step {whole[-1][0]} is intact")] if whole else [])


def _compare_sizes(folder: Path, manifest: Manifest) -> None:
    for name, promised in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            raise IntegrityError("file is missing", path=path)
        if path.stat().st_size != promised["bytes"]:
            raise IntegrityError(f"{path.stat().st_size} bytes, but the manifest has {promised['bytes']}", path=path)
