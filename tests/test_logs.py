"""What a progress line says, and how seldom."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import sys

import pytest

from pst_dist.logs import Progress, drop_noise, progress, shown_by_default


class Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_count_speed_and_time_left():
    clock = Clock()
    bar = Progress("embed", 3000, "texts", clock=clock)
    clock.now += 4
    bar.advance(1200)
    assert bar.line() == "embed 1,200/3,000 texts  300.0 texts/s  6.0 s left"
    bar.advance(1800, note="loss 1.83")
    assert bar.line(final=True) == "embed 3,000/3,000 texts  750.0 texts/s  in 4.0 s  loss 1.83"


def test_the_speed_of_slow_units_is_not_rounded_to_zero():
    clock = Clock()
    bar = Progress("train encoder", 18, "steps", clock=clock)
    clock.now += 120
    bar.advance(4)
    assert bar.line() == "train encoder 4/18 steps  0.033 steps/s  7 min 00 s left"


@pytest.mark.parametrize(("left", "said"), [(42, "42 s left"), (185, "3 min 05 s left"), (7620, "2 h 07 min left")])
def test_long_times_are_said_in_minutes_and_hours(left, said):
    clock = Clock()
    bar = Progress("train", left + 1, "steps", clock=clock)
    clock.now += 1
    bar.advance(1)
    assert said in bar.line()


def test_a_note_within_a_unit_goes_with_it():
    bar = Progress("evaluate", 3, "rows")
    bar.advance(1, "loss 1.8")
    bar.advance(0, "4 tokens of this batch")
    assert bar.line().endswith("4 tokens of this batch") and "tokens" not in bar.line(final=True)
    bar.advance(1)
    assert "tokens" not in bar.line()
    bar.advance(1, "loss 1.7")
    assert bar.line(final=True).endswith("loss 1.7")


def test_without_a_total_no_time_left_is_guessed():
    clock = Clock()
    bar = Progress("read", None, "rows", clock=clock)
    clock.now += 2
    bar.advance(10)
    assert bar.line() == "read 10 rows  5.0 rows/s"


def test_a_line_comes_at_most_every_so_many_seconds():
    clock, lines = Clock(), []
    bar = Progress("embed", 100, "texts", emit=lines.append, every_seconds=10, clock=clock)
    for _ in range(100):
        clock.now += 0.5
        bar.advance()
    assert [line.split()[1] for line in lines] == ["20/100", "40/100", "60/100", "80/100", "100/100"]


def test_restarting_forgets_the_time_before():
    clock = Clock()
    bar = Progress("embed", 100, "texts", clock=clock)
    clock.now += 1000
    bar.restart()
    clock.now += 1
    bar.advance(10)
    assert bar.rate == 10


def test_restarting_leaves_what_an_earlier_run_did_out_of_the_speed():
    clock = Clock()
    bar = Progress("train", 1100, "steps", clock=clock)
    bar.advance(1000)
    bar.restart()
    clock.now += 10
    bar.advance(20)
    assert (bar.done, bar.rate, bar.seconds_left) == (1020, 2, 40)


def test_what_is_skipped_counts_as_done_and_not_as_speed():
    clock = Clock()
    bar = Progress("embed", 1000, "texts", clock=clock)
    clock.now += 10
    bar.skip(500)
    bar.advance(100)
    assert (bar.done, bar.rate, bar.seconds_left) == (600, 10, 40)


def test_in_a_log_there_is_one_line_at_the_end_even_after_an_error(caplog):
    caplog.set_level(logging.INFO, "pst_dist.logs")
    with pytest.raises(RuntimeError), progress("embed", 5, "texts") as bar:
        bar.advance(2)
        raise RuntimeError
    assert [record.getMessage().split("  ")[0] for record in caplog.records] == ["embed 2/5 texts"]


def test_other_ranks_say_nothing(caplog):
    caplog.set_level(logging.INFO, "pst_dist.logs")
    with progress("train", 5, "steps", every_seconds=0, show=False) as bar:
        bar.advance(5)
    assert caplog.records == [] and bar.done == 5


def test_on_a_terminal_a_bar_is_drawn(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress("embed", 4, "texts") as bar:
            bar.advance(3)
    pieces = []
    # A terminal hands over what is in its buffer, and an error once the other side is closed and all is read.
    with contextlib.suppress(OSError):
        while piece := os.read(parent, 100_000):
            pieces.append(piece)
    os.close(parent)
    shown = b"".join(pieces).decode()
    assert "embed" in shown and "3/4" in shown and "texts/s" in shown


@contextlib.contextmanager
def unconfigured():
    """Logging as in a script that never touched it; pytest adds its handlers to the root when a test begins."""
    root, ours = logging.getLogger(), logging.getLogger("pst_dist")
    before = (root.handlers, ours.handlers, ours.level)
    root.handlers, ours.handlers = [], []
    ours.setLevel(logging.NOTSET)
    try:
        yield ours
    finally:
        root.handlers, ours.handlers = before[:2]
        ours.setLevel(before[2])


def test_a_script_without_logging_sees_our_lines_and_keeps_its_logging(capsys):
    with unconfigured() as ours:
        with shown_by_default():
            with shown_by_default():
                logging.getLogger("pst_dist.pipeline").info("stage shard: 0.1 s")
            logging.getLogger("pst_dist.pipeline").info("stage embed: 0.2 s")
        assert capsys.readouterr().err == "stage shard: 0.1 s\nstage embed: 0.2 s\n"
        assert ours.handlers == [] and ours.level == logging.NOTSET
        logging.getLogger("pst_dist.pipeline").info("silent again")
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["", "pst_dist"])
def test_an_application_that_configured_logging_is_left_alone(name, capsys):
    with unconfigured():
        owner, handler = logging.getLogger(name), logging.NullHandler()
        owner.addHandler(handler)
        level = owner.level
        with shown_by_default():
            assert owner.handlers == [handler] and owner.level == level
            logging.getLogger("pst_dist.pipeline").info("not shown")
        assert capsys.readouterr().err == ""


def test_a_level_on_our_logger_silences_lines_and_bars(capsys, monkeypatch):
    with unconfigured() as ours:
        ours.setLevel(logging.WARNING)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        with shown_by_default(), progress("embed", 4, "texts") as bar:
            bar.advance(4)
            logging.getLogger("pst_dist.pipeline").warning("still said")
        assert capsys.readouterr().err == "still said\n"
        assert ours.level == logging.WARNING


def test_a_package_that_nobody_asked_for_is_not_missed(caplog):
    """bitsandbytes' import asks for one on CPUs with AVX-512, and sentence-transformers imports bitsandbytes."""
    drop_noise()
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("pip install kernels")
    logging.getLogger("bitsandbytes.cextension").warning("compiled without support for this GPU")
    assert caplog.messages == ["compiled without support for this GPU"]
