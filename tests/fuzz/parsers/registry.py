"""The list of parsers: functions of bytes, with valid inputs to start from; and what their modules share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Parser:
    """One parser."""

    name: str
    read: Read
    """Of the input and an empty folder in which it may be put; raises PstError, and nothing else, for a bad one."""
    seeds: Sequence[bytes]
    """Valid inputs."""
    weight: float = 1.0
    """Its share of the inputs; less for a slow one."""


PARSERS: list[Parser] = []


def parser(name: str, *seeds: bytes | str | dict[str, Any], weight: float = 1.0) -> Callable[[Read], Read]:
    """List a function as a parser; a seed that is no bytes is written as UTF-8 or JSON."""
    valid = [
        seed if isinstance(seed, bytes) else (seed if isinstance(seed, str) else json.dumps(seed)).encode()
        for seed in seeds
    ]

    def listed(read: Read) -> Read:
        PARSERS.append(Parser(name, read, valid, weight))
        return read

    return listed


def put(folder: Path, name: str, content: bytes) -> Path:
    """The input as a file of that name."""
    path = folder / name
    path.write_bytes(content)
    return path


def as_arguments(content: bytes) -> str:
    """As the system decodes arguments and the output of programs that we read as text."""
    return content.decode("utf-8", "surrogateescape")


def written(write: Callable[[Path], object], name: str) -> bytes:
    """The bytes of a file that one of our writers makes."""
    with tempfile.TemporaryDirectory(prefix="pst-fuzz-") as folder:
        write(Path(folder))
        return (Path(folder) / name).read_bytes()
