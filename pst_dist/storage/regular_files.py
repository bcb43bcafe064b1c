"""Opening files that a user named: regular files only, of bounded size.

Opening a FIFO blocks until somebody writes to it, a device may never end, and some devices act on being opened. So the
kind is checked before the file is opened, and again on the open file in case it was replaced in between.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pst_dist.errors import InputError, PstError

MAX_SETTINGS_BYTES = 4 << 20
"""Size limit of a config, DeepSpeed JSON, hostfile or model config: a thousand times the usual size."""
MAX_HEADER_BYTES = 100_000_000
"""Size limit of a safetensors header; the format's own reader has the same limit."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, *, remedy: str = "name a regular file", kind: type[PstError] = InputError) -> BinaryIO:
    """Open a file for reading in binary mode, following links; never waits for a writer.

    Raises `kind` with `remedy` for a folder, pipe, socket or device, for a loop of symbolic links, and for a file
    that is missing or unreadable.
    """
    try:
        _refuse_other_kinds(os.stat(path).st_mode, path, remedy, kind)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _refuse_other_kinds(os.fstat(descriptor).st_mode, path, remedy, kind)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise kind(_reason(error), remedy, path=path) from error


def read_regular(
    path: Path,
    most: int = MAX_SETTINGS_BYTES,
    *,
    remedy: str = "name a regular file",
    kind: type[PstError] = InputError,
) -> bytes:
    """The content of a regular file of at most `most` bytes; raises as `open_regular` does, and for a larger file."""
    return read_with_stat(path, most, remedy=remedy, kind=kind)[0]


def read_with_stat(
    path: Path, most: int, *, remedy: str, kind: type[PstError] = InputError
) -> tuple[bytes, os.stat_result]:
    """`read_regular`, and the state of the file when it was opened."""
    with open_regular(path, remedy=remedy, kind=kind) as stream:
        found = os.fstat(stream.fileno())
        try:
            data = stream.read(most + 1)
        except OSError as error:
            raise kind(_reason(error), remedy, path=path) from error
    if len(data) > most:
        raise kind(f"is larger than {_size(most)}", remedy, path=path)
    return data, found


def read_regular_text(
    path: Path,
    most: int = MAX_SETTINGS_BYTES,
    *,
    remedy: str = "name a regular file",
    kind: type[PstError] = InputError,
) -> str:
    """The text of a regular UTF-8 file, without a byte order mark; raises as `read_regular` does."""
    try:
        return read_regular(path, most, remedy=remedy, kind=kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"byte {error.start + 1} is not UTF-8", "convert the file to UTF-8", path=path) from error


def safetensors_header(path: Path, *, kind: type[PstError] = InputError) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the offset of its first tensor byte.

    The file states the header's length, so the length is checked against the file size before the header is read
    (https://github.com/huggingface/safetensors, "Format"). Raises `kind` for an invalid header.
    """
    with open_regular(path, kind=kind) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
            what = f"not safetensors: a header of {length} bytes in a file of {size}"
            raise kind(what, "copy the file again", path=path)
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise kind("not safetensors: its header is not JSON", "copy the file again", path=path) from error
    if not isinstance(header, dict):
        raise kind("not safetensors: its header is not a JSON object", "copy the file again", path=path)
    return header, 8 + length


def _refuse_other_kinds(mode: int, path: Path, remedy: str, kind: type[PstError]) -> None:
    if stat.S_ISREG(mode):
        return
    name = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
    raise kind(f"is {name}, not a regular file", remedy, path=path)


def _reason(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"cannot open it: {error}"
    if error.errno == errno.ELOOP:
        return "cannot open it: the symbolic links form a loop"
    if error.errno == errno.ENOENT:
        return "no such file"
    return f"cannot open it: {error.strerror or error}"


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count} bytes"
