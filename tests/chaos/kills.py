"""Kills: each stage at every system call that changes a file, and the whole pipeline at random moments.

At the moment of the kill, the disk holds the results of all earlier calls. At each point everything under a final name
is checked, the child is killed, and the same command runs again: it must leave the same result as an uninterrupted run.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos.children import OTHER_ROWS, Child, config_file, prepare, pst, run
from chaos.goal import Result, measured, out_of_time, spread
from chaos.looking import Observer, content, damaged, differing
from chaos.tracing import KILL, Traced, can_trace, traced

_SAMPLE = 4
_SAMPLED = (
    *("shard --rebuild", "embed", "train", "train train.save_in_background=true"),
    *("export --rebuild", "verify --rebuild"),
)


@dataclass(frozen=True)
class Story:
    """A stage, and the state of things in which it starts."""

    name: str
    before: list[Callable[[], int]]
    work: Callable[[], int]
    clocked: bool = True
    """Whether times of the clock are made by the stage itself."""
    damaged_before: bool = False


def stories(run_folder: Path, **changes: object) -> list[Story]:
    """Every stage that writes, over a run in `run_folder`; config files lie beside it."""
    beside = run_folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    config = config_file(run_folder, beside / "config.yaml", **changes)
    other = config_file(run_folder, beside / "other.yaml", **changes | OTHER_ROWS)
    shard, embed, train = pst("shard", config), pst("embed", config), pst("train", config)
    score, made, page = pst("evaluate", config), pst("export", config), pst("report", run_folder)
    reshard, beside = pst("shard", other, "--rebuild"), pst("train", config, "train.save_in_background=true")

    def spoil() -> int:
        """Damage of every kind that can be mended here."""
        for name in ("data/shards/train-000000.tar", "data/embeddings/train-000001.safetensors", "export/README.md"):
            (run_folder / name).write_bytes(b"nonsense")
        (run_folder / "eval" / "test" / "results.json").unlink()
        (run_folder / "checkpoints" / "checkpoint-6" / "run_state.json").write_text("{}")
        return 0

    return [
        Story("shard", [], shard),
        Story("shard --rebuild", [shard], reshard),
        Story("embed", [shard], embed),
        Story("embed (stale set)", [shard, embed, reshard], pst("embed", other)),
        Story("train", [shard, embed], train),
        Story("train train.save_in_background=true", [shard, embed], beside),
        Story("evaluate", [shard, embed, train], score),
        Story("evaluate --rebuild", [shard, embed, train, score], pst("evaluate", config, "--rebuild")),
        Story("export", [shard, embed, train, score], made, clocked=False),
        Story("export --rebuild", [shard, embed, train, score, made], pst("export", config, "--rebuild"), False),
        Story("report", [shard, embed, train, score, made], page, clocked=False),
        Story(
            "verify --rebuild",
            [shard, embed, train, score, made, spoil],
            pst("verify", run_folder, "--rebuild"),
            damaged_before=True,
        ),
    ]


class Stage:
    """One story's folder: put back, looked at and run as often as wanted."""

    def __init__(self, story: Story, run_folder: Path, clean: Path) -> None:
        self.story, self.run, self.clean = story, run_folder, clean
        shutil.rmtree(run_folder, ignore_errors=True)
        for work in story.before:
            assert (ended := run(work)).code == 0, ended.said
        if run_folder.exists():
            shutil.copytree(run_folder, clean, symlinks=True)

    def again(self) -> None:
        """Put the run back to what it was before the stage."""
        shutil.rmtree(self.run, ignore_errors=True)
        if self.clean.exists():
            shutil.copytree(self.clean, self.run, symlinks=True)

    def wanted(self) -> dict[str, str]:
        """What the stage leaves when nobody disturbs it."""
        self.again()
        assert (ended := run(self.story.work)).code == 0, ended.said
        return self.content()

    def content(self) -> dict[str, str]:
        """What is there now."""
        return content(self.run, clocked=self.story.clocked)


