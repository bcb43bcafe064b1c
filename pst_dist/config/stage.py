"""What a run is doing now: `stage.json` in its directory, for `pst watch` and for people.

`config.run_dir.recorded` opens it, each stage of the pipeline names itself, and the end leaves the exit code. The
training's own progress is in `live.json` (`training.reporting.live`).
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pst_dist.errors import PstError
from pst_dist.storage.json_files import read_typed, write_json

STAGE = "stage.json"
RUNNING, ENDED = "running", "ended"
_INTERRUPTED, _BUG = 130, 1


@dataclass(frozen=True)
class Stage:
    """What one command does in a run directory."""

    state: str
    """`running` or `ended`."""
    stage: str
    """The stage, such as `embed` or `train pst`; the last one when it has ended."""
    since: float
    """When this stage began: seconds since 1970."""
    started: float
    """When the command began."""
    host: str
    pid: int
    exit_code: int | None = None
    """The exit code of a command that has ended."""
    error: str | None = None
    """Its error, as the command line prints it."""


_open: contextvars.ContextVar[tuple[Path, ...]] = contextvars.ContextVar("pst_dist_stages", default=())


@contextlib.contextmanager
def staged(folder: Path, name: str) -> Iterator[None]:
    """Keep `folder/stage.json` while the body runs; whatever ends the body is recorded in it."""
    now = time.time()
    stage = Stage(RUNNING, name, now, now, os.uname().nodename, os.getpid())
    write_json(folder / STAGE, asdict(stage))
    token = _open.set((*_open.get(), folder))
    try:
        yield
    except BaseException as error:
        _end(folder, *_outcome(error))
        raise
    else:
        _end(folder, 0, None)
    finally:
        _open.reset(token)


def tell_stage(name: str) -> None:
    """Name the stage that begins now, in every directory that `staged` holds open."""
    for folder in _open.get():
        _change(folder, stage=name, since=time.time())


def read_stage(folder: Path) -> Stage | None:
    """The stage of a run directory; None where there is no readable one."""
    if not (folder / STAGE).is_file():
        return None
    with contextlib.suppress(PstError):
        return read_typed(folder / STAGE, Stage)
    return None


def _outcome(error: BaseException) -> tuple[int, str]:
    if isinstance(error, PstError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted"
    return _BUG, type(error).__name__  # its text may contain anything


def _end(folder: Path, code: int, error: str | None) -> None:
    with contextlib.suppress(PstError, OSError):  # a full disk must not hide the error that ends the run
        _change(folder, state=ENDED, exit_code=code, error=error)


def _change(folder: Path, **changes: object) -> None:
    found = read_stage(folder)
    if found is not None:
        write_json(folder / STAGE, asdict(replace(found, **changes)))  # type: ignore[arg-type]
