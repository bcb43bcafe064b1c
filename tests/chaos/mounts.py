"""Mounts of a child's own: small disks, read-only places and several file systems, which nobody else sees.

The child may change them freely: its mounts disappear when it ends. Needs root, or a user who may create a user
namespace; otherwise `PermissionError` gives the reason.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.tracing import run_and_exit

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


def in_own_mounts(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child with mounts of its own; raises PermissionError where there can be none."""
    with tempfile.NamedTemporaryFile(prefix="answer-") as answer:
        pid = os.fork()
        if pid == 0:

            def told() -> int:
                try:
                    _enter()
                except OSError as error:
                    Path(answer.name).write_bytes(pickle.dumps(PermissionError(str(error))))
                    return 0
                Path(answer.name).write_bytes(pickle.dumps(work()))
                return 0

            run_and_exit(told)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != 0:
            raise RuntimeError(f"the child with mounts of its own ended with {code}")
        result = pickle.loads(Path(answer.name).read_bytes())
    if isinstance(result, PermissionError):
        raise result
    return result


def _enter() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(_NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no mount namespace here: {os.strerror(number)}")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", Path("/"), "", _REC | _PRIVATE)


def _mount(source: str, place: Path, kind: str, flags: int, data: str = "") -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(source.encode(), str(place).encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {place}: {os.strerror(number)}")


def small_disk(place: Path, size: int) -> Path:
    """A tmpfs of `size` bytes at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", place, "tmpfs", 0, f"size={size}")
    return place


def resize(place: Path, size: int) -> None:
    """Give a small disk another size, at least what is on it."""
    _mount("tmpfs", place, "tmpfs", _REMOUNT, f"size={size}")


def used(place: Path) -> int:
    """Bytes that are taken on a small disk."""
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def read_only(place: Path) -> None:
    """Make a directory read-only, by a mount over itself."""
    _mount(str(place), place, "", _BIND)
    _mount(str(place), place, "", _BIND | _REMOUNT | _READ_ONLY)


def over(source: Path, place: Path) -> None:
    """Mount a directory at another place."""
    place.mkdir(parents=True, exist_ok=True)
    _mount(str(source), place, "", _BIND)


def unmount(place: Path) -> None:
    """Take the uppermost mount away from a place."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.umount2(str(place).encode(), 0) != 0:
        raise OSError(ctypes.get_errno(), f"umount {place}")
