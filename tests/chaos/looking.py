"""What a run holds: the digests by which two runs are compared, and whether everything under a final name is whole.

The caller chooses when to look, even in the middle of a write: a file under a final name must be correct at every
moment, one under a temporary name need not be. Nothing here does damage.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pst_dist.diagnostics.artefacts import verify
from pst_dist.embedding.vector_file import STATISTICS, read_tensor, read_vectors
from pst_dist.errors import InputError, PstError
from pst_dist.storage.manifest import MANIFEST, digest_of, sha256_file

_OF_THE_COMMAND = ("environment.json", "command.txt", "stage.json", "live.json")
"""What the last command says of itself."""
_CLOCKED = ("plots/", "report.html", "report.md", "export/README.md", "export/manifest.json")
"""What shows milliseconds, or digests of what does."""
_TIMES = ("second", "time", "milliseconds", "training", "data_wait")


def content(run: Path, *, clocked: bool = True) -> dict[str, str]:
    """sha256 of every file that a finished run keeps, times of the clock left out.

    With `clocked` the files that show such times to people, and pages and plots of them, are left out as well.
    """
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        hidden = any(part.startswith(".") for part in path.relative_to(run).parts)
        if not path.is_file() or hidden or path.name in _OF_THE_COMMAND:
            continue
        if name.startswith("tensorboard/") or (clocked and name.startswith(_CLOCKED)):
            continue
        if path.name == MANIFEST and (path.parent.name.startswith("checkpoint-") or path.parent.parent.name == "eval"):
            continue  # it holds the digest of a file with seconds in it
        data = path.read_bytes()
        if path.name in ("metrics.jsonl", "train.json", "run_state.json", "results.json"):
            text = data.decode()
            documents = text.splitlines() if path.suffix == ".jsonl" else [text]
            data = json.dumps([_timeless(json.loads(line)) for line in documents]).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _timeless(part) for key, part in value.items() if not any(word in key for word in _TIMES)}


def differing(wanted: dict[str, str], left: dict[str, str]) -> list[str]:
    """A line that names some of the files in which two runs differ; none when they are the same."""
    names = sorted(name for name in {**wanted, **left} if wanted.get(name) != left.get(name))
    return [f"{len(names)} file(s) differ: {', '.join(names[:4])}"] if names else []


def bytes_of(run: Path) -> dict[str, str]:
    """sha256 of every file but locks and temporary ones: what must not change."""
    return {
        str(path.relative_to(run)): sha256_file(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(run).parts)
    }


def leftovers(run: Path) -> list[str]:
    """Temporary names below a run."""
    return [str(path.relative_to(run)) for path in run.rglob(".*") if path.suffix in (".partial", ".replaced")]


def damaged(run: Path, *, stale: bool = True) -> list[str]:
    """What `pst verify` finds torn, changed or, unless not wanted, made from other inputs."""
    states = ("damaged", "stale") if stale else ("damaged",)
    try:
        return [finding.line for finding in verify(run) if finding.state in states]
    except InputError:
        return []  # nothing there yet


class Observer:
    """Looks at every file that has its final name, and counts."""

    def __init__(self) -> None:
        self.seen = 0
        """Files looked at, each as often as it was."""
        self._known: dict[tuple[Any, ...], Any] = {}

    def look(self, run: Path) -> list[str]:
        """A line for each file that cannot be verified at this moment."""
        trouble = []
        for folder, folders, names in os.walk(run):
            folders[:] = [name for name in folders if not name.startswith(".") and name != "tensorboard"]
            here = Path(folder)
            promised = self._once(here / MANIFEST, _promised) if MANIFEST in names else None
            for name in names:
                if name.startswith("."):
                    continue
                self.seen += 1
                path = here / name
                if promised is not None and name != MANIFEST and name in promised:
                    whole = self._once(path, sha256_file) == promised[name]
                elif promised is None and _is_artefact(here):
                    whole = False  # published before its manifest
                else:
                    whole = bool(self._once(path, _is_whole))
                trouble += [] if whole else [f"{path} cannot be verified"]
            trouble += [f"{here / name} is missing" for name in promised or () if not (here / name).is_file()]
        return trouble

    def _once(self, path: Path, read: Any) -> Any:
        """What `read` says of a file, asked again only when the file is another one or has changed."""
        status = path.stat()
        key = (str(path), read, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in self._known:
            self._known[key] = read(path)
        return self._known[key]


def _promised(path: Path) -> dict[str, str] | None:
    """The digests that an intact manifest promises."""
    try:
        raw = json.loads(path.read_text())
        rest = {key: raw[key] for key in ("kind", "fingerprint", "files", "extra")}
    except (ValueError, KeyError):
        return None
    return {name: entry["sha256"] for name, entry in raw["files"].items()} if digest_of(rest) == raw["digest"] else None


def _is_artefact(folder: Path) -> bool:
    """Whether a directory is one that comes into being as a whole."""
    kept = folder.name in ("shards", "best", "export") or folder.parent.name == "eval"
    return kept or re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def _is_whole(path: Path) -> bool:
    """Whether a file that no manifest lists can be told to be whole by itself, and is."""
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            return bool(read_tensor(path, "mean") if path.name == STATISTICS else read_vectors(path))
        elif path.suffix in (".json", ".yaml"):
            import yaml

            return yaml.safe_load(data) is not None  # JSON is YAML
        elif path.suffix == ".jsonl":
            lines = data.split(b"\n")  # a torn last line is the reader's to skip
            return all(json.loads(line) is not None for line in lines[:-1])
        elif path.suffix in (".html", ".png"):
            return data.rstrip().endswith((b"</html>", b"IEND\xaeB`\x82"))
    except (PstError, ValueError):
        return False
    return data.endswith(b"\n")
