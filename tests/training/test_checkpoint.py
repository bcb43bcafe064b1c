"""Checkpoints: whole or absent, damage named, never a silent start from zero."""

import logging
import shutil

import pytest
import torch
from small_run import small_config
from tiny import Tiny

from pst_dist.config.schema import TrainConfig
from pst_dist.diagnostics.artefacts import verify
from pst_dist.distributed.ranks import Ranks
from pst_dist.errors import IntegrityError, StaleError
from pst_dist.storage.manifest import Manifest, all_files, describe_files, write_manifest
from pst_dist.training.checkpoints.checkpoint import checkpoint_path, newest_valid, resume
from pst_dist.training.checkpoints.saver import Saver
from pst_dist.training.checkpoints.state import RunState
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.trainer import train

STATE = RunState(fingerprint="f", engine="single", world_size=1)


def engine_of(seed=0):
    return SingleProcessEngine(Tiny("pst", seed=seed).student, TrainConfig(), Ranks())


def save_checkpoint(engine, root, state, *, keep):
    with Saver(engine, root, keep=keep, total=100, in_background=False) as saver:
        saver.save(state, 0.0)


def saved(engine, root, *steps, keep=3):
    for step in steps:
        save_checkpoint(engine, root, RunState("f", "single", 1, step=step), keep=keep)


def test_a_checkpoint_restores_weights_into_a_differently_seeded_student(tmp_path):
    first, second = engine_of(0), engine_of(1)
    saved(first, tmp_path, 5)
    assert resume(second, tmp_path, STATE).step == 5
    for one, two in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(one, two)


def test_only_the_newest_are_kept(tmp_path):
    saved(engine_of(), tmp_path, 1, 2, 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_the_best_checkpoint_is_kept_besides(tmp_path):
    engine = engine_of()
    for step in (1, 2, 3, 4):
        save_checkpoint(engine, tmp_path, RunState("f", "single", 1, step=step, best_step=1), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_its_elder_used(tmp_path, damage, caplog):
    saved(engine_of(), tmp_path, 1, 2)
    target = checkpoint_path(tmp_path, 2) / ("manifest.json" if damage == "manifest" else "state-00000.safetensors")
    data = bytearray(target.read_bytes())
    if damage == "remove":
        target.unlink()
    elif damage == "truncate":
        target.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="pst_dist"):
        path, state = newest_valid(tmp_path, Ranks())
    assert state.step == 1 and path.name == "checkpoint-1"
    assert "checkpoint-2" in caplog.text


def test_if_no_checkpoint_is_valid_training_does_not_start_from_zero(tmp_path):
    saved(engine_of(), tmp_path, 1)
    (checkpoint_path(tmp_path, 1) / "state-00000.safetensors").unlink()
    with pytest.raises(IntegrityError, match="none of the 1 checkpoints here is intact"):
        resume(engine_of(), tmp_path, STATE)


def test_no_checkpoints_at_all_means_a_fresh_start(tmp_path):
    assert resume(engine_of(), tmp_path / "none", STATE) == STATE


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    mine = RunState("f", "single", 1, step=1, settings={"seed": 1, "train.learning_rate": 0.1, "arm": "pst"})
    save_checkpoint(engine_of(), tmp_path, mine, keep=2)
    other = {"seed": 2, "train.learning_rate": 0.2, "arm": "pst"}
    for accept in (False, True):
        with pytest.raises(StaleError, match=r"checkpoint-1: trained with seed=1, this run has seed=2; choose another"):
            resume(engine_of(), tmp_path, RunState("o", "single", 1, settings=other), accept_changes=accept)


def test_what_may_change_on_the_way_is_taken_when_the_user_says_so(tmp_path, caplog):
    settings = {"seed": 1, "train.learning_rate": 0.1}
    save_checkpoint(engine_of(), tmp_path, RunState("f", "single", 1, step=3, settings=settings), keep=2)
    wanted = RunState("o", "single", 1, settings=settings | {"train.learning_rate": 0.2})
    with pytest.raises(StaleError, match=r"learning_rate=0\.1, this run has .*=0\.2; restore it, or .*accept_changes"):
        resume(engine_of(), tmp_path, wanted)
    state = resume(engine_of(), tmp_path, wanted, accept_changes=True)
    assert (state.step, state.fingerprint, state.settings) == (3, "o", wanted.settings)
    assert "train.learning_rate 0.1 -> 0.2" in caplog.text


@pytest.mark.encoder
def test_what_a_kill_after_the_last_save_left_goes_with_the_next_start(small_data, tmp_path):
    config = small_config(small_data, tmp_path, train__save_steps=2, train__eval_steps=8)
    train(config)
    checkpoints, names = tmp_path / "checkpoints", ["checkpoint-6", "checkpoint-8"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-4")
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / ".checkpoint-2.0123.replaced")
    (tmp_path / "train.json").unlink()
    assert train(config).steps == 8
    assert sorted(path.name for path in checkpoints.iterdir()) == names


@pytest.mark.parametrize(
    "content",
    [
        b'{"fingerprint": "f", "engine": "single", "world_size": 1, "step": 2, "of_a_later_version": 1}',
        b'{"fingerprint": "f", "engine": "single", "world_size": 1, "step": 2, "seconds": 1e999}',
        b'{"fingerprint": "f", "engine": "single", "world_size": 1, "step": 2, "best_value": NaN}',
        b'{"fingerprint": "f", "engine": "single", "world_size": "1", "step": 2}',
        b'{"fingerprint": "f", "engine": "single", "world_size": 1, "step": 2, "rollbacks": [1]}',
        b'{"fingerprint": "f", "settings": ' + b'{"a": ' * 50_000,
        b"[]",
        b"5",
    ],
    ids=["later field", "huge number", "not a number", "text", "list of numbers", "deep", "list", "number"],
)
def test_a_newest_checkpoint_with_an_unexpected_state_is_passed_over(tmp_path, content, caplog):
    """Its manifest is right, so a digest says nothing: another version, or another program, wrote it."""
    saved(engine_of(), tmp_path, 1, 2)
    newest = checkpoint_path(tmp_path, 2)
    (newest / "run_state.json").write_bytes(content)
    write_manifest(newest, Manifest("checkpoint", "f", describe_files(newest, all_files(newest)), {"step": 2}))
    assert newest_valid(tmp_path, Ranks())[1].step == 1
    assert "skipping a damaged checkpoint" in caplog.text and "checkpoint-2/run_state.json" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b'{"extra": 1e999}', b"[" * 100_000, b'{"kind": 5, "files": 7}', b"\xff", b"9" * 5000],
    ids=["huge number", "deep", "types", "bytes", "digits"],
)
def test_a_newest_checkpoint_with_an_unexpected_manifest_is_passed_over_and_verify_goes_on(tmp_path, content):
    root = tmp_path / "checkpoints"
    saved(engine_of(), root, 1, 2)
    (checkpoint_path(root, 2) / "manifest.json").write_bytes(content)
    assert newest_valid(root, Ranks())[1].step == 1
    states = {finding.path.name: finding.state for finding in verify(tmp_path)}
    assert states == {"checkpoint-1": "intact", "manifest.json": "damaged"}


def test_a_folder_that_is_only_named_like_a_checkpoint_is_left_alone(tmp_path):
    saved(engine_of(), tmp_path, 1)
    for name in ("checkpoint-²", "checkpoint-old", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert newest_valid(tmp_path, Ranks())[1].step == 1
