"""Disks that refuse: full at fifty sizes, full at every system call, failing, read-only, limited, and of two kinds.

Whatever the fault, the command ends with one error line and exit code 4, existing files are unchanged and no temporary
file remains. Once the cause is gone, the same command gives the same result as an undisturbed one.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos import mounts
from chaos.children import Ended, config_file, prepare, pst, run
from chaos.goal import Result, measured, out_of_time, spread
from chaos.kills import Stage, Story, stories
from chaos.looking import Observer, bytes_of, content, damaged, differing, leftovers
from chaos.tracing import NEED_ROOM, can_trace, traced

_BIG = 1 << 30
_PAGE = 4096
_STAGES = ("shard", "embed", "train", "export", "shard --rebuild", "export --rebuild")
_SAMPLED = ("embed", "train", "shard --rebuild")
_REFUSED = ("shard --rebuild", "export --rebuild", "shard", "embed", "train")
_MAY_CHANGE = ("metrics.jsonl", "config.resolved.yaml", "command.txt", "environment.json", "rejects.jsonl")
"""Records of a run, each whole at any moment, which a later start writes anew."""


def full_disk(folder: Path, full: bool) -> Iterator[Result]:
    """Stages on a tmpfs of many sizes between what lies there already and what the stage needs."""

    def sizes() -> list[Result]:
        disk = mounts.small_disk(folder / "disk", _BIG)
        table = {story.name: story for story in stories(disk / "run", train__report_to="tensorboard")}
        return [
            _sizes(Stage(table[name], disk / "run", folder / f"clean-{number}"), disk, 50 if full else 3)
            for number, name in enumerate(_STAGES if full else _SAMPLED)
        ]

    yield from _with_mounts("disks that are too small", folder, sizes)


def _with_mounts(goal: str, folder: Path, work: Callable[[], list[Result]]) -> list[Result]:
    prepare(folder)
    folder.mkdir(exist_ok=True)
    try:
        return mounts.in_own_mounts(work)
    except PermissionError as error:
        return [Result(goal, note=f"not here: {error}")]


def _sizes(stage: Stage, disk: Path, count: int) -> Result:
    """Disks of `count` sizes on which the stage does not fit."""
    with measured(f"disk too small for `pst {stage.story.name}`") as result:
        wanted = stage.wanted()
        stage.again()
        taken = mounts.used(disk)
        enough = taken + 256 * _PAGE
        while not _fits(stage, disk, enough):
            enough += enough - taken
        low, high = taken, enough
        while high - low > 4 * _PAGE and (count > 10 or low == taken):
            middle = (low + high) // (2 * _PAGE) * _PAGE
            low, high = (low, middle) if _fits(stage, disk, middle) else (middle, high)
        result.note = f"{taken // 1024} KiB there before, {(low - taken) // 1024} KiB were not enough"
        for done, number in enumerate(spread(count)):
            if out_of_time(result, count - done):
                break
            size = taken + (low - taken) * (number + 1) // count // _PAGE * _PAGE
            mounts.resize(disk, _BIG)
            stage.again()
            before = bytes_of(stage.run)
            mounts.resize(disk, max(size, mounts.used(disk)))
            ended = run(stage.story.work)
            trouble = refused(ended, stage.run, before)
            mounts.resize(disk, _BIG)
            trouble += _works_again(stage, wanted)
            result.trial(*(f"{(size - taken) // 1024} KiB: {line}" for line in trouble))
        mounts.resize(disk, _BIG)
    return result


def _fits(stage: Stage, disk: Path, size: int) -> bool:
    mounts.resize(disk, _BIG)
    stage.again()
    mounts.resize(disk, size)
    return run(stage.story.work).code == 0


def refused(ended: Ended, run_folder: Path, before: dict[str, str]) -> list[str]:
    """What is wrong with the way in which a command gave up."""
    trouble = []
    lines = ended.said.strip().splitlines()
    if ended.code != 4:
        trouble.append(f"ended with {ended.code}: {' / '.join(lines[-3:])[-400:]}")
    elif not lines[-1].startswith("pst: error[ENVIRONMENT] ") or len(lines[-1]) > 500:
        trouble.append(f"said {lines[-1][:300]!r}")
    if "Traceback" in ended.said or sum(line.startswith("pst: ") for line in lines) > 1:
        trouble.append(f"not one line: {ended.said[-400:]!r}")
    return trouble + kept(run_folder, before)


def kept(run_folder: Path, before: dict[str, str]) -> list[str]:
    """What of the earlier state is gone or changed, what is damaged, and what was left lying."""
    after = bytes_of(run_folder)
    changed = [
        name
        for name, digest in before.items()
        if after.get(name) != digest and name not in _MAY_CHANGE and not name.startswith("tensorboard/")
    ]
    trouble = [f"{len(changed)} earlier file(s) changed: {', '.join(changed[:3])}"] if changed else []
    trouble += damaged(run_folder, stale=False) + Observer().look(run_folder)
    return trouble + [f"left {name}" for name in leftovers(run_folder)]


def _works_again(stage: Stage, wanted: dict[str, str]) -> list[str]:
    ended = run(stage.story.work)
    trouble = [f"with room again it ended with {ended.code}: {ended.said[-300:]}"] if ended.code else []
    return trouble + differing(wanted, stage.content()) + damaged(stage.run)


def refused_calls(folder: Path, full: bool, only: tuple[str, ...] = ()) -> Iterator[Result]:
    """ENOSPC from the Nth call on, EDQUOT at the Nth call alone and EIO at the Nth fsync or write, for every N."""
    if not can_trace():
        yield Result("refused calls", note="not here: needs Linux on x86-64 and the right to trace a child")
        return
    prepare(folder)
    for number, story in enumerate(stories(folder / "run")):
        if story.name in (only or (_REFUSED if full else _REFUSED[:2])):
            yield _refused_calls(Stage(story, folder / "run", folder / f"clean-{number}"), full)


def _refused_calls(stage: Stage, full: bool) -> Result:
    with measured(f"refused calls in `pst {stage.story.name}`") as result:
        wanted = stage.wanted()
        stage.again()
        names: list[str] = []
        traced(_silent(stage.story.work), lambda pid, number, name: names.append(name) or 0)
        result.note = f"{len(names)} points"
        tried = spread(len(names))[: None if full else 6]
        for done, first in enumerate(tried):
            if out_of_time(result, len(tried) - done):
                break
            for what, refuse in _refusals(first):
                if names[first] not in (NEED_ROOM if what != "EIO" else ("write", "fsync")):
                    continue
                stage.again()
                before = bytes_of(stage.run)
                ended = _traced_run(stage.story.work, refuse)
                # Refused late, when the new artefact stands, or in a call that nothing hangs on: old or new, and whole.
                new = not differing(_artefacts(wanted), _artefacts(stage.content()))
                needless = ended.code == 0 and new and what != "ENOSPC"
                trouble = [] if needless else refused(ended, stage.run, {} if new else before)
                trouble += _works_again(stage, wanted)
                result.trial(*(f"{what} at point {first} ({names[first]}): {line}" for line in trouble))
    return result


def _artefacts(found: dict[str, str]) -> dict[str, str]:
    """Without the records of a run."""
    return {name: digest for name, digest in found.items() if name not in _MAY_CHANGE}


def _refusals(first: int) -> Iterator[tuple[str, Callable[[int, int, str], int]]]:
    yield "ENOSPC", lambda pid, number, name: errno.ENOSPC if number >= first and name in NEED_ROOM else 0
    yield "EDQUOT", lambda pid, number, name: errno.EDQUOT if number == first else 0
    yield "EIO", lambda pid, number, name: errno.EIO if number == first else 0


def _traced_run(work: Callable[[], int], refuse: Callable[[int, int, str], int]) -> Ended:
    """A watched run, with what it said."""
    reader, writer = os.pipe()

    def speaking() -> int:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        return work()

    ended = traced(speaking, refuse)
    os.close(writer)
    os.set_blocking(reader, False)
    said = os.read(reader, 1 << 16)
    os.close(reader)
    return Ended(ended.code, said.decode(errors="replace"), 0)


def _silent(work: Callable[[], int]) -> Callable[[], int]:
    from chaos.kills import quietly

    return quietly(work)


def places(folder: Path, full: bool) -> Iterator[Result]:
    """Read-only file systems, limits of a file's size, and runs that lie on several file systems."""
    yield from _with_mounts("places that refuse", folder, lambda: [_read_only(folder, full), _borders(folder, full)])
    yield _file_size(folder, 50 if full else 3, full)


