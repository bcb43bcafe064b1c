"""Signals: a training told to stop at random moments, and told twice while it saves.

The first signal must end in a checkpoint of the last finished step and the exit code that says so; the second one ends
at once and leaves nothing torn. Either way the same command ends with the weights and losses of a run left in peace.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos.children import Child, config_file, prepare, pst, run
from chaos.goal import Result, measured, out_of_time
from chaos.kills import quietly
from chaos.looking import Observer, content, damaged, differing
from chaos.tracing import can_trace, traced

_STEPS = 24
_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


def told(folder: Path, full: bool) -> Iterator[Result]:
    """One signal at random moments, then two."""
    data = prepare(folder)
    run_folder = folder / "run"
    changes = {"train__max_steps": _STEPS, "train__save_steps": _STEPS, "train__eval_steps": 8}
    folder.mkdir(exist_ok=True)
    train = pst("train", config_file(run_folder, folder / "config.yaml", **changes, data_dir=str(data)))
    assert (ended := run(train)).code == 0, ended.said
    wanted = _kept(run_folder)
    shutil.rmtree(run_folder)
    yield _once(run_folder, train, wanted, 50 if full else 3)
    if can_trace():
        yield _twice(run_folder, train, wanted, 20 if full else 1)
    else:
        yield Result("two signals", note="not here: needs Linux on x86-64 and the right to trace a child")


def _kept(run_folder: Path) -> dict[str, str]:
    """What must be the same in the end: everything but the checkpoints on the way."""
    last = f"checkpoints/checkpoint-{_STEPS}/"
    found = content(run_folder).items()
    return {name: digest for name, digest in found if not name.startswith("checkpoints/") or name.startswith(last)}


def _logged(run_folder: Path) -> int:
    """The last step of which the log has a line."""
    from pst_dist.storage.manifest import read_lines

    return max((row["step"] for row in read_lines(run_folder / "metrics.jsonl") if "loss" in row), default=0)


def _saved(run_folder: Path) -> int:
    names = [path.name for path in (run_folder / "checkpoints").glob("checkpoint-*")]
    return max((int(name.removeprefix("checkpoint-")) for name in names), default=0)


def _once(run_folder: Path, train: Callable[[], int], wanted: dict[str, str], count: int) -> Result:
    chance, observer = random.Random(1), Observer()
    ends = early = 0
    with measured("SIGTERM, SIGINT or SIGUSR1 at a random moment") as result:
        while result.trials < count or run_folder.exists():
            if result.trials < count and out_of_time(result, count - result.trials):
                count = result.trials
            number = chance.choice(list(_CODES))
            child = Child(train)
            # One in five comes while the program starts; at the end, runs are left to finish.
            wanted_step = _STEPS if result.trials >= count else _logged(run_folder) + chance.randint(1, 5)
            unheard = result.trials < count and chance.random() < 0.2
            while child.poll() is None and not unheard and _logged(run_folder) < wanted_step:
                time.sleep(0.01)
            pause = time.monotonic() + (600 if result.trials >= count else chance.uniform(0, 0.5 if unheard else 0.2))
            while child.poll() is None and time.monotonic() < pause:
                time.sleep(0.005)
            if child.poll() is None:
                child.send(number)
            ended = child.wait()
            if ended.code == 0:  # it was at its end, and is whole
                result.failures += [f"after {result.trials}: {line}" for line in differing(wanted, _kept(run_folder))]
                shutil.rmtree(run_folder)
                ends += 1
                continue
            early += unheard
            codes = (_CODES[number], -number) if unheard else (_CODES[number],)
            trouble = [] if ended.code in codes else [f"ended with {ended.code}: {ended.said[-300:]}"]
            if _logged(run_folder) != _saved(run_folder):
                trouble.append(f"step {_logged(run_folder)} was done, step {_saved(run_folder)} saved")
            trouble += damaged(run_folder) + observer.look(run_folder) if run_folder.exists() else []
            result.trial(*(f"{number.name} around step {wanted_step}: {line}" for line in trouble))
            if not (run_folder / "checkpoints").exists():
                shutil.rmtree(run_folder, ignore_errors=True)  # told before its first step: nothing to go on from
        result.note += f"0 steps lost each; {early} during start-up, {ends} ends"
    return result


def _twice(run_folder: Path, train: Callable[[], int], wanted: dict[str, str], count: int) -> Result:
    """The second signal at a chosen system call of the save that the first one asked for."""
    from pst_dist.distributed.preemption import ONE_REQUEST_SECONDS

    with measured("a second signal while saving") as result:
        for trial in range(count):
            if out_of_time(result, count - trial):
                break
            shutil.rmtree(run_folder, ignore_errors=True)
            since: list[int] = []
            """Points at which: the first signal was sent, saving was seen, the second was sent."""

            def at_point(pid: int, number: int, name: str, trial: int = trial, since: list[int] = since) -> int:
                saving = any((run_folder / "checkpoints").glob(".checkpoint-*.partial"))
                if (not since and _logged(run_folder) >= 3) or (len(since) == 1 and saving):
                    if not since:
                        os.kill(pid, signal.SIGTERM)
                    since.append(number)
                elif len(since) == 2 and number >= since[1] + trial % 12:
                    time.sleep(ONE_REQUEST_SECONDS + 0.1)  # sooner it would be the first one, passed on by a launcher
                    os.kill(pid, signal.SIGTERM)
                    since.append(number)
                return 0

            ended = traced(quietly(train), at_point)
            trouble = [] if ended.code == -signal.SIGTERM else [f"ended with {ended.code}"]
            if len(since) < 3 or ended.points - since[2] > 3:
                trouble.append(f"went on for {ended.points} - {since} system calls")
            trouble += damaged(run_folder) + Observer().look(run_folder)
            again = run(train)
            trouble += [f"then ended with {again.code}: {again.said[-300:]}"] if again.code else []
            trouble += differing(wanted, _kept(run_folder))
            result.trial(*(f"trial {trial}: {line}" for line in trouble))
    return result
