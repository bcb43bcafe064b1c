"""Files and folders that a command may replace: new ones, and those that pst itself wrote earlier.

Every writer of a file that a person names (`--rejects`, `--output`, `--report`, `--page`) or looks at (pages, plots,
batch scripts) uses `write_output`; every writer that replaces or empties a directory asks `refuse_foreign_folder`
first. Nothing here follows a link to a file elsewhere, opens a device or pipe, or replaces an input of the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pst_dist.errors import InputError, PstError
from pst_dist.storage.atomic import atomic_path, disk_errors
from pst_dist.storage.leftovers import final_name
from pst_dist.storage.regular_files import open_regular
from pst_dist.text.urls import has_scheme

IsOurs = Callable[[bytes], bool]
"""Whether a file that begins with these bytes (64 KiB at most) was written by pst."""
_HEAD_BYTES = 1 << 16
_REMEDY = "name another file"
_RUN_CONFIG = "config.resolved.yaml"
_MANIFEST = "manifest.json"
_MARKS = {"student": "pst.json", "export": "pst.json", "encoder": "pst_encoder.json"}
"""Kind -> a file that only a directory of ours has; such a directory may contain any file of a Hugging Face model."""
_SHARD = r"[a-z][a-z0-9_]*-\d{6}"
_NAMES = {
    "shards": re.compile(rf"{_SHARD}\.(tar|index\.json)|[a-z][a-z0-9_]*\.wids\.json"),
    "embeddings": re.compile(rf"{_SHARD}\.safetensors|statistics\.safetensors"),
    "evaluation": re.compile(r"results\.json|samples\.jsonl"),
    "checkpoint": re.compile(r"run_state\.json|[A-Za-z0-9_.-]{1,100}\.safetensors"),
    "checkpoints": re.compile(r"checkpoint-\d+"),
    "messages": re.compile(r"[a-z][a-z0-9_]{0,99}\.jsonl"),
    "parquet": re.compile(r"[a-z][a-z0-9_]{0,99}\.parquet"),
    "gguf": re.compile(r".{1,200}\.gguf|Modelfile|README\.md"),
    "lm_eval": re.compile(r"rows\.jsonl|utils\.py|pst_.+\.yaml|__pycache__"),
}
"""Kind -> the names in a directory of that kind; `checkpoints` and `lm_eval` have no manifest of their own."""


_CONFIG_KEYS = (b"task", b"arm", b"output_dir", b"seed", b"data", b"shards", b"embed", b"layout", b"student", b"loss")


# ---- what pst writes, by how it begins


def is_reject_list(head: bytes) -> bool:
    """Bad rows as `pst check` lists them."""
    line = head.partition(b"\n")[0]
    if len(line) == _HEAD_BYTES:
        return False
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        return isinstance(row, dict) and row.keys() == {"path", "line", "code", "what", "text"}
    return False


def is_page(head: bytes) -> bool:
    """An HTML page of ours: its generator mark, or the style sheet that the pages of older versions begin with."""
    return b'<meta name="generator" content="pst_dist">' in head or b":root { --ink: #1f2733; --soft: #5b6472;" in head


def is_markdown_page(head: bytes) -> bool:
    """A Markdown page of ours, by its first line."""
    return head.startswith(b"<!-- generator: pst_dist -->")


def is_node_report(head: bytes) -> bool:
    """What `pst doctor --report` writes."""
    return head.lstrip().startswith(b"{") and b'"kind": "pst doctor"' in head


def is_picture(head: bytes) -> bool:
    """A PNG of ours: marked, or without the mark that other writers leave, as older versions wrote it."""
    return head.startswith(b"\x89PNG\r\n\x1a\n") and (
        b"Software\0pst_dist" in head[:1024] or b"Software\0" not in head[:1024]
    )


def is_experiment_page(head: bytes) -> bool:
    """The Markdown page of an experiment: it links to its own outcomes."""
    return b"](outcomes.jsonl)" in head


def is_batch_script(head: bytes) -> bool:
    """The Slurm script of a run."""
    return b"#SBATCH" in head and b"pst_dist" in head


def is_answer_list(head: bytes) -> bool:
    """Answers of `pst answer --output`: JSON lines with the student's answer."""
    return head.startswith(b"{") and b'"student_answer":' in head


def is_answer_manifest(head: bytes) -> bool:
    """What those answers were made from."""
    return head.startswith(b"{") and b'"kind": "answers"' in head


def is_config(head: bytes) -> bool:
    """A config as pst resolves it, with every section."""
    return all(re.search(rb"^%s:" % key, head, re.MULTILINE) for key in _CONFIG_KEYS)


# ---- files