def _read_only(folder: Path, full: bool) -> Result:
    with measured("read-only file system") as result:
        for number, story in enumerate(stories(folder / "ro" / "run")):
            if story.name.startswith("verify") or not (full or story.name in ("shard", "train")):
                continue
            stage = Stage(story, folder / "ro" / "run", folder / f"ro-clean-{number}")
            wanted = stage.wanted()
            stage.again()
            stage.run.mkdir(parents=True, exist_ok=True)
            before = bytes_of(stage.run)
            mounts.read_only(stage.run)
            ended = run(story.work)
            trouble = refused(ended, stage.run, before)
            mounts.unmount(stage.run)
            trouble += _works_again(stage, wanted)
            result.trial(*(f"{story.name}: {line}" for line in trouble))
    return result


def _file_size(folder: Path, count: int, full: bool) -> Result:
    """RLIMIT_FSIZE, which refuses by EFBIG."""
    with measured("limit of a file's size") as result:
        for number, story in enumerate(stories(folder / "limit" / "run")):
            if story.name not in (("shard", "embed", "train", "export") if full else ("embed", "export")):
                continue
            stage = Stage(story, folder / "limit" / "run", folder / f"limit-clean-{number}")
            earlier = set(bytes_of(stage.run))
            wanted = stage.wanted()
            new = set(bytes_of(stage.run)) - earlier
            largest = max((stage.run / name).stat().st_size for name in new)
            for trial in range(count):
                most = largest * trial // count
                stage.again()
                before = bytes_of(stage.run)
                trouble = refused(run(_limited(story, most)), stage.run, before) + _works_again(stage, wanted)
                result.trial(*(f"{story.name}, {most} bytes: {line}" for line in trouble))
    return result


