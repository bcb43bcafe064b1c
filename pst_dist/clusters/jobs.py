"""The launcher interface: how `pst submit NAME` hands a run to a kind of cluster and follows it there.

A launcher is a folder here, `clusters/NAME/`: `submit.py` defines `LAUNCHER`, and the `WORDS` of its `__init__.py` are
its help. A package of your own brings one by an entry point of the group `pst_dist.launchers` that names an instance
or a subclass of `Launcher`. Nothing is imported until its name is asked for.
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
"""Takes each line that a person should see, as it comes."""


@dataclass(frozen=True)
class Submission:
    """What one command line asks for."""

    config: Config
    request: Any
    """The launcher's own: its words, parsed."""


@dataclass(frozen=True)
class Job:
    """A job that the cluster knows."""

    name: str
    """The cluster's own number or name for it."""
    place: str = ""
    """Where to ask about it, such as a dashboard's address; empty when there is one place."""
    submitted: str = ""
    """The line that announces a new job."""


@dataclass(frozen=True)
class Status:
    """Where a job stands."""

    line: str
    """For people."""
    exit_code: int | None
    """That of the job's command, 128 + number after a signal; None until it has ended."""


class Launcher(abc.ABC):
    """One kind of cluster. The methods are called in this order, and only `submit` changes anything."""

    checks: frozenset[str] = frozenset()
    """The checks of `pst doctor`, by subject, whose result here also holds where the job will run."""

    @abc.abstractmethod
    def parse(self, config: str, words: Sequence[str]) -> Submission:
        """Tell the job's own words from keys of the config and load the config; raises ConfigError or InputError."""

    @abc.abstractmethod
    def render(self, submission: Submission) -> str:
        """What would be submitted, as text; contacts no cluster and writes nothing. Raises ConfigError."""

    @abc.abstractmethod
    def check(self, submission: Submission) -> None:
        """Raises a PstError when the cluster cannot be reached or the job could never start or never work."""

    @abc.abstractmethod
    def submit(self, submission: Submission, say: Say) -> Job:
        """Submit, or raise with nothing left behind."""

    @abc.abstractmethod
    def find(self, name: str, words: Sequence[str]) -> Job:
        """A job that was submitted earlier; `words` say where to look. Raises ConfigError for what is no job's name."""

    @abc.abstractmethod
    def status(self, job: Job) -> Status:
        """Where a job stands now; raises InputError or EnvironmentFault when the cluster does not know."""

    @abc.abstractmethod
    def follow(self, job: Job, say: Say) -> int:
        """Say the job's changes of state and its log until it has ended; returns its exit code. Never touches it."""

    @abc.abstractmethod
    def look_again(self, job: Job) -> str:
        """How to follow the job again and how to end it, on one line."""


def launcher_names() -> list[str]:
    """The names that `pst submit` takes: folders here, then entry points."""
    return sorted({*_folders(), *_entry_points()})


def words_of_folders() -> str:
    """The help of the launchers that are folders here: the words that each takes besides keys of the config."""
    return "\n".join(importlib.import_module(f"pst_dist.clusters.{name}").WORDS for name in _folders())


def load_launcher(name: str) -> Launcher:
    """The launcher of that name; raises ConfigError when there is none, EnvironmentFault when it cannot be loaded."""
    if name in _folders():
        found = importlib.import_module(f"pst_dist.clusters.{name}.submit").LAUNCHER
    elif name in (points := _entry_points()):
        try:
            found = points[name].load()
            found = found() if isinstance(found, type) else found
        except Exception as error:  # a package of somebody else's
            raise EnvironmentFault(
                f"the launcher {name!r} of {points[name].value} cannot be loaded ({type(error).__name__}: {error})",
                "see the package that brings it",
            ) from error
    else:
        raise ConfigError(f"there is no launcher {name!r}", f"choose from {', '.join(launcher_names())}")
    if not isinstance(found, Launcher):
        raise EnvironmentFault(f"the launcher {name!r} is not a pst_dist.clusters.jobs.Launcher", "see its package")
    return found


def _folders() -> list[str]:
    import pst_dist.clusters

    return sorted(module.name for module in pkgutil.iter_modules(pst_dist.clusters.__path__) if module.ispkg)


def _entry_points() -> dict[str, EntryPoint]:
    import importlib.metadata  # slow, and only needed for a launcher that is no folder here

    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
