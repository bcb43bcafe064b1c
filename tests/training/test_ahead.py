"""The next step's batches, prepared in a thread beside the current step."""

import os
import shutil
import signal
import threading
import time
from dataclasses import fields

import pytest
import torch
from run_files import losses
from small_run import small_config
from tiny import ROWS, Tiny, TinyTeacher

from pst_dist.distributed.preemption import StopRequest
from pst_dist.errors import DataError, IntegrityError, PreemptedError
from pst_dist.training import parts
from pst_dist.training.batching.ahead import StepsAhead
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.batching.order import OrderPlan
from pst_dist.training.batching.passes import ByLength
from pst_dist.training.batching.step_batches import step_batches
from pst_dist.training.trainer import train

NAME = "next batch"


def running():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


class Watched:
    """An iterator over `count` empty steps that notes which thread asked for each; step `fails` raises."""

    def __init__(self, count, fails=None):
        self.count, self.fails, self.threads = count, fails, []
        self.asked = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        if len(self.threads) == self.count:
            raise StopIteration
        self.threads.append(threading.current_thread().name)
        self.asked.set()
        if len(self.threads) - 1 == self.fails:
            raise DataError("a row is damaged")
        return []


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, item.name), getattr(two, item.name)) for item in fields(one))
    return one == two


@pytest.mark.parametrize("cut", [None, ByLength(None, 8)])
@pytest.mark.parametrize("loss", [{}, {"alignment": "info_nce", "negatives": 1}])
def test_the_batches_are_those_of_the_loader_to_the_bit(cut, loss):
    tiny = Tiny(loss=loss)

    def steps():
        collate = Collator(loss=tiny.config.loss, pad_id=tiny.tokenizer.pad_token_id, teacher=TinyTeacher())
        place = {"first_step": 1, "last_step": 7, "rank": 1, "world_size": 2, "micro_batch_size": 2}
        return step_batches(OrderPlan(len(ROWS), 3, seed=0), ROWS, tiny.layout, collate, **place, by_length=cut)

    ahead, found = StepsAhead(steps(), in_thread=True), []
    while (batches := ahead.take()) is not None:
        found.append(batches)
        with ahead.preparing_next():
            pass
    expected = list(steps())
    assert len(found) == len(expected) == 6 and isinstance(found[0][0], PSTBatch)
    for one, two in zip(found, expected, strict=True):
        assert len(one) == len(two) and all(map(same, one, two))


def test_one_step_is_prepared_beside_the_block_and_no_further_one():
    steps = Watched(3)
    ahead = StepsAhead(steps, in_thread=True)
    assert ahead.take() == [] and steps.threads == ["MainThread"]
    steps.asked.clear()
    with ahead.preparing_next():
        assert steps.asked.wait(60), "nothing was prepared while the block ran"
    assert steps.threads == ["MainThread", NAME] and not running()
    assert ahead.take() == [] and len(steps.threads) == 2
    with ahead.preparing_next():
        pass
    assert ahead.take() == []
    with ahead.preparing_next():
        pass
    assert ahead.take() is None


def test_without_a_thread_nothing_is_prepared_in_advance():
    steps = Watched(2)
    ahead = StepsAhead(steps, in_thread=False)
    ahead.take()
    with ahead.preparing_next():
        assert not running()
    assert ahead.take() == [] and steps.threads == ["MainThread"] * 2 and ahead.take() is None


def test_an_error_is_raised_at_its_own_step_and_not_in_the_step_before():
    ahead = StepsAhead(Watched(9, fails=2), in_thread=True)
    finished = 0
    with pytest.raises(DataError, match="a row is damaged"):
        while ahead.take() is not None:
            with ahead.preparing_next():
                pass
            finished += 1
    assert finished == 2 and not running()


def test_the_thread_has_ended_when_the_step_fails():
    ahead = StepsAhead(Watched(9), in_thread=True)
    ahead.take()
    with pytest.raises(ZeroDivisionError), ahead.preparing_next():
        raise ZeroDivisionError
    assert not running()


def test_waiting_counts_from_the_end_of_the_block():
    go = threading.Event()

    def steps():
        yield []
        go.wait(60)
        yield []

    ahead = StepsAhead(steps(), in_thread=True)
    ahead.take()
    with ahead.preparing_next():
        time.sleep(0.02)
        ended = time.monotonic()
        go.set()
    ahead.take()
    assert 0 < ahead.waited_seconds <= time.monotonic() - ended


@pytest.mark.encoder
def test_a_training_has_the_same_curve_with_and_without_the_thread(small_data, tmp_path, monkeypatch):
    train(small_config(small_data, tmp_path / "thread"))
    monkeypatch.setattr(parts, "StepsAhead", lambda steps, in_thread: StepsAhead(steps, in_thread=False))
    train(small_config(small_data, tmp_path / "plain"))
    assert losses(tmp_path / "thread") == losses(tmp_path / "plain")


@pytest.mark.encoder
def test_a_shard_that_is_damaged_during_training_ends_it_at_the_step_that_reads_it(small_data, tmp_path):
    """The rows of a later step are read while the step before computes; that one still counts and is saved."""
    data = shutil.copytree(small_data, tmp_path / "data")
    config = small_config(data, tmp_path / "run", train__save_steps=1, train__save_total_limit=9)
    seen = []

    def damage(saved):
        seen.append(saved.state.step)
        if saved.state.step == 2:
            for path in (data / "shards").glob("train-*.tar"):
                size = path.stat().st_size
                os.truncate(path, 0)
                os.truncate(path, size)

    with pytest.raises(IntegrityError):
        train(config, observer=damage)
    assert seen == [1, 2, 3] and len(losses(tmp_path / "run")) == 3 and not running()


@pytest.mark.encoder
def test_nothing_runs_after_a_preemption(small_data, tmp_path):
    stop = StopRequest()

    def ask(saved):
        stop.signal = signal.SIGTERM

    with pytest.raises(PreemptedError):
        train(small_config(small_data, tmp_path, train__save_steps=2), observer=ask, stop=stop)
    assert not running()
