"""The launcher interface: how `pst submit NAME` submits a run to a kind of cluster and follows it.

A launcher is a folder here, `clusters/NAME/`: `submit.py` defines `LAUNCHER`, and the `WORDS` of its `__init__.py` are
its help. A package of your own adds a launcher with an entry point in the group `pst_dist.launchers` that names an
instance or a subclass of `Launcher`. A launcher is imported only when it is used.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pst_dist.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pst_dist.config.schema import Config

GROUP = "pst_dist.launchers"
Say = Callable[[str], None]
"""Called with each line for the user, as it arrives."""


@dataclass(frozen=True)
class Submission:
    """What one command line asks for."""

    config: Config
    request: Any
    """The launcher's own options, parsed."""


@dataclass(frozen=True)
class Job:
    """A job on the cluster."""

    name: str
    """The cluster's number or name of the job."""
    place: str = ""
    """Where to ask about the job, such as a dashboard's address; empty when there is only one place."""
    submitted: str = ""
    """The line that announces a new job."""


@dataclass(frozen=True)
class Status:
    """The state of a job."""

    line: str
    """The state in words."""
    exit_code: int | None
    """Exit code of the job's command, 128 + number after a signal; None until it has ended."""


class Launcher(abc.ABC):
    """One kind of cluster. The methods are called in this order, and only `submit` changes anything."""

    checks: frozenset[str] = frozenset()
    """The checks of `pst doctor`, by subject, whose result on this machine is also valid where the job will run."""

    @abc.abstractmethod
    def parse(self, config: str, words: Sequence[str]) -> Submission:
        """Separate the launcher's options from config keys and load the config; raises ConfigError or InputError."""

    @abc.abstractmethod
    def render(self, submission: Submission) -> str:
        """What would be submitted, as text; contacts no cluster and writes nothing. Raises ConfigError."""

    @abc.abstractmethod
    def check(self, submission: Submission) -> None:
        """Raises a PstError when the cluster cannot be reached, or when the job could never start or never succeed."""

    @abc.abstractmethod
    def submit(self, submission: Submission, say: Say) -> Job:
        """Submit the job; on an error, nothing is left behind."""

    @abc.abstractmethod
    def find(self, name: str, words: Sequence[str]) -> Job:
        """A job that was submitted earlier; `words` say where. Raises ConfigError when `name` is not a job name."""

    @abc.abstractmethod
    def status(self, job: Job) -> Status:
        """The state of a job now; raises InputError or EnvironmentFault when the cluster cannot tell."""

    @abc.abstractmethod
    def follow(self, job: Job, say: Say) -> int:
        """Report the job's state changes and its log until it has ended; returns its exit code. Read-only."""

    @abc.abstractmethod
    def look_again(self, job: Job) -> str:
        """How to follow the job again and how to cancel it, on one line."""


def launcher_names() -> list[str]:
    """The names that `pst submit` accepts: folders here and entry points, sorted."""
    return sorted({*_folders(), *_entry_points()})


def words_of_folders() -> str:
    """The help of the launchers that are folders here: the options that each takes besides config keys."""
    return "\n".join(importlib.import_module(f"pst_dist.clusters.{name}").WORDS for name in _folders())


def load_launcher(name: str) -> Launcher:
    """The launcher of that name; raises ConfigError when there is none, EnvironmentFault when it cannot be loaded."""
    if name in _folders():
        found = importlib.import_module(f"pst_dist.clusters.{name}.submit").LAUNCHER
    elif name in (points := _entry_points()):
        try:
            found = points[name].load()
            found = found() if isinstance(found, type) else found
        except Exception as error:  # a third-party package may raise anything
            raise EnvironmentFault(
                f"the launcher {name!r} of {points[name].value} cannot be loaded ({type(error).__name__}: {error})",
                "repair or remove the package that provides it",
            ) from error
    else:
        raise ConfigError(f"there is no launcher {name!r}", f"choose from {', '.join(launcher_names())}")
    if not isinstance(found, Launcher):
        raise EnvironmentFault(
            f"the launcher {name!r} is not a pst_dist.clusters.jobs.Launcher", "repair or remove its package"
        )
    return found


def _folders() -> list[str]:
    import pst_dist.clusters

    return sorted(module.name for module in pkgutil.iter_modules(pst_dist.clusters.__path__) if module.ispkg)


def _entry_points() -> dict[str, EntryPoint]:
    import importlib.metadata  # slow, and only needed for a launcher that is not a folder here

    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
