"""Read compressed data files (.gz, .zst) as a stream with a size limit.

A file of one megabyte can expand to terabytes. A file is refused when its expanded size is both large and far beyond
the compression ratio of text; ordinary rows stay below a ratio of 20.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, Protocol

from pst_dist.errors import DataError, EnvironmentFault, InputError

COMPRESSED = (".gz", ".zst", ".zstd")
OTHER_ARCHIVES = (".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".lz4", ".br")
EXPANDED_BYTES = 1 << 30
"""A file may always expand to this many bytes, 1 GiB."""
EXPANSION = 200
"""Beyond that, to this many times its own size."""


class Readable(Protocol):
    """The stream interface that parsers need."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; all of them when negative."""

    def readline(self, limit: int = -1, /) -> bytes:
        """A line including its line break, or the first `limit` bytes of it."""


def data_suffix(name: str) -> str:
    """The suffix of the data format in lower case, ignoring the compression suffix: `rows.JSONL.gz` -> `.jsonl`."""
    path = Path(name)
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def data_stem(name: str) -> str:
    """The file name without the suffixes of format and compression."""
    path = Path(name)
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def expansion_limit(size: int) -> int:
    """Maximum number of bytes that a file of `size` bytes may expand to."""
    return max(EXPANDED_BYTES, EXPANSION * size)


def decompressed(path: Path, stream: Any, size: int) -> Readable:
    """The content of a compressed file of `size` bytes; raises EnvironmentFault if zstandard is not installed."""
    if path.suffix.lower() == ".gz":
        return _Bounded(path, gzip.GzipFile(fileobj=stream), expansion_limit(size))
    try:
        import zstandard
    except ImportError as error:
        raise EnvironmentFault(
            "reading .zst needs the zstandard library", "pip install zstandard, or decompress the file", path=path
        ) from error
    return _Bounded(path, _Zstandard(stream, zstandard), expansion_limit(size))


class _Zstandard(io.RawIOBase):
    """The content of a .zst file. The library's own reader silently accepts a truncated file; this one raises."""

    _PIECE = 1024
    """Bytes passed to the decompressor at a time; they can expand by a factor of 30,000."""
    _MAX_WINDOW = 1 << 27
    """Maximum memory in bytes that a frame may request, as in the `zstd` command."""

    def __init__(self, stream: Any, library: Any) -> None:
        self._stream, self._new = stream, library.ZstdDecompressor(max_window_size=self._MAX_WINDOW).decompressobj
        self._frame, self._waiting, self._out = self._new(), b"", memoryview(b"")
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any, /) -> int:
        while not self._out:
            piece = self._waiting or self._stream.read(self._PIECE)
            self._waiting = b""
            if not piece:
                if self._inside:
                    raise EOFError("the file ends inside a zstandard frame")
                return 0
            self._inside = True
            self._out = memoryview(self._frame.decompress(piece))
            if self._frame.eof:  # another frame may follow
                self._waiting, self._frame, self._inside = self._frame.unused_data, self._new(), False
        count = min(len(target), len(self._out))
        target[:count], self._out = self._out[:count], self._out[count:]
        return count


class _Bounded:
    """A decompressing stream with a size limit that reports damaged files."""

    def __init__(self, path: Path, stream: Any, most: int) -> None:
        self._path, self._left, self._most = path, most, most
        self._stream = stream if isinstance(stream, gzip.GzipFile) else io.BufferedReader(stream)

    def read(self, size: int = -1, /) -> bytes:
        return self._counted(self._stream.read, self._left + 1 if size < 0 else min(size, self._left + 1))

    def readline(self, limit: int = -1, /) -> bytes:
        return self._counted(self._stream.readline, self._left + 1 if limit < 0 else min(limit, self._left + 1))

    def _counted(self, read: Any, size: int) -> bytes:
        try:
            data = read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"cannot decompress: {error}", "copy or create the file again", path=self._path) from error
        except Exception as error:
            # zstandard's own exception; the library is imported only when a file needs it.
            if type(error).__module__.split(".")[0] != "zstandard":
                raise
            raise DataError(f"cannot decompress: {error}", "copy or create the file again", path=self._path) from error
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"expands to more than {self._most >> 20} MiB", "decompress it and inspect it", path=self._path
            )
        return data
