"""What `pst watch` knows about a run: read from the files of its directory, so it works over ssh and with any launcher.

`stage.json` says which stage runs and how it ended, `live.json` how the training goes, `metrics.jsonl` how it went.
Nothing here is written, and no file has to exist. `diagnostics.watch_page` turns it into text.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pst_dist.config.locate import RESOLVED
from pst_dist.config.stage import ENDED, STAGE, Stage, read_stage
from pst_dist.errors import InputError, IntegrityError, PstError
from pst_dist.evaluation.records import read_metrics
from pst_dist.storage.json_files import read_object, typed
from pst_dist.training.reporting.live import LIVE

_RUNS_BELOW = ("*/*", "runs/*/*/seed-*", "runs/*/*/*/seed-*", "runs/*/*/*/*/seed-*")
"""Where a Slurm array has its runs, and an experiment, with up to two keys of `vary`."""
SILENT_SECONDS = 600.0
"""After so long without a sign from another host, the page says so."""


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class RankLine(_Lenient):
    """One rank, as in `training.reporting.live.RankSigns`."""

    rank: int
    host: str
    device: str
    busy: float
    memory_bytes: int


class Answer(_Lenient):
    """One sample answer, as in `training.validation.SampleAnswer`."""

    question: str
    gold: str
    answer: str
    tokens: int
    right: bool


class Warned(_Lenient):
    """One warning of the training."""

    time: float
    text: str


class Training(_Lenient):
    """What `live.json` holds."""

    state: str
    arm: str
    step: int
    total: int
    started: float
    updated: float
    host: str
    pid: int
    seconds_per_step: float | None = None
    seconds_left: float | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    validation: dict[str, Any] | None = None
    ranks: list[RankLine] = Field(default_factory=list)
    answers: list[Answer] = Field(default_factory=list)
    warnings: list[Warned] = Field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class ArmView:
    """One training: of the directory itself, or of an arm below it."""

    name: str
    training: Training | None
    """None before its training begins."""
    history: Sequence[dict[str, Any]]
    """The rows of metrics.jsonl."""
    is_finished: bool
    """Whether the training has reached its last step."""


@dataclass(frozen=True)
class View:
    """A run directory at one moment."""

    folder: Path
    stage: Stage | None
    arms: tuple[ArmView, ...]
    is_gone: bool
    """Whether the process that works here has ended without saying so, as after SIGKILL."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen here without another command."""
        if self.stage is not None:
            return self.is_gone or self.stage.state == ENDED
        running = [arm for arm in self.arms if arm.training is not None and arm.training.state == "running"]
        return self.is_gone or not running

    @property
    def exit_code(self) -> int:
        """The exit code of the command that has ended; 0 when it left none and nothing failed."""
        if self.stage is not None and self.stage.exit_code is not None:
            return self.stage.exit_code
        return int(any(arm.training is not None and arm.training.state == "failed" for arm in self.arms))


def view_of(folder: Path) -> View:
    """Read a run directory; raises InputError when it is none, or nothing has begun there."""
    if not folder.is_dir():
        raise InputError("no such run directory", "name the output_dir of a run that has started", path=folder)
    stage = read_stage(folder)
    arms = tuple(_arm(place, name) for name, place in _places(folder))
    if stage is None and not any(arm.training or arm.history for arm in arms):
        newest = _newest_below(folder)
        if newest is not None:
            raise InputError("contains several runs", f"watch one of them, such as the newest: {newest}", path=folder)
        raise InputError(
            f"no run has started here: neither {STAGE} nor {LIVE} nor metrics.jsonl",
            "name the output_dir of a run",
            path=folder,
        )
    signs = [(stage.host, stage.pid)] if stage is not None and stage.state != ENDED else []
    if stage is None:
        signs = [
            (arm.training.host, arm.training.pid) for arm in arms if arm.training and arm.training.state == "running"
        ]
    return View(folder, stage, arms, bool(signs) and all(_is_gone(host, pid) for host, pid in signs))


def _newest_below(folder: Path) -> Path | None:
    """The run that gave the last sign, of an experiment or of a Slurm array with a folder per seed and arm."""
    found = [file for pattern in _RUNS_BELOW for file in folder.glob(f"{pattern}/{LIVE}")]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def _places(folder: Path) -> list[tuple[str, Path]]:
    """(arm, directory) of each training in a run directory, those that have not begun among them."""
    from pst_dist.config.loading import load_config

    names: list[str] = []
    if (folder / RESOLVED).is_file():
        with contextlib.suppress(PstError):  # of another version; what is on disk then decides
            config = load_config(str(folder))
            names = list(config.arms)
            if not names:
                return [(config.arm, folder)]
    if not names:
        names = sorted(file.parent.name for file in folder.glob(f"*/{LIVE}"))
    return [(name, folder / name) for name in names] if names else [(folder.name, folder)]


def read_live(folder: Path) -> Training | None:
    """How the training in a directory goes; None where it has not begun or `live.json` cannot be read."""
    if (folder / LIVE).is_file():
        with contextlib.suppress(PstError):
            return typed(read_object(folder / LIVE), Training, folder / LIVE)
    return None


def _arm(folder: Path, name: str) -> ArmView:
    history: list[dict[str, Any]] = []
    with contextlib.suppress(IntegrityError):
        history = read_metrics(folder / "metrics.jsonl")
    return ArmView(name, read_live(folder), history, (folder / "train.json").is_file())


def _is_gone(host: str, pid: int) -> bool:
    """Whether a process of this host has ended; False for other hosts, of which nothing is known."""
    return host == os.uname().nodename and not Path(f"/proc/{pid}").exists()
