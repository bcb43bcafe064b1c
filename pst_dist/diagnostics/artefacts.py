"""`pst verify DIR`: checks that every file is unchanged and that the artefacts of a run belong together.

It checks each manifest's own digest first, then compares every file with its manifest, names each one that differs,
and gives the command that repairs it. The stages make the same checks before they use an artefact; this is for people
who moved, copied or restored files. `pipeline.repair` recreates what can be made here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.errors import InputError, IntegrityError, PstError
from pst_dist.logs import Progress, progress
from pst_dist.storage.leftovers import final_name
from pst_dist.storage.manifest import (
    MANIFEST,
    REMAKE,
    Manifest,
    all_files,
    bytes_below,
    kind_written_in,
    read_manifest,
    verify_files,
)

log = logging.getLogger(__name__)
State = Literal["intact", "damaged", "stale", "unfinished", "leftover"]
_NAMES = {"shards": "shards", "embeddings": "embeddings", "best": "student", "export": "export"}
"""Directories that should contain a manifest, by name; so should `checkpoint-N` and those in `eval`."""


@dataclass(frozen=True)
class Finding:
    """One artefact, or one bad file of it."""

    state: State
    kind: str
    path: Path
    what: str
    remedy: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether a stage would refuse it; a leftover only takes space."""
        return self.state not in ("intact", "leftover")

    @property
    def line(self) -> str:
        """The finding as one line of text."""
        return f"{self.state:10s} {self.path}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


def verify(root: Path) -> list[Finding]:
    """Check every artefact of this program at or below `root`, in the order of paths; changes nothing.

    Raises InputError when there are none.
    """
    if not root.is_dir():
        raise InputError("no such directory", "give a run, data or model directory", path=root)
    folders = list(_artefacts(root))
    findings: list[Finding] = []
    intact: dict[Path, Manifest] = {}
    files = sum(len(all_files(folder)) for folder, kind in folders if kind is not None)
    with progress("verify", total=files, unit="files") as bar:
        for folder, kind in folders:
            if kind is None:
                what = f"{bytes_below(folder) / 2**20:.1f} MiB left behind by a killed command"
                findings.append(Finding("leftover", "leftover", folder, what, "running that command again removes it"))
                continue
            found, manifest = _check(folder, kind, bar)
            findings += found
            if manifest is not None and not any(finding.is_problem for finding in found):
                intact[folder.resolve()] = manifest
    findings += _links(intact)
    if not findings:
        raise InputError("no artefacts of pst found", "give a run, data or model directory", path=root)
    return findings


def _artefacts(root: Path) -> Iterator[tuple[Path, str | None]]:
    """(directory, kind) of everything that should have a manifest; kind None for leftovers of a killed command."""
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        inside = folder.relative_to(root).parts
        if any(final_name(part) for part in inside[:-1]):
            continue
        if inside and final_name(inside[-1]):
            yield folder, None
        elif (kind := _kind(folder)) is not None:
            yield folder, kind


def _kind(folder: Path) -> str | None:
    """The kind of artefact in a directory; None if it is not ours."""
    if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.parent.name == "checkpoints":
        return "checkpoint"
    if folder.parent.name == "eval":
        return "evaluation"
    if (folder / MANIFEST).is_file():
        return kind_written_in(folder) or _NAMES.get(folder.name, "artefact")
    # Other programs use such names too, so the folder must contain files that look like ours.
    ours = any(folder.glob("*.index.json")) or any(folder.glob("*.safetensors"))
    return _NAMES.get(folder.name) if ours else None


def _check(folder: Path, kind: str, bar: Progress) -> tuple[list[Finding], Manifest | None]:
    """Check one artefact: a finding for each bad file, or a single one if it is intact."""
    remedy = REMAKE.get(kind, "")
    try:
        manifest = read_manifest(folder, kind)
    except PstError as error:  # damaged, or not readable
        return [Finding("damaged", kind, folder / MANIFEST, error.what, remedy or error.remedy)], None
    if manifest is None:
        return [Finding("unfinished", kind, folder, f"{kind} without a manifest", remedy)], None
    bad = []
    for name in sorted(manifest.files):
        try:
            verify_files(folder, manifest, [name])
        except IntegrityError as error:
            bad.append(Finding("damaged", kind, Path(error.path or folder), error.what, remedy))
        except PstError as error:  # a failing disk, no permission: the file itself may be right
            bad.append(Finding("damaged", kind, folder / name, error.what, error.remedy))
        bar.advance(1)
    if bad:
        return bad, None
    size = sum(entry["bytes"] for entry in manifest.files.values())
    what = f"{kind}, {len(manifest.files)} files, {size / 2**20:.1f} MiB, digest {manifest.digest[:12]}"
    return [Finding("intact", kind, folder, what)], manifest


def _links(intact: dict[Path, Manifest]) -> Iterator[Finding]:
    """Artefacts that are intact but were made from others than the current ones."""
    for folder, manifest in intact.items():
        for kind, source, digest in _sources(folder, manifest):
            current = intact.get(source)
            if isinstance(digest, str) and current is not None and current.digest != digest:
                what = f"made from different {kind} ({digest[:12]}, not {current.digest[:12]})"
                yield Finding("stale", manifest.kind, folder, what, REMAKE.get(manifest.kind, ""))


def _sources(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Path, Any]]:
    """(kind, path, recorded digest) of each artefact that this one was made from."""
    extra = manifest.extra
    if manifest.kind == "embeddings":
        yield "shards", folder.parent / "shards", extra.get("shards_digest")
    elif manifest.kind in ("messages", "parquet"):
        yield "shards", folder.parent / "shards", extra.get("shards")
    elif manifest.kind == "student":
        data = _data_of(folder.parent)
        yield "shards", data / "shards", extra.get("shards")
        yield "embeddings", data / "embeddings", extra.get("embeddings")
    elif manifest.kind == "evaluation":
        yield "weights", folder.parent.parent / "best", extra.get("student")
    elif manifest.kind == "export":
        yield "weights", folder.parent / "best", extra.get("student")
    elif manifest.kind == "gguf":
        yield "export", folder.parent.parent / "export", extra.get("export")


def _data_of(run: Path) -> Path:
    """The data directory of a run, according to its saved config."""
    try:
        return run_dir(load_config(str(run))).data.resolve()
    except PstError:
        return run / "data"
