"""The paths of a run, and the record that lets later commands work from the run directory alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pst_dist.config.loading import dump_config
from pst_dist.config.locate import RESOLVED
from pst_dist.config.schema import Config
from pst_dist.config.stage import STAGE, staged
from pst_dist.errors import ConfigError, DataError, InputError, IntegrityError, LockedError
from pst_dist.storage.atomic import write_text
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import MANIFEST, write_json
from pst_dist.storage.object_store import RemoteFolder, fetch_folder, is_url
from pst_dist.storage.outputs import check_output, is_config, refuse_link_out
from pst_dist.text.redaction import redact, redacted_command

_RECORD = (RESOLVED, "command.txt", "environment.json", STAGE)
_RECORD_LOCK = ".record.lock"
_OTHER_DIRECTORY = "name another output_dir"
_REFUSALS = (ConfigError, DataError, InputError, IntegrityError, LockedError)
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "webdataset", "sentence-transformers", "peft", "ray")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Several runs may share a data directory."""

    path: Path
    data: Path
    """The data directory; with `remote`, the local copy."""
    remote: RemoteFolder | None = None
    """The location of the data if data_dir is a URL."""

    @property
    def shards(self) -> Path:
        """Webdataset tars, their indexes and `manifest.json`."""
        return self.data / "shards"

    @property
    def embeddings(self) -> Path:
        """One safetensors file per shard, and `manifest.json`."""
        return self.data / "embeddings"

    @property
    def checkpoints(self) -> Path:
        """`checkpoint-<step>` directories, from which training can resume."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The student with the best validation result, as a Hugging Face folder, and its alignment head."""
        return self.path / "best"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def training(self) -> Path:
        """The result of the training, written after its last step."""
        return self.path / "train.json"

    @property
    def stacks(self) -> Path:
        """`rank-<rank>.txt`: where each rank of a training was when it ended because one of them hung."""
        return self.path / "stacks"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of a fresh student, trained once."""
        return self.path / ".tokenizer.json"

    @property
    def checked_rows(self) -> Path:
        """Which students and layouts were found to fit all rows of the shards."""
        return self.data / ".shards.checked.json"

    @property
    def export(self) -> Path:
        """The finished model for other tools."""
        return self.path / "export"

    @property
    def adapter(self) -> Path:
        """The adapter alone of a LoRA student (`pst export --adapter`)."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The self-contained HTML page."""
        return self.path / "report.html"

    def evaluation(self, split: str) -> Path:
        """Results and samples of one scored split."""
        return self.path / "eval" / split


def run_dir(config: Config) -> RunDir:
    """The paths of the run that a config describes. Creates nothing."""
    path = Path(config.output_dir)
    if is_url(config.data_dir):
        here = Path(config.data_cache) if config.data_cache else path / "data"
        return RunDir(path, here, RemoteFolder(str(config.data_dir).rstrip("/")))
    return RunDir(path, Path(config.data_dir) if config.data_dir else path / "data")


def check_lasting(config: Config) -> None:
    """Raise ConfigError if this process runs in a Ray job and would write into the job's temporary directory."""
    if "working_dir_files" in Path.cwd().parts:
        refuse_relative(config, "this job works")


def refuse_relative(config: Config, who: str) -> None:
    """Raise ConfigError for relative folders, which would be in a copy of the directory; `who` starts the reason."""
    for key, folder in (("output_dir", config.output_dir), ("data_dir", config.data_dir)):
        if folder is not None and not is_url(folder) and not Path(folder).is_absolute():
            raise ConfigError(
                f"{key}={folder} is relative, but {who} in a copy of your directory that Ray deletes at its end",
                f"set {key}=/… to a path on a disk that all nodes share",
            )


def data_settings(config: Config) -> dict[str, str]:
    """The settings with which another run, with a different output_dir, uses the same data."""
    run = run_dir(config)
    return {"data_dir": run.remote.url, "data_cache": str(run.data)} if run.remote else {"data_dir": str(run.data)}


