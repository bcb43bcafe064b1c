"""Damage is found before use, by the stages themselves and by `pst verify`, and the file is named.

Over two thousand damages are done to a small finished run: bits flipped, files cut, blocks zeroed, files removed,
swapped with their neighbours, and replaced by the file of the same name from another run.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_run import small_config

from pst_dist.checkpoint import is_intact_student, newest_valid
from pst_dist.cli import run_verb
from pst_dist.decode import load_student
from pst_dist.distributed import Ranks
from pst_dist.embeddings import EmbeddingStore
from pst_dist.errors import InputError, PstError
from pst_dist.evaluate import finished_evaluation
from pst_dist.pipeline import run_all
from pst_dist.shards import ShardSet
from pst_dist.storage import MANIFEST, all_files
from pst_dist.verify import verify

pytestmark = pytest.mark.encoder
DAMAGES = 2000


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, and beside it one of another seed over other rows."""
    folder = tmp_path_factory.mktemp("finished")
    for name, seed in (("run", 0), ("other", 1)):
        rows = f"gen:last_letters?rows=40&seed={seed}&words=2"
        config = small_config(folder / name / "data", folder / name, seed=seed, data__train=rows)
        run_all(config)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may spoil."""
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.resolved.yaml"
    path.write_text(path.read_text().replace(str(finished / "run"), str(tmp_path / "run")))
    return tmp_path / "run"


def is_refused(call: Callable[[], object], damaged: Path) -> bool:
    """Whether a stage takes an artefact for absent, or refuses it with an error that names the file or its folder."""
    try:
        return call() is None
    except PstError as error:
        assert str(damaged.parent) in str(error), f"{error} does not say where"
        return True


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
        run / "best": lambda file: not is_intact_student(file.parent),
        run / "export": lambda file: is_refused(lambda: load_student(file.parent), file),
        run / "eval" / "test": lambda file: is_refused(lambda: finished_evaluation(file.parent), file),
    }


def damages(path: Path, other: Path, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the file's new bytes or None for removed); endless, never the file as it is."""
    whole = path.read_bytes()
    neighbours = [place for place in path.parent.iterdir() if place.is_file() and place != path]
    while True:
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        yield "bit flipped", bytes(flipped)
        yield "cut", whole[: chance.randrange(len(whole))]
        start = chance.randrange(len(whole))
        zeroed = whole[:start] + bytes(len(whole[start : start + 512])) + whole[start + 512 :]
        choices: list[tuple[str, bytes | None]] = [
            ("zeroed", zeroed),
            ("longer", whole + b"\0"),
            ("removed", None),
            ("swapped", chance.choice(neighbours).read_bytes()),
        ]
        if other.is_file():
            choices.append(("of another run", other.read_bytes()))
        name, data = chance.choice(choices)
        if data != whole:
            yield name, data


@pytest.mark.slow
def test_two_thousand_damages_are_all_found_and_named(finished, run):
    chance = random.Random(0)
    artefacts = users(run)
    places = [
        (folder, folder / name)
        for folder in artefacts
        for name in [*all_files(folder), MANIFEST]
        if "/" not in name and name != ".lock"
    ]
    each = -(-DAMAGES // len(places))
    done: dict[str, int] = {}
    for folder, path in places:
        whole = path.read_bytes()
        kinds = damages(path, finished / "other" / path.relative_to(run), chance)
        for _ in range(each):
            what, data = next(kinds)
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            problems = [finding for finding in verify(folder) if finding.is_problem]
            found = [finding.path for finding in problems]
            # Without its manifest a directory is unfinished; by another run's manifest it is the files that differ.
            named = path in found or (path.name == MANIFEST and (folder in found or what == "of another run"))
            assert named and found, f"{path}: {what}: {found}"
            assert all(finding.remedy for finding in problems)
            assert artefacts[folder](path), f"{path}: {what}: was used as if nothing had happened"
            path.write_bytes(whole)
            done[what] = done.get(what, 0) + 1
    assert sum(done.values()) >= DAMAGES and len(done) == 7, done
    assert not any(finding.is_problem for finding in verify(run))


def test_a_whole_run_is_intact_and_says_what_it_holds(run, capsys):
    assert run_verb(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    for kind in ("shards", "embeddings", "checkpoint", "student", "evaluation", "export"):
        assert f": {kind}, " in out
    assert out.endswith("7 intact, 0 to mend\n")


def test_whole_artefacts_of_another_run_are_stale(finished, run, capsys):
    for name in ("data/shards", "best"):
        shutil.rmtree(run / name)
        shutil.copytree(finished / "other" / name, run / name)
    assert run_verb(["verify", str(run)]) == 3
    stale = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stale")]
    assert any(f"{run}/data/embeddings: made from other shards" in line for line in stale)
    assert any(f"{run}/export: made from other weights" in line for line in stale)
    assert any(f"{run}/eval/test: made from other weights" in line for line in stale)


def test_what_can_be_made_again_is_made_again(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".tar", ".safetensors")}
    for name in ("data/shards/train-000000.tar", "data/embeddings/train-000001.safetensors", "export/README.md"):
        (run / name).write_bytes(b"nonsense")
    (run / "eval" / "test" / "results.json").unlink()
    (run / "checkpoints" / "checkpoint-8" / "run_state.json").write_text("{}")
    (run / ".best.0123abcd.partial").mkdir()
    assert run_verb(["verify", str(run)]) == 3
    out = capsys.readouterr().out
    assert f"damaged    {run}/data/shards/train-000000.tar: 8 bytes, manifest says" in out
    assert "leftover" in out and out.endswith("5 to mend\n")
    assert run_verb(["verify", str(run), "--rebuild"]) == 0
    assert not (run / ".best.0123abcd.partial").exists()
    assert not (run / "checkpoints" / "checkpoint-8").exists(), "an intact elder is left"
    for path, data in before.items():
        assert "checkpoint-8" in str(path) or path.read_bytes() == data, path


def test_a_damaged_student_is_left_to_training_which_makes_the_same_one(run, capsys):
    whole = (run / "best" / "model.safetensors").read_bytes()
    (run / "best" / "model.safetensors").write_bytes(whole[:-1])
    assert run_verb(["verify", str(run), "--rebuild"]) == 3
    assert "best/model.safetensors" in capsys.readouterr().out
    assert run_verb(["train", str(run)]) == 0
    assert (run / "best" / "model.safetensors").read_bytes() == whole
    assert run_verb(["verify", str(run)]) == 0


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "table.csv").write_text("a,b")
    with pytest.raises(InputError, match="nothing here was made by this program"):
        verify(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        verify(tmp_path / "none")
