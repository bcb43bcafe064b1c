"""Kills stages at chosen system calls and runs them again: `python kill_points.py FOLDER STAGE=EVERY…`.

The stage runs in a forked child under ptrace, which stops at every system call of every thread. Each call that changes
a file (write, fsync, rename, mkdir, unlink, create…) is a point; the child is killed with SIGKILL as it enters the
call, so what was done before it is on disk and nothing after it. Then the same stage runs again, undisturbed, and what
it leaves must be what a run that nobody killed leaves. `random=N` kills the whole pipeline N times at random moments
instead, each start going on from what the one before it left. Prints one JSON line a stage with what it counted and
what differed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

_TRACEME, _SYSCALL, _GETREGS, _SETOPTIONS = 0, 24, 12, 0x4200
_GOOD_STOPS, _THREADS_TOO, _KILL_WITH_PARENT = 0x1, 0x8, 0x100000
_ANY_THREAD = 0x40000000
_ONCE = {73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir"}
_ONCE |= {84: "rmdir", 87: "unlink", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 316: "renameat2"}
_INTO_A_FILE = {1: "write", 18: "pwrite", 20: "writev"}
_OPEN, _CREATE = 257, os.O_CREAT
_OF_THE_START = (".lock", "environment.json", "command.txt")
_TIMED = ("tensorboard/", "eval/", "plots/", "report.html", "export/README.md", "export/manifest.json")
"""What holds milliseconds, or digests of what does."""


class _Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
        "fs_base gs_base ds es fs gs".split()
    ]


def can_trace() -> bool:
    """Whether this machine lets a process trace its child, and has the calls that are numbered above."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return False
    return _traced(lambda: None, None)[0] >= 0


@lru_cache(maxsize=1)
def _ptrace() -> Any:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    call.restype = ctypes.c_long
    return call


def _traced(work: Callable[[], None], kill_at: int | None) -> tuple[int, dict[str, int]]:
    """(points seen, calls by name) of `work` in a child, killed on entering point `kill_at`; -1: no tracing here.

    Where threads write beside one another the points come in another order each time.
    """
    ptrace = _ptrace()
    pid = os.fork()
    if pid == 0:
        if ptrace(_TRACEME, 0, None, None) < 0:
            os._exit(9)
        os.kill(os.getpid(), signal.SIGSTOP)
        _run_and_exit(work)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        return -1, {}
    ptrace(_SETOPTIONS, pid, None, _GOOD_STOPS | _THREADS_TOO | _KILL_WITH_PARENT)
    seen, names = 0, {}
    inside: dict[int, bool] = {pid: False}
    """Thread -> whether its last stop was on entering a call."""
    registers = _Registers()
    ptrace(_SYSCALL, pid, None, 0)
    while True:
        thread, status = os.waitpid(-1, _ANY_THREAD)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread != pid:
                continue
            if kill_at is None and status != 0:
                raise RuntimeError(f"the stage failed under tracing: {status}")
            return seen, names
        stopped = os.WSTOPSIG(status)
        # A new thread begins with a stop, and its birth is told by an event: neither is a signal to pass on.
        deliver = 0 if stopped in (signal.SIGTRAP, signal.SIGTRAP | 0x80, signal.SIGSTOP) else stopped
        if stopped == signal.SIGTRAP | 0x80:
            inside[thread] = not inside.get(thread, False)
            if inside[thread]:
                ptrace(_GETREGS, thread, None, ctypes.byref(registers))
                name = _name(registers)
                if name is not None:
                    if seen == kill_at:
                        os.kill(pid, signal.SIGKILL)
                        _reap(pid)
                        return seen, names
                    seen += 1
                    names[name] = names.get(name, 0) + 1
        ptrace(_SYSCALL, thread, None, deliver)


def _reap(pid: int) -> None:
    """Wait for a killed process and its threads; the process comes last."""
    while True:
        thread, status = os.waitpid(-1, _ANY_THREAD)
        if thread == pid and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            return


def _name(registers: _Registers) -> str | None:
    """The call's name when it changes a file; lines for a person (standard output and error) do not count."""
    number = registers.orig_rax
    if number in _INTO_A_FILE:
        return _INTO_A_FILE[number] if registers.rdi > 2 else None
    if number == _OPEN:
        return "create" if registers.rdx & _CREATE else None
    return _ONCE.get(number)