def _limited(story: Story, most: int) -> Callable[[], int]:
    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return story.work()

    return work


def _borders(folder: Path, full: bool) -> Result:
    """One run whose parts are links to, or lie on, other file systems."""
    with measured("a run over several file systems") as result:
        disks = [mounts.small_disk(folder / f"disk-{number}", _BIG) for number in range(2)]
        run_folder = folder / "borders" / "run"
        config = config_file(run_folder, folder / "borders.yaml")
        assert (ended := run(pst("run", config))).code == 0, ended.said
        wanted = content(run_folder)

        def link(name: str) -> None:
            (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
            target = disks[0] / name.replace("/", "-")
            target.mkdir()
            (run_folder / name).symlink_to(target)

        cases: dict[str, Callable[[], None]] = {
            "output_dir is a link": lambda: (run_folder.parent.mkdir(exist_ok=True), link("."))[0],
            **{f"{name} is a link": lambda name=name: link(name) for name in ("data", "checkpoints", "best", "export")},
            "data/shards is a link": lambda: link("data/shards"),
            "data/embeddings is a link": lambda: link("data/embeddings"),
            "checkpoints is a mount": lambda: mounts.over(disks[1], run_folder / "checkpoints"),
        }
        for name, arrange in cases.items():
            if not full and name not in ("output_dir is a link", "checkpoints is a link", "checkpoints is a mount"):
                continue
            shutil.rmtree(run_folder)
            _empty(disks)
            if name == "output_dir is a link":
                (disks[0] / "run").mkdir()
                run_folder.symlink_to(disks[0] / "run")
            else:
                arrange()
            links = [path for path in (run_folder, *run_folder.rglob("*")) if path.is_symlink()]
            trouble = []
            for again in ("", "--rebuild"):
                ended = run(pst("run", config, *([again] if again else [])))
                trouble += [f"ended with {ended.code}: {ended.said[-300:]}"] if ended.code else []
                trouble += damaged(run_folder) + leftovers(run_folder) + differing(wanted, _through_links(run_folder))
            trouble += [f"{path} is no link any more" for path in links if not path.is_symlink()]
            result.trial(*(f"{name}: {line}" for line in trouble))
            if "mount" in name:
                mounts.unmount(run_folder / "checkpoints")
            if run_folder.is_symlink():
                run_folder.unlink()
                run_folder.mkdir()
        _empty(disks)  # a checkpoint there would be refused as a foreign file, not as a mount
        mounts.over(disks[1], run_folder / "export")
        before = bytes_of(run_folder)
        trouble = refused(run(pst("export", config)), run_folder, before)
        result.trial(*(f"export is a mount: {line}" for line in trouble))
        mounts.unmount(run_folder / "export")
    return result


def _empty(disks: list[Path]) -> None:
    for entry in (entry for disk in disks for entry in disk.iterdir()):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _through_links(run_folder: Path) -> dict[str, str]:
    """`content` with the directories that links lead to."""
    found = content(run_folder)
    for path in run_folder.rglob("*"):
        if path.is_symlink() and path.is_dir():
            prefix = path.relative_to(run_folder)
            clocked = {name: digest for name, digest in content(path).items()}
            found |= {f"{prefix}/{name}": digest for name, digest in clocked.items()}
    return {name: digest for name, digest in found.items() if name not in ("export/README.md", "export/manifest.json")}
