"""The journal of a teacher's replies: one fsynced line for each request that was answered.

A reply is on disk before anything is done with it, so a job that is killed and started again never asks for it twice.
What is not promised: a request in flight when the process dies has no line yet and is asked again, so one kill can cost
at most as many requests twice as were in flight, `--concurrency` of them.

The first line has the settings. A journal of other settings is refused by their names. A line that a kill cut off is
removed at the next start. Space for the replies in flight is reserved in a second file, so that a disk that fills up
while they are on their way still has room for them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pst_dist.errors import EnvironmentFault, IntegrityError, PstError, StaleError
from pst_dist.storage.atomic import disk_errors
from pst_dist.storage.json_files import canonical_json, parse_json, typed
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.outputs import refuse_link_out
from pst_dist.teacher.messages import Reply

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
_RESERVE = "journal.reserve"
_VERSION = 1
_DAMAGED = "remove this line: its request will be asked again, and the others are kept"
_LINE_BYTES = 1 << 12
_TOKEN_BYTES = 24
"""Room for one generated token: some languages take this many bytes once JSON has escaped them."""


class Journal:
    """An open journal; made by `open_journal`. Not for several threads."""

    def __init__(self, path: Path, reserve_bytes: int) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        self._reserve, self._reserve_bytes = path.with_name(_RESERVE), reserve_bytes
        self._stream = -1
        self.full: PstError | None = None
        """Set when a line found room only in the reserve; no further request may be sent."""

    def add(self, key: str, reply: Reply) -> None:
        """Append one reply and sync it. Raises EnvironmentFault only if not even the reserve had room for it."""
        reply = reply.storable()
        line = canonical_json({"key": key, **reply.to_json()}).encode() + b"\n"
        try:
            self._append(line)
        except EnvironmentFault as fault:
            self.full = fault
            self._reserve.unlink(missing_ok=True)
            self._append(line)
        self.replies[key] = reply

    def _append(self, line: bytes) -> None:
        """All of the line or, after an error, nothing of it."""
        before = os.fstat(self._stream).st_size
        with disk_errors(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._stream, rest) :]
                os.fsync(self._stream)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._stream, before)
                raise

    def _open(self, settings: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self._stream = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        content = _whole_lines(self._stream, self.path)
        if not content:
            self._append(canonical_json({"journal": _VERSION, "settings": settings}).encode() + b"\n")
        else:
            head, *lines = content
            _refuse_other(head, settings, self.path)
            for number, line in enumerate(lines, 2):
                self._read(line, number)
        self._hold_reserve()

    def _read(self, line: bytes, number: int) -> None:
        try:
            row = parse_json(line, self.path)
        except IntegrityError as error:
            raise IntegrityError(error.what, _DAMAGED, path=self.path, line=number) from error
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise IntegrityError("is not a reply", _DAMAGED, path=self.path, line=number)
        key = row.pop("key")
        self.replies[key] = typed(row, Reply, self.path, _DAMAGED)

    def _hold_reserve(self) -> None:
        """Allocate the reserve before the first request; raises EnvironmentFault when there is no room for it."""
        with disk_errors(self._reserve):
            descriptor = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.posix_fallocate(descriptor, 0, self._reserve_bytes)
            except OSError:
                self._reserve.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def _close(self) -> None:
        self._reserve.unlink(missing_ok=True)
        if self._stream >= 0:
            os.close(self._stream)


@contextlib.contextmanager
def open_journal(folder: Path, settings: dict[str, Any], *, in_flight: int, reply_tokens: int) -> Iterator[Journal]:
    """Open or begin the journal in `folder`, holding the folder's lock and the reserve for `in_flight` replies.

    Raises StaleError, naming what differs, for a journal of other settings; LockedError while another process uses
    it; IntegrityError when it is damaged; EnvironmentFault when the disk has no room for the replies.
    """
    with directory_lock(folder):
        path = folder / JOURNAL
        refuse_link_out(path, folder)
        journal = Journal(path, in_flight * (_LINE_BYTES + _TOKEN_BYTES * reply_tokens))
        try:
            journal._open(settings)
            yield journal
        finally:
            journal._close()


def read_replies(folder: Path, settings: dict[str, Any]) -> dict[str, Reply]:
    """The replies in a journal, without changing anything; empty when there is none. Raises as `open_journal` does."""
    path = folder / JOURNAL
    if not path.is_file():
        return {}
    journal = Journal(path, 0)
    head, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    if head:
        _refuse_other(head, settings, path)
    for number, line in enumerate(lines, 2):
        journal._read(line, number)
    return journal.replies


def _whole_lines(stream: int, path: Path) -> list[bytes]:
    """The complete lines; what follows the last of them is cut off, because its process was killed in the middle."""
    size = os.fstat(stream).st_size
    content = b""
    while len(content) < size:
        piece = os.pread(stream, size - len(content), len(content))
        if not piece:
            break
        content += piece
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s: removed a line that was not finished", path)
        with disk_errors(path):
            os.ftruncate(stream, whole)
    return content[:whole].split(b"\n")[:-1]


def _refuse_other(head: bytes, settings: dict[str, Any], path: Path) -> None:
    found = parse_json(head, path)
    if not isinstance(found, dict) or found.get("journal") != _VERSION or not isinstance(found.get("settings"), dict):
        raise IntegrityError("is not a journal of this version of pst", "move it away", path=path, line=1)
    earlier = found["settings"]
    changed = sorted(name for name in earlier.keys() | settings.keys() if earlier.get(name) != settings.get(name))
    if changed:
        name = changed[0]
        more = f" (also {', '.join(changed[1:])})" if changed[1:] else ""
        raise StaleError(
            f"its replies were asked for with other settings: {name} was {_shown(earlier.get(name))}, "
            f"now {_shown(settings.get(name))}{more}",
            "use the earlier settings, or name another output",
            path=path,
        )


def _shown(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 60 else text[:57] + "..."
