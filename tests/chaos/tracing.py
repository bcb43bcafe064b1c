"""Watches a child at every system call that changes a file: to kill it there, or to let the call fail.

The work runs in a forked child under ptrace. Each write, fsync, rename, mkdir, unlink, create… is a point, counted from
zero. The child pauses when it enters one, and the caller decides what happens: continue, die, or get an error number
instead of the call being made. All its threads are watched; when they write concurrently, the order of the points
varies. The caller also provides the work.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_TRACEME, _SYSCALL, _GETREGS, _SETREGS, _SETOPTIONS = 0, 24, 12, 13, 0x4200
_GOOD_STOPS, _THREADS_TOO, _KILL_WITH_PARENT = 0x1, 0x8, 0x100000
_ANY_THREAD = 0x40000000
_ONCE = {73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir"}
_ONCE |= {84: "rmdir", 87: "unlink", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 316: "renameat2"}
_INTO_A_FILE = {1: "write", 18: "pwrite", 20: "writev"}
_OPEN, _CREATE = 257, os.O_CREAT
_NO_CALL = 2**64 - 1

KILL = -1
"""What `at_point` returns to have the child killed there."""
NEED_ROOM = ("write", "pwrite", "writev", "create", "mkdir", "mkdirat", "rename", "renameat", "renameat2")
"""Calls that a full disk may refuse."""


class _Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
        "fs_base gs_base ds es fs gs".split()
    ]


@dataclass
class Traced:
    """How a watched child ended."""

    code: int = 0
    """Its exit code; negative for the signal that killed it."""
    points: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    """Points by the name of the call."""


def can_trace() -> bool:
    """Whether this machine lets a process trace its child, and has the calls that are numbered above."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return False
    try:
        return traced(lambda: 0).code == 0
    except PermissionError:
        return False


@lru_cache(maxsize=1)
def _ptrace() -> Any:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    call.restype = ctypes.c_long
    return call


def traced(
    work: Callable[[], int | None], at_point: Callable[[int, int, str], int] = lambda pid, number, name: 0
) -> Traced:
    """Run `work` in a child; `at_point(pid, number, name)` is asked at each point, while the child stands still.

    It returns 0 to go on, `KILL`, or an error number with which the call then fails without being made. `work` gives
    the exit code. Raises PermissionError where no child may be traced.
    """
    ptrace = _ptrace()
    pid = os.fork()
    if pid == 0:
        if ptrace(_TRACEME, 0, None, None) < 0:
            os._exit(9)
        os.kill(os.getpid(), signal.SIGSTOP)
        run_and_exit(work)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        raise PermissionError("this process may not trace its child")
    ptrace(_SETOPTIONS, pid, None, _GOOD_STOPS | _THREADS_TOO | _KILL_WITH_PARENT)
    result, registers = Traced(), _Registers()
    inside: dict[int, bool] = {}
    """Thread -> whether its last stop was on entering a call."""
    refused: dict[int, int] = {}
    """Thread -> the error number with which its call is to fail."""
    ptrace(_SYSCALL, pid, None, 0)
    while True:
        thread, status = os.waitpid(-1, _ANY_THREAD)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread != pid:
                continue
            result.code = os.waitstatus_to_exitcode(status)
            return result
        stopped = os.WSTOPSIG(status)
        # A new thread begins with a stop, and its birth is told by an event: neither is a signal to pass on.
        deliver = 0 if stopped in (signal.SIGTRAP, signal.SIGTRAP | 0x80, signal.SIGSTOP) else stopped
        if stopped == signal.SIGTRAP | 0x80:
            inside[thread] = not inside.get(thread, False)
            if inside[thread]:
                ptrace(_GETREGS, thread, None, ctypes.byref(registers))
                name = _name(registers)
                if name is not None:
                    verdict = at_point(pid, result.points, name)
                    result.points += 1
                    result.calls[name] = result.calls.get(name, 0) + 1
                    if verdict == KILL:
                        os.kill(pid, signal.SIGKILL)
                        result.code = _reaped(pid)
                        return result
                    if verdict:
                        refused[thread] = verdict
                        registers.orig_rax = _NO_CALL
                        ptrace(_SETREGS, thread, None, ctypes.byref(registers))
            elif thread in refused:
                ptrace(_GETREGS, thread, None, ctypes.byref(registers))
                registers.rax = 2**64 - refused.pop(thread)
                ptrace(_SETREGS, thread, None, ctypes.byref(registers))
        ptrace(_SYSCALL, thread, None, deliver)


def _reaped(pid: int) -> int:
    """The exit code of a killed process, once its threads are gone too; the process comes last."""
    while True:
        thread, status = os.waitpid(-1, _ANY_THREAD)
        if thread == pid and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            return os.waitstatus_to_exitcode(status)


def _name(registers: _Registers) -> str | None:
    """The call's name when it changes a file; lines for a person (standard output and error) do not count."""
    number = registers.orig_rax
    if number in _INTO_A_FILE:
        return _INTO_A_FILE[number] if registers.rdi > 2 else None
    if number == _OPEN:
        return "create" if registers.rdx & _CREATE else None
    return _ONCE.get(number)


def run_and_exit(work: Callable[[], int | None]) -> None:
    """In a child: run, and leave with the work's exit code, without the parent's atexit handlers."""
    code = 1
    try:
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
