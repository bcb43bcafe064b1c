"""The storm: the whole pipeline on a small disk, again and again, under everything at once.

Random kills, pauses, requests to stop and a filler that takes the disk's room come at random moments; after each end
that was no success the same command starts again. Every success must have the same digests, and over the minutes
neither memory nor open files nor temporary files may grow.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos import mounts
from chaos.children import Child, Ended, config_file, prepare, pst, run
from chaos.goal import Result, measured, seconds_left
from chaos.looking import Observer, content, damaged, differing, leftovers

_DISK = 64 << 20
_EXPECTED = {
    "kill": (-signal.SIGKILL, 0),
    "told": (75, -signal.SIGTERM, 0),
    "pause": (0,),
    "full": (4, 0),
    "none": (0,),
}
"""Harm -> the exit codes that it may lead to: 0 when it came too late; a stage that listens to no signal is ended."""


def storm(folder: Path, full: bool) -> Iterator[Result]:
    """Twenty minutes of it, or a few starts."""
    prepare(folder)
    folder.mkdir(exist_ok=True)
    seconds = min(1200.0 if full else 10.0, seconds_left())
    try:
        yield mounts.in_own_mounts(lambda: _storm(mounts.small_disk(folder / "disk", _DISK), folder, seconds))
    except PermissionError as error:
        yield _storm(folder / "disk", folder, seconds, note=f"no small disk here ({error}); ")


def _storm(disk: Path, folder: Path, seconds: float, note: str = "") -> Result:
    chance, observer = random.Random(2), Observer()
    run_folder = disk / "run"
    run_folder.mkdir(parents=True)
    whole = pst("run", config_file(run_folder, folder / "config.yaml", train__report_to="tensorboard"))
    done: Counter[str] = Counter()
    with measured("the pipeline in a storm") as result:
        started = time.monotonic()
        assert (ended := run(whole)).code == 0, ended.said
        calm, wanted = time.monotonic() - started, content(run_folder)
        shutil.rmtree(run_folder)
        peaks: list[int] = []
        files, memory = _descriptors(), _memory()
        limit = time.monotonic() + seconds
        while time.monotonic() < limit or run_folder.exists():
            raging = time.monotonic() < limit
            harm = chance.choice(("kill", "kill", "told", "pause", "full")) if raging else "none"
            ended = _under(harm, whole, disk, chance, calm)
            done[harm] += 1
            peaks.append(ended.peak_bytes)
            trouble = [] if ended.code in _EXPECTED[harm] else [f"ended with {ended.code}: {ended.said[-300:]}"]
            if "Traceback" in ended.said:
                trouble.append(f"a traceback: {ended.said[-300:]}")
            trouble += damaged(run_folder, stale=False) + observer.look(run_folder) if run_folder.exists() else []
            if ended.code == 0:
                done["end"] += 1
                trouble += differing(_without_earlier(wanted), _without_earlier(content(run_folder)))
                trouble += [f"left {name}" for name in leftovers(run_folder)]
                shutil.rmtree(run_folder)
            result.trial(*(f"{harm}, the {result.trials + 1}th: {line}" for line in trouble))
            if len(result.failures) > 20:
                break
        result.failures += _grown(peaks, files, memory)
    growth = _memory() - memory
    counted = ", ".join(f"{number} {name}" for name, number in done.most_common())
    highest = max(peaks, default=0) / 2**20
    result.note = f"{note}{seconds / 60:.0f} minutes: {counted}; {observer.seen:,} looks; "
    result.note += f"the driver grew by {growth / 2**20:.1f} MiB, the largest child had {highest:.0f} MiB"
    return result


def _without_earlier(found: dict[str, str]) -> dict[str, str]:
    """The files of a run without its checkpoints before the last: a request to stop may have saved at any step, and
    that checkpoint is kept in the place of another."""
    steps = [int(name.split("/")[1].rpartition("-")[2]) for name in found if name.startswith("checkpoints/checkpoint-")]
    last = f"checkpoints/checkpoint-{max(steps, default=0)}/"
    return {name: digest for name, digest in found.items() if name.startswith(last) or "checkpoints/" not in name}


def _under(harm: str, whole: Callable[[], int], disk: Path, chance: random.Random, calm: float) -> Ended:
    """One start of the pipeline, and what is done to it."""
    filler = disk / "filler"
    child = Child(whole)
    moment = time.monotonic() + chance.uniform(0, calm)
    while harm != "none" and child.poll() is None and time.monotonic() < moment:
        time.sleep(0.002)
    if child.poll() is not None or harm == "none":
        return child.wait(600)
    if harm == "kill":
        child.send(signal.SIGKILL)
    elif harm == "told":
        child.send(signal.SIGTERM)
    elif harm == "pause":
        for _ in range(chance.randint(1, 5)):
            child.send(signal.SIGSTOP)
            time.sleep(chance.uniform(0, 0.5))
            child.send(signal.SIGCONT)
            time.sleep(0.05)
            if child.poll() is not None:
                break
    elif harm == "full":
        _fill(filler, chance.choice((0, 4096, 65536)))
    ended = child.wait(600)
    filler.unlink(missing_ok=True)
    return ended


def _fill(filler: Path, spare: int) -> None:
    """Take the room that is left but `spare` bytes."""
    free = shutil.disk_usage(filler.parent).free
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (max(0, min(free, _DISK) - spare), 0):
            os.posix_fallocate(descriptor, 0, max(1, size))
            break
    except OSError:
        pass  # the run took some of it meanwhile: full enough
    finally:
        os.close(descriptor)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _grown(peaks: list[int], files: int, memory: int) -> list[str]:
    """What is more than it was when the storm began."""
    trouble = []
    if _descriptors() > files:
        trouble.append(f"{files} open files before, {_descriptors()} after")
    if _memory() > 1.05 * memory + (32 << 20):
        trouble.append(f"{memory / 2**20:.0f} MiB before, {_memory() / 2**20:.0f} MiB after")
    half = len(peaks) // 2
    if half > 10 and max(peaks[half:]) > 1.1 * max(peaks[:half]):
        trouble.append(f"children had {max(peaks[:half]) >> 20} MiB at first, {max(peaks[half:]) >> 20} MiB later")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return trouble + ([f"processes left: {children}"] if children else [])