def quietly(work: Callable[[], int]) -> Callable[[], int]:
    """The same work, with nothing on this process's standard output and error."""
    import os

    def silent() -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        return work()

    return silent


def kills(folder: Path, full: bool, only: tuple[str, ...] = ()) -> Iterator[Result]:
    """A result for every stage, one for the looks, and one for the random kills."""
    if not can_trace():
        yield Result("kill points", note="not here: needs Linux on x86-64 and the right to trace a child")
        return
    prepare(folder)
    looks = Result("looks at every file under a final name, at each point")
    points = 0
    for number, story in enumerate(stories(folder / "run")):
        if story.name not in (only or ([story.name] if full else _SAMPLED)):
            continue
        stage = Stage(story, folder / "run", folder / f"clean-{number}")
        result = _kill_points(stage, looks, full)
        points += result.trials
        yield result
    looks.note = "the stage stands still while it is looked at"
    yield looks
    if not only or "random" in only:
        yield _random_kills(folder / "random", 200 if full else 4)


def _kill_points(stage: Stage, looks: Result, full: bool) -> Result:
    with measured(f"kill points of `pst {stage.story.name}`") as result:
        wanted = stage.wanted()
        observer = Observer()

        def look(pid: int, number: int, name: str) -> int:
            if not stage.story.damaged_before:
                looks.failures += [f"{stage.story.name}, point {number}: {line}" for line in observer.look(stage.run)]
            return 0

        stage.again()
        whole = traced(quietly(stage.story.work), look)
        assert whole.code == 0, f"{stage.story.name} ended with {whole.code} under tracing"
        looks.trials += observer.seen
        calls = ", ".join(f"{count} {name}" for name, count in sorted(whole.calls.items(), key=lambda kv: -kv[1])[:5])
        result.note = f"{whole.points} points: {calls}…"
        tried = spread(whole.points)[: None if full else _SAMPLE]
        for done, point in enumerate(tried):
            if out_of_time(result, len(tried) - done):
                break
            stage.again()
            _kill_at(stage, point)
            trouble = [] if stage.story.damaged_before else damaged(stage.run, stale=False) + observer.look(stage.run)
            ended = run(stage.story.work)
            trouble += [f"the next run ended with {ended.code}: {ended.said[-200:]}"] if ended.code else []
            trouble += differing(wanted, stage.content())
            result.trial(*(f"point {point}: {line}" for line in trouble))
    return result


def _kill_at(stage: Stage, point: int) -> Traced:
    return traced(quietly(stage.story.work), lambda pid, number, name: KILL if number == point else 0)


def _random_kills(folder: Path, kills: int) -> Result:
    """The pipeline started again and again, killed at random moments, until that many kills; each end is compared."""
    chance = random.Random(0)
    run_folder = folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    whole = pst("run", config_file(run_folder, folder / "config.yaml"))
    with measured("random SIGKILL of `pst run`") as result:
        started = time.monotonic()
        assert (ended := run(whole)).code == 0, ended.said
        seconds, wanted, ends = time.monotonic() - started, content(run_folder), 0
        shutil.rmtree(run_folder)
        observer = Observer()
        while result.trials < kills or run_folder.exists():
            if result.trials < kills and out_of_time(result, kills - result.trials):
                kills = result.trials
            child = Child(whole)
            # Short lives too, so that a run is killed several times before it ends; the last ones may end.
            limit = time.monotonic() + (chance.uniform(0, seconds / 2) if result.trials < kills else 600)
            while child.poll() is None and time.monotonic() < limit:
                time.sleep(0.001)
            if child.poll() is None:
                child.send(signal.SIGKILL)
                child.wait()
                result.trial(*damaged(run_folder, stale=False), *observer.look(run_folder))
                continue
            ended = child.wait()
            trouble = [f"ended with {ended.code}: {ended.said[-200:]}"] if ended.code else []
            trouble += differing(wanted, content(run_folder))
            result.failures += [f"after {result.trials} kills: {line}" for line in trouble]
            ends += 1
            shutil.rmtree(run_folder)
        result.note += f"{ends} ends; {observer.seen:,} looks at files"
    return result