def fetch_data(config: Config, *, on_file: Callable[[], None] = lambda: None) -> None:
    """Download shards and embeddings from object storage to this machine. Does nothing if data_dir is a folder.

    `on_file` is called before each file. Files that exist with the expected bytes are kept. All processes may call it:
    on each machine one downloads and the others wait.
    """
    run = run_dir(config)
    if run.remote is not None:
        for kind in ("shards", "embeddings"):
            fetch_folder(run.remote.child(kind), run.data / kind, kind, on_file=on_file)


def expand_arms(config: Config) -> list[Config]:
    """One config per trained arm: the config itself, or with `arms` one per arm below output_dir, sharing the data."""
    if not config.arms:
        return [config]
    base = run_dir(config)
    return [
        Config.model_validate(
            config.model_dump() | {"arm": arm, "arms": [], "output_dir": str(base.path / arm), **data_settings(config)}
        )
        for arm in config.arms
    ]


def environment() -> dict[str, str]:
    """Package versions and the platform, for the record."""
    versions = {}
    for package in ("pst_dist", *_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "platform": platform.platform(), **versions}


def record_run(config: Config, *, command: str | None = None) -> None:
    """Save the resolved config, the command and the environment in the run directory, all without passwords.

    `command` is that of this process when not given; a notebook's says nothing about the run.
    Raises InputError when the record would replace files of something else.
    """
    path = Path(config.output_dir)
    _refuse_foreign_record(path)
    write_text(path / RESOLVED, dump_config(config))
    write_text(path / "command.txt", (redact(command) if command else redacted_command(["pst", *sys.argv[1:]])) + "\n")
    write_json(path / "environment.json", environment())


def _refuse_foreign_record(path: Path) -> None:
    """Raises InputError when the record would replace files that are not those of a run, as in a project's folder."""
    check_output(path / RESOLVED, is_config, inside=path, remedy=_OTHER_DIRECTORY)
    is_run = (path / RESOLVED).is_file()
    for name in _RECORD[1:]:
        refuse_link_out(path / name, path)
        if not is_run and os.path.lexists(path / name):
            raise InputError("exists and was not written by pst", _OTHER_DIRECTORY, path=path / name)


@contextlib.contextmanager
def recorded(config: Config, *, wait_seconds: float = 0.0, command: str | None = None) -> Iterator[None]:
    """Call `record_run`, and restore the earlier record if the work inside is refused.

    Otherwise a refused command (different settings, a directory in use) would leave its own settings behind as those of
    the existing run, and every later command would be refused too. A first record is removed if the refusal came before
    anything was created. After any other end (an interrupt, a full disk, a divergence) the new record stays, because
    work was done.

    The record has its own lock, held for the whole time, because the work takes the directory's lock only after the
    record is written. Of two commands that start together, the refused one must neither overwrite the other's record
    nor take the directory for an empty one. Raises LockedError if another command does not release the lock within
    `wait_seconds`. With several ranks the first one continues without a record instead, and is refused with the others.
    """
    with contextlib.ExitStack() as stack:
        lock = directory_lock(Path(config.output_dir), name=_RECORD_LOCK, wait_seconds=wait_seconds)
        try:
            stack.enter_context(lock)
        except LockedError:
            # The other ranks wait for this one; the directory's own lock then refuses all of them together.
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                raise
        else:
            stack.enter_context(_recorded(config, command))
        yield


@contextlib.contextmanager
def _recorded(config: Config, command: str | None) -> Iterator[None]:
    """`recorded` for the command that holds the record's lock."""
    path = Path(config.output_dir)
    earlier = {name: (path / name).read_text("utf-8") for name in _RECORD if (path / name).is_file()}
    record_run(config, command=command)
    try:
        with staged(path, "starting"):
            yield
    except _REFUSALS:
        if earlier or not any(path.rglob(MANIFEST)):
            for name in _RECORD:
                if name in earlier:
                    write_text(path / name, earlier[name])
                else:
                    (path / name).unlink(missing_ok=True)
            remove_if_empty(path)
        raise


def remove_if_empty(path: Path) -> None:
    """Remove a run directory that contains nothing but its empty lock files."""
    if path.is_dir() and all(entry.name in (".lock", _RECORD_LOCK) for entry in path.iterdir()):
        with contextlib.suppress(OSError):
            for name in (".lock", _RECORD_LOCK):
                (path / name).unlink(missing_ok=True)
            path.rmdir()
