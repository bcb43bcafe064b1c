"""Damage is found before use, by the stages themselves and by `pst verify`, and the file is named.

Over two thousand damages are done to a small finished run: bits flipped, files cut, blocks zeroed, files removed,
swapped with their neighbours, and replaced by the file of the same name from another run.
"""

import shutil
from pathlib import Path

import pytest
from chaos.damage import make_runs, spoil

from pst_dist.cli.main import run_verb
from pst_dist.diagnostics.artefacts import verify
from pst_dist.errors import InputError

pytestmark = pytest.mark.encoder
DAMAGES = 2000


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, and beside it one of another seed over other rows."""
    folder = tmp_path_factory.mktemp("finished")
    make_runs(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may spoil."""
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.resolved.yaml"
    path.write_text(path.read_text().replace(str(finished / "run"), str(tmp_path / "run")))
    return tmp_path / "run"


@pytest.mark.slow
def test_two_thousand_damages_are_all_found_and_named(finished, run):
    result = spoil(run, finished / "other", DAMAGES)
    assert result.failures == []
    assert result.trials >= DAMAGES and len(result.note.split(", ")) == 7, "every kind of damage was done"


def test_a_whole_run_is_intact_and_says_what_it_holds(run, capsys):
    assert run_verb(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    for kind in ("shards", "embeddings", "checkpoint", "student", "evaluation", "export"):
        assert f": {kind}, " in out
    assert out.endswith("7 intact, 0 to fix\n")


def test_whole_artefacts_of_another_run_are_stale(finished, run, capsys):
    for name in ("data/shards", "best"):
        shutil.rmtree(run / name)
        shutil.copytree(finished / "other" / name, run / name)
    assert run_verb(["verify", str(run)]) == 3
    stale = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stale")]
    assert any(f"{run}/data/embeddings: made from different shards" in line for line in stale)
    assert any(f"{run}/export: made from different weights" in line for line in stale)
    assert any(f"{run}/eval/test: made from different weights" in line for line in stale)


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
    assert "leftover" in out and out.endswith("5 to fix\n")
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
    with pytest.raises(InputError, match="no artefacts of pst found"):
        verify(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        verify(tmp_path / "none")
