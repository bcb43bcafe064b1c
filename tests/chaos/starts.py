"""Two starts in one directory: one wins, the other says who is there, and a killed winner leaves no lock behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos.children import Child, Ended, config_file, prepare, pst
from chaos.goal import Result, measured, out_of_time

_PATIENCE_SECONDS = 120.0


def starts(folder: Path, full: bool) -> Iterator[Result]:
    """Races in fresh directories and in those of a winner that was killed the time before."""
    data = prepare(folder)
    yield _races(folder, data, 100 if full else 4)


def _races(folder: Path, data: Path, count: int) -> Result:
    run_folder = folder / "run"
    folder.mkdir(exist_ok=True)
    # They differ in a setting, so that the record shows whose it is; neither ends by itself.
    endless = {"train__max_steps": 10**6, "train__save_steps": 10**5, "train__eval_steps": 10**5}
    shared = {"data_dir": str(data), "train__accept_changes": "true", **endless}
    configs = [
        config_file(run_folder, folder / f"{rate}.yaml", **shared, train__learning_rate=rate)
        for rate in ("1e-3", "2e-3")
    ]
    slowest, stale = 0.0, 0
    with measured("two starts in one directory") as result:
        for trial in range(count):
            if out_of_time(result, count - trial):
                break
            if trial % 3 == 0:
                shutil.rmtree(run_folder, ignore_errors=True)
            stale += trial % 3 != 0
            verb = "train" if trial % 2 else "run"
            ready, go = os.pipe()
            children = [Child(_waiting(ready, pst(verb, config))) for config in configs]
            started = time.monotonic()
            os.write(go, b"go")
            while all(child.poll() is None for child in children) and time.monotonic() < started + _PATIENCE_SECONDS:
                time.sleep(0.005)
            seconds = time.monotonic() - started
            trouble = _judged(children, configs, run_folder)
            for child in children:
                child.send(signal.SIGKILL)
                child.wait()
            os.close(ready)
            os.close(go)
            slowest = max(slowest, seconds)
            result.trial(*(f"race {trial} of `pst {verb}`: {line}" for line in trouble))
        result.note += f"{stale} took over from one killed by SIGKILL; the slowest refusal took {slowest:.1f} s"
    return result


def _waiting(ready: int, work: Callable[[], int]) -> Callable[[], int]:
    def at_once() -> int:
        os.read(ready, 1)
        return work()

    return at_once


def _judged(children: list[Child], configs: list[Path], run_folder: Path) -> list[str]:
    """What is wrong: exactly one goes on, the other ended with 5 and named it, and the record is the winner's."""
    ends: list[Ended | None] = [child.poll() for child in children]
    if sum(ended is None for ended in ends) != 1:
        return [f"{sum(ended is None for ended in ends)} of 2 go on: {[ended and ended.said[-300:] for ended in ends]}"]
    winner = ends.index(None)
    loser = ends[1 - winner]
    assert loser is not None
    trouble = [] if loser.code == 5 else [f"the other ended with {loser.code}: {loser.said[-300:]}"]
    found = re.search(r"in use by process (\d+) on \S+ since [-\d]+ [:\d]+ UTC; wait", loser.said)
    if found is None or int(found[1]) != children[winner].pid:
        trouble.append(f"{children[winner].pid} won, the other said {loser.said[-300:]!r}")
    if "Traceback" in loser.said:
        trouble.append("a traceback")
    rate = configs[winner].stem
    if not _recorded(run_folder / "config.resolved.yaml", rate, children[winner]):
        trouble.append(f"the record is not the winner's ({rate})")
    return trouble


def _recorded(record: Path, rate: str, winner: Child) -> bool:
    """Whether the winner's settings are in the record, now or soon: it takes the lock first and then writes them."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline and winner.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if re.search(rf"learning_rate: {float(rate)}\b", record.read_text()):
                return True
        time.sleep(0.05)
    return False
