"""Stages of a small real run in forked children: the libraries are imported once, so a trial costs a second or less.

A child runs a `pst` command line as a shell would; its exit code and output are recorded. The real encoder encodes the
texts once for all children. The goals decide what happens to the children.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.tracing import run_and_exit

_PIPE_BYTES = 1 << 20
SMALL = {"shards__samples_per_shard": 4, "train__save_steps": 2, "train__eval_steps": 2, "train__max_steps": 8}
"""Ten shards of training rows, and a checkpoint and a validation at every second of eight steps."""
OTHER_ROWS = {"data__test": "gen:last_letters?rows=12&seed=7&words=2"}
"""A change by which some shards become others and the rest stay."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Exit code; negative for the signal that killed it."""
    said: str
    """Standard output and error."""
    peak_bytes: int
    """The most memory it had."""


class Child:
    """A forked child at work."""

    def __init__(self, work: Callable[[], int | None]) -> None:
        self._reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # it never has to wait for a reader
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(writer)
            run_and_exit(work)
        os.close(writer)
        os.set_blocking(self._reader, False)
        self._ended: Ended | None = None

    def poll(self) -> Ended | None:
        """How it ended, or None while it runs."""
        if self._ended is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._ended = Ended(code, self._said(), usage.ru_maxrss * 1024)
        return self._ended

    def wait(self, seconds: float = 300) -> Ended:
        """How it ended; after so many seconds it is killed, which is told by code -9."""
        limit = time.monotonic() + seconds
        while (ended := self.poll()) is None:
            if time.monotonic() > limit:
                self.send(signal.SIGKILL)
                limit = float("inf")
            time.sleep(0.002)
        return ended

    def send(self, number: int) -> None:
        """A signal, unless it has been waited for."""
        if self._ended is None:
            os.kill(self.pid, number)

    def _said(self) -> str:
        parts = []
        try:
            while part := os.read(self._reader, _PIPE_BYTES):
                parts.append(part)
        except BlockingIOError:
            pass
        os.close(self._reader)
        return b"".join(parts).decode(errors="replace")


def run(work: Callable[[], int | None]) -> Ended:
    """Work in a child, to its end."""
    return Child(work).wait()


def pst(*words: object) -> Callable[[], int]:
    """The work of one `pst` command line."""

    def work() -> int:
        from pst_dist.cli.main import run_verb

        return run_verb([str(word) for word in words])

    return work


_PREPARED: list[Path] = []


def prepare(folder: Path) -> Path:
    """Import what a run needs and encode the rows of the small runs, once, so that children start with both.

    Files for this go below `folder` the first time. Returns the data directory of the small run, shards and embeddings.
    """
    if not _PREPARED:
        from small_run import small_config

        from pst_dist.pipeline import make_embeddings, make_shards

        _remember_encodings()
        for name, changes in (("rows", {}), ("other-rows", OTHER_ROWS)):
            config = small_config(folder / name, folder / "unused", **SMALL | changes)
            make_shards(config)
            make_embeddings(config)
        _import_what_a_run_imports(folder)
        _PREPARED.append(folder / "rows")
    return _PREPARED[0]


def _import_what_a_run_imports(folder: Path) -> None:
    """Have a child run everything once, and import here what it had imported by then: never in a child again."""
    names, run_folder = folder / "imported.txt", folder / "warm-up"
    config = config_file(run_folder, folder / "warm-up.yaml", train__report_to="tensorboard")

    def everything() -> int:
        code = pst("run", config)() or pst("verify", run_folder)()
        names.write_text("\n".join(sys.modules))
        return code

    assert (ended := run(everything)).code == 0, ended.said
    shutil.rmtree(run_folder)
    for name in names.read_text().split("\n"):
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # names that a library made up for itself
                importlib.import_module(name)


def config_file(run_folder: Path, place: Path, **changes: Any) -> Path:
    """A config of a small run as a file at `place`."""
    from small_run import small_config

    config = small_config(run_folder / "data", run_folder, **SMALL | changes)
    place.write_text(json.dumps(config.model_dump(mode="json")))
    return place


def _remember_encodings() -> None:
    """Encode each text once in this process: its children get the encoder's real vectors at once."""
    from pst_dist.embedding.encoder import TextEncoder

    known: dict[tuple[str, ...], Any] = {}
    encode, build = TextEncoder.encode, TextEncoder.__init__
    encoders: dict[str, dict[str, Any]] = {}
    if encode.__name__ == "encoded":
        return

    def init(self: TextEncoder, config: Any, **options: Any) -> None:
        key = repr((config, options))
        if key not in encoders:
            build(self, config, **options)
            encoders[key] = self.__dict__
        self.__dict__ = encoders[key]

    def encoded(self: TextEncoder, texts: Any, **options: Any) -> Any:
        key = tuple(texts)
        if key not in known:
            known[key] = encode(self, texts, **options)
        return known[key]

    TextEncoder.__init__, TextEncoder.encode = init, encoded  # type: ignore[method-assign]
