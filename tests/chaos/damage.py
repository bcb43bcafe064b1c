"""Damage: files of a finished run flipped, cut, zeroed, lengthened, removed, swapped and taken from another run.

Each must be found by `pst verify`, which names the file and the remedy, and by the stage that would have used it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos.goal import Result, measured
from pst_dist.data.shards import ShardSet
from pst_dist.diagnostics.artefacts import verify
from pst_dist.distributed.ranks import Ranks
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.errors import PstError
from pst_dist.evaluation.evaluate import finished_evaluation
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.manifest import MANIFEST, all_files
from pst_dist.student.saved import load_student
from pst_dist.training.checkpoints.checkpoint import newest_valid


def damage(folder: Path, full: bool) -> Iterator[Result]:
    """Two runs are made, and one is spoilt again and again."""
    make_runs(folder)
    yield spoil(folder / "run", folder / "other", 2000 if full else 200)


def make_runs(folder: Path) -> None:
    """A finished run in `folder/run`, and beside it one of another seed over other rows."""
    from small_run import small_config

    from pst_dist.pipeline import run_all

    for name, seed in (("run", 0), ("other", 1)):
        rows = f"gen:last_letters?rows=40&seed={seed}&words=2"
        run_all(small_config(folder / name / "data", folder / name, seed=seed, data__train=rows))


def spoil(run: Path, other: Path, count: int) -> Result:
    """At least `count` damages to all files of a run, one at a time, each put right again."""
    done: dict[str, int] = {}
    with measured("damaged files found before use and named") as result:
        artefacts = users(run)
        places = [
            (folder, folder / name)
            for folder in artefacts
            for name in [*all_files(folder), MANIFEST]
            if "/" not in name and not name.startswith(".")
        ]
        for folder, path in places:
            whole = path.read_bytes()
            name = path.relative_to(run)
            kinds = damages(path, other / name, random.Random(f"damage/{name}"))
            for _ in range(-(-count // len(places))):
                what, data = next(kinds)
                path.unlink()
                if data is not None:
                    path.write_bytes(data)
                trouble = _unnoticed(path, folder, what)
                if not artefacts[folder](path):
                    trouble.append("was used as if nothing had happened")
                path.write_bytes(whole)
                done[what] = done.get(what, 0) + 1
                result.trial(*(f"{path}: {what}: {line}" for line in trouble))
        result.failures += [f"afterwards {finding.line}" for finding in verify(run) if finding.is_problem]
    result.note = ", ".join(f"{number} {what}" for what, number in sorted(done.items()))
    return result


def _unnoticed(path: Path, folder: Path, what: str) -> list[str]:
    """What `pst verify` leaves unsaid of a damaged file."""
    problems = [finding for finding in verify(folder) if finding.is_problem]
    found = [finding.path for finding in problems]
    # Without its manifest a directory is unfinished; by another run's manifest it is the files that differ.
    named = path in found or (path.name == MANIFEST and (folder in found or what == "of another run"))
    trouble = [] if named and found else [f"verify named {[str(place) for place in found]}"]
    return trouble + [f"no remedy for {finding.path}" for finding in problems if not finding.remedy]


def is_refused(call: Callable[[], object], damaged: Path) -> bool:
    """Whether a stage takes an artefact for absent, or refuses it with an error that names the file or its folder."""
    try:
        return call() is None
    except PstError as error:
        return str(damaged.parent) in str(error)


def users(run: Path) -> dict[Path, Callable[[Path], bool]]:
    """Artefact -> whether the stage that uses it notices that a file of it is damaged."""
    shards = ShardSet.open(run / "data" / "shards")
    newest = run / "checkpoints" / "checkpoint-8"

    def passed_over(_: Path) -> bool:
        found = newest_valid(run / "checkpoints", Ranks())
        return found is not None and found[0] != newest

    return {
        run / "data" / "shards": lambda file: is_refused(lambda: ShardSet.open(file.parent), file),
        run / "data" / "embeddings": lambda file: is_refused(lambda: EmbeddingStore.open(file.parent, shards), file),
        newest: passed_over,
        run / "best": lambda file: not Artefact(file.parent, "student").is_intact(),
        run / "export": lambda file: is_refused(lambda: load_student(file.parent), file),
        run / "eval" / "test": lambda file: is_refused(lambda: finished_evaluation(file.parent), file),
    }


def damages(path: Path, other: Path, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the file's new bytes or None for removed); endless, never the file as it is.

    The first one cuts exactly the last byte, which of a text file is the final newline. Places are drawn as shares of
    the file, so the damages to one file do not depend on the sizes of others.
    """
    whole = path.read_bytes()
    neighbours = sorted(place for place in path.parent.iterdir() if place.is_file() and place != path)

    def somewhere() -> int:
        return int(chance.random() * len(whole))

    yield "cut", whole[:-1]
    while True:
        flipped = bytearray(whole)
        flipped[somewhere()] ^= 1 << chance.randrange(8)
        yield "bit flipped", bytes(flipped)
        yield "cut", whole[: somewhere()]
        start = somewhere()
        zeroed = whole[:start] + bytes(len(whole[start : start + 512])) + whole[start + 512 :]
        choices: list[tuple[str, bytes | None]] = [
            ("zeroed", zeroed),
            ("longer", whole + chance.choice((b"\0", b"\n", b" "))),
            ("removed", None),
            ("swapped", chance.choice(neighbours).read_bytes()),
        ]
        if other.is_file():
            choices.append(("of another run", other.read_bytes()))
        name, data = chance.choice(choices)
        if data != whole:
            yield name, data