def check_output(
    path: Path,
    is_ours: IsOurs,
    *,
    inputs: Iterable[Path] = (),
    inside: Path | None = None,
    remedy: str = _REMEDY,
) -> None:
    """Raises InputError, with `remedy`, for a file that must not be written.

    Only a file that does not exist, is empty, or is a regular file that `is_ours` recognises may be written. A link, a
    device, a pipe, a folder and a URL are refused, and so is a file of `inputs`, by whatever name. `inside` is the run
    directory that the file must be in once all links are followed.
    """
    if has_scheme(str(path)):
        raise InputError("is a URL, and pst writes files of this machine only", remedy, path=path)
    with disk_errors(path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            found = None
        except ValueError as error:  # a NUL character in the name
            raise InputError(f"cannot be written: {error}", remedy, path=repr(str(path))[:200]) from error
    if inside is not None:
        refuse_link_out(path, inside)
    if found is None:
        return
    if stat.S_ISLNK(found.st_mode):
        raise InputError("is a link, and what it points to would be overwritten", remedy, path=path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError("exists and is not a regular file", remedy, path=path)
    for one in inputs:
        with contextlib.suppress(OSError, ValueError):
            if os.path.samefile(one, path):
                raise InputError("is an input of this command", remedy, path=path)
    if found.st_size == 0:
        return
    with open_regular(path, remedy=remedy) as stream:
        head = stream.read(_HEAD_BYTES)
    if not is_ours(head):
        raise InputError("exists and was not written by pst", remedy, path=path)


@contextlib.contextmanager
def output_path(
    path: Path,
    is_ours: IsOurs,
    *,
    inputs: Iterable[Path] = (),
    inside: Path | None = None,
    remedy: str = _REMEDY,
) -> Iterator[Path]:
    """`atomic_path` for a file that passes `check_output`; raises InputError when it does not."""
    check_output(path, is_ours, inputs=inputs, inside=inside, remedy=remedy)
    with atomic_path(path, follow_links=False) as partial:
        yield partial


def write_output(
    path: Path,
    content: str | bytes,
    is_ours: IsOurs,
    *,
    inputs: Iterable[Path] = (),
    inside: Path | None = None,
    remedy: str = _REMEDY,
) -> None:
    """Write a text (as UTF-8) or bytes, complete or not at all; raises InputError as `check_output` does."""
    with output_path(path, is_ours, inputs=inputs, inside=inside, remedy=remedy) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def refuse_link_out(path: Path, root: Path) -> None:
    """Raises InputError when the file `path` of the run directory `root` is, by links, a file outside of it."""
    target, within = os.path.realpath(path), os.path.realpath(root)
    if target != within and not target.startswith(within.rstrip(os.sep) + os.sep):
        raise InputError(f"is a link that leads out of {root}, to {target}", "remove the link", path=path)


# ---- folders


def refuse_foreign_folder(folder: Path, kind: str) -> None:
    """Raises InputError, naming the first thing, when replacing or emptying `folder` would lose what pst did not write.

    `kind` is the kind of a `Manifest`, `checkpoints` for the folder of all checkpoints, or `lm_eval`. A missing or
    empty folder is fine, and so is one of ours that is damaged. A link may lead to a folder on another disk, but not
    into another run.
    """
    if not os.path.lexists(folder) or not folder.exists():
        return
    if not folder.is_dir():
        raise InputError("is a file, and pst needs a folder of that name", "move it, or name another one", path=folder)
    if folder.is_symlink() and _is_in_another_run(folder):
        raise InputError("is a link into another run, whose files would be lost", "remove the link", path=folder)
    with _unreadable(folder):
        names = sorted(os.listdir(folder))
    listed = _listed(folder, kind)
    if listed is None and _MARKS.get(kind) in names:
        return  # ours, without an intact manifest that could say more
    foreign = [name for name in names if not _is_known(name, kind, listed)]
    if foreign:
        raise InputError(
            f"would be replaced, but {foreign[0]!r} in it was not written by pst",
            "move that away, or name another output_dir",
            path=folder,
        )


def _is_in_another_run(link: Path) -> bool:
    target = Path(os.path.realpath(link))
    home = Path(os.path.realpath(link.parent))
    return target.parent != home and (target.parent / _RUN_CONFIG).is_file()


def _listed(folder: Path, kind: str) -> set[str] | None:
    """The first parts of the names in a manifest of that kind; None when there is no such manifest."""
    with contextlib.suppress(PstError, OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
        with open_regular(folder / _MANIFEST) as stream:
            manifest = json.load(stream)
        if manifest["kind"] == kind:
            return {name.partition("/")[0] for name in manifest["files"]}
    return None


def _is_known(name: str, kind: str, listed: set[str] | None) -> bool:
    if name == _MANIFEST or final_name(name) is not None:
        return True
    if listed is not None:  # what a desktop or a file server leaves in any folder is no loss
        return name in listed or name.startswith(".") or name == "__pycache__"
    pattern = _NAMES.get(kind)
    return pattern is not None and (pattern.fullmatch(name) is not None or name == ".lock")


@contextlib.contextmanager
def _unreadable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", "name another output_dir", path=folder) from error