def _run_and_exit(work: Callable[[], None]) -> None:
    """In a child: run, and leave without this process's atexit handlers."""
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_in_child(work: Callable[[], None]) -> int:
    """The exit code of `work` in a child that nobody traces."""
    pid = os.fork()
    if pid == 0:
        _run_and_exit(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(run: Path) -> dict[str, str]:
    """sha256 of every file that a finished run keeps, times of the clock left out."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or path.name in _OF_THE_START or name.startswith(_TIMED):
            continue
        data = path.read_bytes()
        if path.name in ("metrics.jsonl", "train.json", "run_state.json"):
            data = json.dumps([_timeless(json.loads(line)) for line in _documents(path)]).encode()
        if path.name == "manifest.json" and path.parent.name.startswith("checkpoint-"):
            continue  # holds the digest of run_state.json, which has the seconds that training took
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "second" not in key and "time" not in key}


def stage_of(name: str, run: Path) -> tuple[list[Callable[[], None]], Callable[[], None]]:
    """(stages that come before it, the stage) over a small config in `run`."""
    from small_run import small_config

    from pst_dist.export import export
    from pst_dist.pipeline import make_embeddings, make_shards, run_all
    from pst_dist.trainer import train

    often = {"train__save_steps": 2, "train__eval_steps": 2, "train__max_steps": 8}
    config = small_config(run / "data", run, shards__samples_per_shard=4, **often)
    beside = small_config(run / "data", run, shards__samples_per_shard=4, train__save_in_background=True, **often)
    stages: dict[str, Callable[[], Any]] = {
        "shard": lambda: make_shards(config),
        "embed": lambda: make_embeddings(config),
        "train": lambda: train(config),
        "train-background": lambda: train(beside),
        "export": lambda: export(config),
    }
    if name == "random":
        return [], lambda: run_all(config)
    names = list(stages)
    before = names[: names.index(name)]
    if "train" in before:  # one of the two ways of saving is enough
        before = [other for other in before if other != ("train" if name == "train-background" else "train-background")]
    return [stages[other] for other in before], stages[name]


def main() -> None:
    """The stages of the command line, each in a folder of its own."""
    _remember_encodings()
    for word in sys.argv[2:]:
        stage, _, number = word.partition("=")
        kill_stage(Path(sys.argv[1]) / stage, stage, int(number))


def kill_stage(folder: Path, stage: str, every: int) -> None:
    """Kill one stage at every `every`-th point and compare."""
    run, clean = folder / "run", folder / "clean"
    before, work = stage_of(stage, run)
    for earlier in before:
        earlier()
    if stage in ("embed", "random"):
        work()
        shutil.rmtree(run / "data" / "embeddings" if stage == "embed" else run)
    if stage == "random":
        kill_at_random(work, run, every)
        return
    if run.exists():
        shutil.copytree(run, clean)
    assert run_in_child(work) == 0
    wanted = content(run)
    points, names = _again(run, clean, lambda: _traced(work, None))
    trouble: list[str] = []
    killed = 0
    for point in range(0, points, every):
        _again(run, clean, lambda point=point: _traced(work, point))
        killed += 1
        trouble += [f"point {point}: {line}" for line in _unverifiable(run)]
        code = run_in_child(work)
        if code != 0:
            trouble.append(f"point {point}: the second run ended with {code}")
        elif (left := content(run)) != wanted:
            differ = [name for name in {**wanted, **left} if wanted.get(name) != left.get(name)]
            trouble.append(f"point {point}: {', '.join(sorted(differ)[:4])} differ")
    print(
        json.dumps({"stage": stage, "points": points, "calls": names, "killed": killed, "trouble": trouble}), flush=True
    )


def kill_at_random(work: Callable[[], None], run: Path, kills: int) -> None:
    """Start the pipeline again and again, killed at random moments, until that many kills; each end is compared."""
    chance = random.Random(0)
    started = time.monotonic()
    assert run_in_child(work) == 0
    whole_seconds, wanted = time.monotonic() - started, content(run)
    shutil.rmtree(run)
    done, ends, trouble = 0, 0, list[str]()
    while done < kills or run.exists():
        pid = os.fork()
        if pid == 0:
            _run_and_exit(work)
        # Short lives too, so that a run is killed several times before it ends; the last ones may end.
        limit = time.monotonic() + (chance.uniform(0, whole_seconds / 2) if done < kills else 600)
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < limit:
            time.sleep(0.001)
        if ended == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
            trouble += [f"kill {done}: {line}" for line in _unverifiable(run)]
            continue
        if os.waitstatus_to_exitcode(ended[1]) != 0:
            trouble.append(f"after {done} kills a run ended with {os.waitstatus_to_exitcode(ended[1])}")
            break
        left = content(run)
        differ = [name for name in {**wanted, **left} if wanted.get(name) != left.get(name)]
        trouble += [f"after {done} kills: {', '.join(sorted(differ)[:4])} differ"] if differ else []
        ends += 1
        shutil.rmtree(run)
    print(json.dumps({"stage": "random", "killed": done, "ends": ends, "trouble": trouble}), flush=True)


def _again(run: Path, clean: Path, work: Callable[[], Any]) -> Any:
    """Put the run back to what it was before the stage, and do something there."""
    shutil.rmtree(run, ignore_errors=True)
    if clean.exists():
        shutil.copytree(clean, run)
    return work()


def _unverifiable(run: Path) -> list[str]:
    """What stands under a final name and is not what its manifest promises."""
    from pst_dist.errors import InputError
    from pst_dist.verify import verify

    try:
        return [finding.line for finding in verify(run) if finding.state in ("damaged", "stale")]
    except InputError:
        return []  # nothing there yet


def _remember_encodings() -> None:
    """Encode each text once in this process: its children get the encoder's real vectors at once."""
    from pst_dist.encoder import TextEncoder

    known: dict[tuple[str, ...], Any] = {}
    encode, build = TextEncoder.encode, TextEncoder.__init__
    encoders: dict[str, dict[str, Any]] = {}

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


if __name__ == "__main__":
    main()
