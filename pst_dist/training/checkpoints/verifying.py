"""Compares the files of an artefact with its manifest, each rank a part of them; every rank learns the result.

One rank that hashes everything keeps all others waiting, and ranks that each hash everything read the same bytes many
times. `storage.artefact` does the same in one process.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pst_dist.distributed.progress import alive
from pst_dist.distributed.ranks import Ranks, gathered, together
from pst_dist.storage.artefact import Artefact, verify_at_once
from pst_dist.storage.manifest import Manifest, sha256_file

_MOST_THREADS = 16


def parts_of(files: Mapping[str, Mapping[str, Any]], parts: int) -> list[list[str]]:
    """The names of a manifest's files in `parts` parts of about as many bytes: the largest first, each to the least."""
    sizes = [0] * parts
    names: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = min(range(parts), key=lambda part: (sizes[part], part))
        sizes[least] += files[name]["bytes"]
        names[least].append(name)
    return names


def digests_together(paths: Sequence[Path], ranks: Ranks) -> dict[Path, str]:
    """The sha256 of files that every rank can read, each hashed by one rank; collective.

    Raises EnvironmentFault on every rank when one cannot read its files.
    """
    mine: dict[Path, str] = {}
    with together(ranks):
        sizes = {str(path): {"bytes": path.stat().st_size} for path in paths}
        for name in parts_of(sizes, ranks.world_size)[ranks.rank]:
            mine[Path(name)] = sha256_file(Path(name), on_part=alive)
    return {path: digest for part in gathered(mine) for path, digest in part.items()}


def verify_changed(artefact: Artefact, manifest: Manifest, ranks: Ranks) -> None:
    """Compare the files that changed since they were compared last, on every node; collective, raises as the other."""
    names, stamps = artefact.changed(manifest)
    wanted = sorted({name for told in gathered(names) for name in told})
    if wanted:
        verify_together(artefact.directory, manifest, ranks, on_each_node=True, names=wanted)
        if ranks.local_rank == 0:
            artefact.were_compared(manifest, stamps)


def verify_together(
    directory: Path,
    manifest: Manifest,
    ranks: Ranks,
    *,
    on_each_node: bool = False,
    names: Collection[str] | None = None,
) -> None:
    """Compare all files, or those with these names, with the manifest, shared out over the ranks; collective.

    `on_each_node` is for files that may be on each node's own disk: every node then compares all of them. Raises
    IntegrityError or EnvironmentFault on every rank when any rank finds a fault.
    """
    hosts = gathered(os.uname().nodename)
    near = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    group = near if on_each_node else list(range(ranks.world_size))
    files = {name: entry for name, entry in manifest.files.items() if names is None or name in names}
    mine = parts_of(files, len(group))[group.index(ranks.rank)]
    threads = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // len(near)))
    with together(ranks):
        verify_at_once(directory, manifest, mine, threads=threads, on_file=alive)
