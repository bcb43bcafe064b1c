"""Saving in the background: the bits of the moment it was asked for, published together, errors told, nothing torn."""

import hashlib
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from run_files import losses
from safetensors import safe_open
from small_run import small_config
from tiny import Tiny
from train_process import after_some_steps, config_file, started

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.errors import DivergedError, EnvironmentFault
from pst_dist.storage.manifest import hashed_file, read_json, sha256_file
from pst_dist.student.finite import is_finite
from pst_dist.training.checkpoints import saver
from pst_dist.training.checkpoints.checkpoint import newest_valid
from pst_dist.training.checkpoints.saver import Saver
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.engines.fragments import Fragment, FragmentFiles, write_fragments
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.trainer import train


def engine_of() -> SingleProcessEngine:
    return SingleProcessEngine(Tiny("pst").student, TrainConfig(), Ranks())


def state_at(step: int) -> RunState:
    return RunState("f", "single", 1, step=step)


@pytest.fixture
def gate(monkeypatch):
    """Holds back writing in the background until it is set."""
    opened, real = threading.Event(), saver.write_part

    def held(partial, part):
        assert opened.wait(120)
        return real(partial, part)

    monkeypatch.setattr(saver, "write_part", held)
    return opened


def saver_of(engine, root: Path, *, in_background: bool = True, **options) -> Saver:
    return Saver(engine, root, keep=3, total=9, in_background=in_background, **options)


def move(engine) -> None:
    """Change every weight and moment, as the next step of a training would."""
    fragments, _ = engine.state()
    for fragment in fragments:
        for values in fragment.slots.values():
            values.add_(1.0)


def test_the_files_are_those_of_the_moment_it_was_asked_for(tmp_path, gate):
    engine = engine_of()
    gate.set()
    with saver_of(engine, tmp_path / "foreground", in_background=False) as saver:
        saver.save(state_at(4), 0.5)
    gate.clear()
    with saver_of(engine, tmp_path / "background") as saver:
        saver.save(state_at(4), 0.5)
        move(engine)
        assert saver.busy and not (tmp_path / "background" / "checkpoint-4").exists()
        gate.set()
        saver.settle()
        assert not saver.busy and not saver.pending
    one, two = (tmp_path / name / "checkpoint-4" for name in ("foreground", "background"))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert all((two / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


def test_the_next_save_waits_for_the_one_in_flight_and_observers_hear_of_both_in_order(tmp_path, gate):
    engine, heard = engine_of(), []
    with saver_of(engine, tmp_path, observer=lambda saved: heard.append((saved.path.name, saved.loss))) as saver:
        saver.save(state_at(1), 1.0)
        assert heard == []
        threading.Timer(0.3, gate.set).start()
        saver.save(state_at(2), 2.0)
        assert heard == [("checkpoint-1", 1.0)]
        saver.settle()
    assert heard == [("checkpoint-1", 1.0), ("checkpoint-2", 2.0)]
    assert newest_valid(tmp_path, Ranks())[1].step == 2


def test_an_error_while_writing_is_told_when_it_is_settled_and_the_elder_stays(tmp_path, monkeypatch):
    engine = engine_of()
    with saver_of(engine, tmp_path) as saver:
        saver.save(state_at(1), 1.0)
        saver.settle()

        def full(*_: object) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr("pst_dist.storage.manifest.os.fsync", full)
        saver.save(state_at(2), 1.0)
        with pytest.raises(EnvironmentFault, match=r"checkpoint-2: cannot write: No space left .*free some space"):
            saver.settle()
        monkeypatch.undo()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
        saver.save(state_at(3), 1.0)
        saver.settle()
    assert newest_valid(tmp_path, Ranks())[1].step == 3


def test_what_is_not_finite_is_refused_before_training_goes_on(tmp_path):
    engine = engine_of()
    next(engine.student.parameters()).data.view(-1)[0] = float("nan")
    with saver_of(engine, tmp_path) as saver, pytest.raises(DivergedError, match=r"weight .* is not finite"):
        saver.save(state_at(1), 1.0)
    assert not list(tmp_path.iterdir())


def test_leaving_waits_for_the_thread(tmp_path, gate):
    with pytest.raises(KeyError), saver_of(engine_of(), tmp_path) as saver:
        saver.save(state_at(1), 1.0)
        threading.Timer(0.3, gate.set).start()
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pst-checkpoint")]
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-1.partial"], "not published, and never read"


def test_the_safetensors_that_we_write_are_what_the_library_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = {"b": 3, "a": 3_000_001, "empty": 0}  # more than two pieces of hashing, and none

    def fragment(name: str, count: int) -> Fragment:
        slots = {slot: torch.randn(count, generator=generator) for slot in ("exp_avg", "weight", "exp_avg_sq")}
        return Fragment(name, 7, slots)

    fragments = [fragment(name, count) for name, count in sizes.items()]
    path = tmp_path / "state-00000.safetensors"
    with hashed_file(path) as stream:
        write_fragments(stream, fragments, adam_step=5)
    assert stream.description == {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    with safe_open(str(path), framework="pt") as library:
        for one in fragments:
            for slot, values in one.slots.items():
                assert torch.equal(library.get_tensor(f"{slot}/{one.name}"), values)
    files = FragmentFiles([path])
    assert files.adam_step == 5
    target = Fragment("a", 10, {slot: torch.zeros(100) for slot in ("weight", "exp_avg", "exp_avg_sq")})
    files.fill(target)
    assert torch.equal(target.slots["weight"], fragments[1].slots["weight"][3:103])


@pytest.mark.parametrize("size", [0, 5, (1 << 20) - 1, 1 << 20, (9 << 20) + 3])
def test_the_digest_taken_while_writing_is_that_of_the_file(tmp_path, size):
    data = os.urandom(size)
    with hashed_file(tmp_path / "file") as stream:
        for start in (0, size // 3):
            stream.write(data[start:])
    written = (tmp_path / "file").read_bytes()
    assert written == data + data[size // 3 :]
    assert stream.description == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 63, 500, 1022])
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(place, bad):
    values = torch.randn(1023)
    values[5], values[6] = 3.4e38, -3.4e38
    assert is_finite(values)
    values[place] = bad
    assert not is_finite(values) and not is_finite(values.double())
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor([3]))


@pytest.mark.encoder
def test_training_with_saves_in_the_background_leaves_the_same_files(small_data, tmp_path):
    settings = {"train__save_steps": 2, "train__save_total_limit": 9}
    for name, in_background in (("one", False), ("two", True)):
        train(small_config(small_data, tmp_path / name, train__save_in_background=in_background, **settings))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    for step in (2, 4, 6, 8):
        one, two = (tmp_path / name / "checkpoints" / f"checkpoint-{step}" for name in ("one", "two"))
        assert sha256_file(one / "state-00000.safetensors") == sha256_file(two / "state-00000.safetensors")
        both = [read_json(path / "run_state.json") for path in (one, two)]
        assert both[0] | {"seconds": 0} == both[1] | {"seconds": 0}
    assert not list((tmp_path / "two" / "checkpoints").glob(".*"))


@pytest.mark.encoder
def test_a_told_run_that_saves_in_the_background_loses_no_step(small_data, tmp_path):
    run = tmp_path / "run"
    path = config_file(small_data, run, train__save_in_background=True, train__save_steps=2)
    process = started(path)
    after_some_steps(process, run, 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=250)
    assert process.returncode == 75, said
    newest = max(int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*"))
    assert f"saved after step {newest} of" in said
    assert not list((run / "checkpoints").glob(".*"))
    again = started(path)
    _, said = again.communicate(timeout=250)
    assert again.returncode == 0, said
    assert len(losses(run)) == 24
