"""Ranks that are killed, stopped or stuck: who is blamed, how soon the others end, and that nothing else is said."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port
from rank_group import DEAD_SECONDS, RankGroup, Stuck
from run_files import losses
from small_run import small_config
from waiting import wait_until

from pst_dist.distributed import peer_link
from pst_dist.distributed.peer_verdict import FAREWELL_SECONDS, Peer, Place, judge
from pst_dist.distributed.peer_watch import _is_broken_connection, _Watcher, watched
from pst_dist.distributed.ranks import Ranks
from pst_dist.training.fingerprint import training_settings

LAPS_TIMEOUT = 6
TRAIN_TIMEOUT = 120


# --- who is to blame --------------------------------------------------------------------------------------------------


def peers(*entered: int, **changes) -> list[Peer]:
    """Ranks on hosts n0, n1… that all were heard of and moved at second 100, having entered so many sections."""
    return [
        dataclasses.replace(Peer(rank, f"n{rank}", 100.0, 100.0, Place("backward", 7, count, count)), **changes)
        for rank, count in enumerate(entered)
    ]


def test_a_rank_whose_connection_ended_is_dead_at_once_unless_it_said_that_it_was_done():
    alive, dead = peers(40, 40)
    dead.closed = "connection closed"
    verdict = judge([alive, dead], 100.1, 600)
    assert str(verdict.error()) == (
        "error[PEER_LOST] rank 1 on n1 was lost in backward of step 7 (connection closed); "
        "run the same command again: it resumes from the last checkpoint"
    )
    dead.farewell = ""
    assert judge([alive, dead], 100.1, 600) is None


def test_a_rank_that_is_not_heard_of_hangs_after_the_timeout_and_not_before():
    fresh, silent = peers(40, 41)
    fresh.heard = fresh.moved = 109.0
    assert judge([fresh, silent], 109.9, 10) is None
    verdict = judge([fresh, silent], 110, 10)
    assert (verdict.rank, verdict.hangs) == (1, True)


def test_when_no_rank_moves_the_one_that_came_least_far_is_to_blame():
    ranks = peers(40, 40, 39, 40, heard=110.0)
    assert judge(ranks, 109.9, 10) is None
    assert judge(ranks, 110, 10).rank == 2
    assert judge(ranks, 110, 10, all_are_known=False) is None


def test_of_those_that_came_as_far_the_one_outside_a_collective_is_to_blame():
    ranks = peers(40, 40, 40, heard=110.0, waiting=True)
    ranks[1].waiting, ranks[1].line = False, "data.py:290"
    verdict = judge(ranks, 110, 10)
    assert verdict.rank == 1 and "no rank made progress for 10 s; it is at data.py:290" in verdict.reason


def test_while_any_rank_moves_none_hangs():
    ranks = peers(40, 40, heard=500.0)
    ranks[0].moved = 495.0  # rank zero hashes a checkpoint, file by file, and the others wait for it
    assert judge(ranks, 500, 10) is None


def test_a_rank_that_ended_by_an_error_of_its_own_leaves_the_others_time_for_the_same_one():
    here, gone = peers(40, 40, heard=104.0, moved=104.0)
    gone.farewell, gone.left, gone.closed = "error[DATA]", 100.0, "connection closed"
    assert judge([here, gone], 100 + FAREWELL_SECONDS - 0.1, 600) is None
    verdict = judge([here, gone], 100 + FAREWELL_SECONDS, 600)
    assert verdict.rank == 1 and verdict.reason == "it ended with error[DATA], see its message"


def test_the_timeout_changes_no_weight(tmp_path):
    one, other = (small_config(tmp_path, tmp_path, train__timeout_seconds=seconds) for seconds in (5, 600))
    assert training_settings(one, "s", "e", 8) == training_settings(other, "s", "e", 8)


def test_a_hub_that_cannot_be_reached_is_not_a_lost_rank():
    assert _is_broken_connection(RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]"))
    assert not _is_broken_connection(ConnectionError("Connection to huggingface.co timed out"))
    assert not _is_broken_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# --- the wire ---------------------------------------------------------------------------------------------------------


def test_one_rank_alone_is_not_watched():
    with watched(Ranks(), 1):
        time.sleep(1.2)


@contextlib.contextmanager
def rank_zero_and_one() -> Iterator[tuple[_Watcher, _Watcher]]:
    """The watchers of two ranks, connected over loopback; their training threads stand still."""
    server, meeting = peer_link.listen()
    zero = _Watcher(Ranks(0, 0, 2), meeting, 600, server, None)
    one = None
    try:
        link = peer_link.call(meeting, 1)
        assert link is not None
        one = _Watcher(Ranks(1, 1, 2), meeting, 600, None, link)
        wait_until(lambda: 1 in zero.peers, "rank 1 is known")
        yield zero, one
    finally:
        for watcher in filter(None, (one, zero)):
            watcher.leave("")


def says(meeting: peer_link.Meeting, line: bytes) -> bytes:
    """What rank zero answers to these bytes before it hangs up; empty for a stranger."""
    with socket.create_connection(("127.0.0.1", meeting.port), timeout=15) as connection:
        with contextlib.suppress(OSError):  # hung up on while we speak
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(4096)
    return b""


def hostile_lines(secret: str) -> Iterator[bytes]:
    """The two lines that were seen to end a training, their like with the secret, and 300 random ones."""
    yield b'{"rank":1,"host":"x","secret":"\\ud800"}\n'
    yield b"[" * 60_000 + b"\n"
    yield b"\n" * 1000
    yield b"\xff\xfe\x00" * 4000
    own = secret.encode()
    yield own + b"[" * 400 + b"\n"
    yield own + b" " * 60_000
    yield own + b' {"rank": 1e999, "host": "x"}\n'
    yield own + b' {"rank": true, "host": "x"}\n'
    yield own + b' {"rank": 1, "host": 3}\n'
    yield own + b' {"rank": 0, "host": "x"}\n' + own + b' {"rank": 2, "host": "x"}\n'
    source = random.Random(13)
    parts = [
        b'{"rank":1,"host":"x"}',
        b"[",
        b"{",
        b'"',
        b"\n",
        b"\\ud800",
        b"1e999",
        b"\x00",
        own[:31],
        own[::-1],
        b" ",
    ]
    for _ in range(300):
        yield b"".join(source.choices(parts, k=source.randrange(1, 40))) + source.randbytes(source.randrange(64))


def test_no_bytes_of_a_stranger_disturb_the_watch(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with rank_zero_and_one() as (zero, one):
        for line in hostile_lines(zero.meeting.asked):
            assert says(zero.meeting, line) == b"", line[:80]
        assert set(zero.peers) == {0, 1}
        heard = zero.peers[1].heard
        wait_until(lambda: zero.peers[1].heard > heard, "rank 1 is still heard")
        assert zero._thread.is_alive() and one._thread.is_alive()
        assert zero.verdict is None and one.verdict is None and zero.peers[1].closed == ""


def test_only_the_whole_secret_opens_and_its_beginning_is_not_answered_byte_by_byte(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with rank_zero_and_one() as (zero, _):
        meeting = zero.meeting
        hello = peer_link.hello_line(meeting, 1)
        with socket.create_server(("127.0.0.1", 0)) as server:
            here = socket.create_connection(server.getsockname())
            there, _ = server.accept()
        with here, there:
            link = peer_link.Link(there)
            here.sendall(hello[:40])
            assert link.greet(meeting, 2) is None
            here.sendall(hello[40:] + b"\n")
            assert link.greet(meeting, 2) == peer_link.Hello(1, os.uname().nodename)
        assert says(meeting, hello.replace(meeting.asked.encode(), b"0" * 32) + b"\n") == b""
        for start in (meeting.asked[:31], "0" * 31):  # a right and a wrong beginning look the same: no answer yet
            with socket.create_connection(("127.0.0.1", meeting.port), timeout=15) as connection:
                connection.sendall(start.encode())
                connection.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    connection.recv(1)


def test_strangers_that_keep_quiet_are_limited_in_number_and_time(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(peer_link, "STRANGERS", 5)
    monkeypatch.setattr(peer_link, "HELLO_SECONDS", 2.0)
    with rank_zero_and_one() as (zero, _), contextlib.ExitStack() as open_ones:
        place = ("127.0.0.1", zero.meeting.port)
        quiet = [open_ones.enter_context(socket.create_connection(place, timeout=15)) for _ in range(30)]
        for connection in quiet[:25]:
            assert connection.recv(1) == b"", "the oldest make room"
        wait_until(lambda: len(zero.links) == 6, "the five newest and rank 1")
        wait_until(lambda: len(zero.links) == 1, "the five had their time", seconds=10)
        assert zero.verdict is None and zero.peers[1].closed == ""


@pytest.mark.parametrize(
    "message",
    [
        {"place": [[], None, "x", None], "waiting": 1, "line": 2},
        {"place": ["backward", 1, 2], "waiting": False, "line": ""},
        {"place": {"a": 1}},
        {"farewell": 3},
        b"[" * 4000,
        b"\xff",
        b"3",
    ],
)
def test_a_rank_that_talks_nonsense_is_lost_rather_than_the_watch(monkeypatch, message):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(_Watcher, "_end_this_rank", lambda *_: None)  # it would end this process
    with rank_zero_and_one() as (zero, one):
        (link,) = one.links
        link.send_bytes(message) if isinstance(message, bytes) else link.send(message)
        assert zero.known.wait(10) and zero.verdict is not None
        assert (zero.verdict.rank, zero.verdict.reason) == (1, "it does not speak our protocol")


def test_rank_zero_listens_on_the_interface_of_the_master_address_alone(monkeypatch):
    own = peer_link._own_address(socket.gethostname()) or peer_link._default_address()
    for master, interface in [("localhost", "127.0.0.1"), ("127.0.1.1", "127.0.0.1"), (own, own)]:
        if master is None:
            continue  # a machine that has loopback alone
        monkeypatch.setenv("MASTER_ADDR", master)
        server, meeting = peer_link.listen()
        with server:
            assert server.getsockname()[0] == interface and meeting.addresses[0] == interface
    # A name that means loopback here and this machine elsewhere, or nothing at all: never every interface.
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    server, _ = peer_link.listen()
    with server:
        assert server.getsockname()[0] not in ("0.0.0.0", "::")


def refuse(*_args, **_keywords):
    raise socket.gaierror("no name server here")


def test_a_rank_zero_of_another_run_is_not_believed(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with rank_zero_and_one() as (zero, _):
        assert peer_link.call(dataclasses.replace(zero.meeting, answered="0" * 32), 1) is None
        assert peer_link.call(dataclasses.replace(zero.meeting, port=free_port()), 1) is None


# --- ranks that do nothing but meet -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Iterator[dict[str, RankGroup]]:
    """Eight groups at a time, and what befell each; they have ended but for those that were stopped."""
    folder = tmp_path_factory.mktemp("groups")

    def group(
        name: str, size: int, stuck: Stuck | None = None, timeout: float = LAPS_TIMEOUT, native: str = ""
    ) -> RankGroup:
        return RankGroup(folder / name, ["laps", str(timeout), *filter(None, [native])], size, stuck)

    groups = {
        "rank 1 of 3 is stuck": group("a", 3, Stuck(1, "backward", 5)),
        "rank 0 is stuck": group("b", 2, Stuck(0, "forward", 5)),
        "rank 1 is stopped": group("c", 2),
        "rank 0 is stopped": group("d", 2),
        "rank 0 is killed": group("e", 2, Stuck(0, "backward", 9), timeout=600),
        "rank 2 of 3 is killed": group("f", 3, Stuck(2, "backward", 9), timeout=600),
        "rank 1 computes": group("g", 2, native="computes"),
        "rank 1 sleeps": group("h", 2, native="sleeps"),
    }
    try:
        for each in groups.values():
            each.start()
        running = [each for name, each in groups.items() if "stopped" in name]
        wait_until(lambda: all(each.is_stuck() for each in groups.values() if each.stuck), "the stuck ranks are stuck")
        time.sleep(1)
        stopped = {0: running[1], 1: running[0]}
        for rank, each in stopped.items():
            each.lost_at = each.signal(rank, signal.SIGSTOP)
        for name, rank in (("rank 0 is killed", 0), ("rank 2 of 3 is killed", 2)):
            groups[name].lost_at = groups[name].signal(rank, signal.SIGKILL)
        others = {name: set(range(each.world_size)) for name, each in groups.items()}
        others["rank 1 is stopped"], others["rank 0 is stopped"] = {0}, {1}
        wait_until(
            lambda: all(others[name] <= set(each.look()) for name, each in groups.items()), "the other ranks end"
        )
        yield groups
    finally:
        for each in groups.values():
            each.stop()


LOSSES = {
    "rank 1 of 3 is stuck": (
        1,
        r"hangs in backward of step 5 \(no rank made progress for 6 s; it is at rank_group.py:\d+\)",
    ),
    "rank 0 is stuck": (0, r"hangs in forward of step 5 \(no rank made progress for 6 s; it is at rank_group.py:\d+\)"),
    "rank 1 is stopped": (1, r"hangs in (forward|backward) of step \d+ \(no message from it for 6 s: stopped, .*\)"),
    "rank 0 is stopped": (0, r"hangs in (forward|backward) of step \d+ \(no message from it for 6 s: stopped, .*\)"),
    "rank 0 is killed": (0, r"was lost in backward of step 9 \(connection closed\)"),
    "rank 2 of 3 is killed": (2, r"was lost in backward of step 9 \(connection closed\)"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("what", LOSSES)
def test_every_other_rank_ends_in_time_with_7_and_one_line_that_names_the_lost_one(groups, what):
    group, (lost, words) = groups[what], LOSSES[what]
    expected = rf"pst: error\[PEER_LOST\] rank {lost} on {socket.gethostname()} {words}; run the same command again: .*"
    for rank in range(group.world_size):
        if rank == lost and "stuck" not in what:
            continue
        assert group.codes()[rank] == 7, group.said(rank)
        said = [line for line in group.said(rank).splitlines() if line]
        assert len(said) == 1 and re.fullmatch(expected, said[0]), said
        if group.lost_at is not None:
            allowed = LAPS_TIMEOUT + 5 if "stopped" in what else DEAD_SECONDS
            assert group.ended[rank] - group.lost_at <= allowed


@pytest.mark.distributed
def test_a_rank_that_computes_without_a_sign_is_waited_for_and_one_that_sleeps_is_not(groups):
    computes, sleeps = groups["rank 1 computes"], groups["rank 1 sleeps"]
    assert computes.codes() == [0, 0], computes.said(0) + computes.said(1)
    assert sleeps.codes() == [7, 7]
    assert "rank 1 on" in sleeps.said(0) and "hangs in backward of step 2" in sleeps.said(0)


@pytest.mark.distributed
def test_when_a_rank_hangs_each_rank_leaves_its_python_stacks(groups):
    group = groups["rank 1 of 3 is stuck"]
    assert f"each rank's stacks are in {group.folder / 'stacks'}" in group.said(0)
    written = [(group.folder / "stacks" / f"rank-0000{rank}.txt").read_text() for rank in range(3)]
    assert "in at_and_stay" in written[1] and "in all_reduce" in written[0] and "in all_reduce" in written[2]
    assert all("rank 1 on" in text.splitlines()[0] and "(most recent call first)" in text for text in written)
    assert not (groups["rank 0 is killed"].folder / "stacks").exists(), "nobody hung"


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_that_was_given_up_ends_by_itself_when_it_is_let_go(groups, rank):
    group = groups[f"rank {rank} is stopped"]
    assert group.codes()[rank] is None
    group.signal(rank, signal.SIGCONT)
    wait_until(lambda: rank in group.look(), "the rank that was stopped ends")
    assert group.codes()[rank] == 7
    (line,) = group.errors(rank)
    assert f"rank {rank} on {socket.gethostname()} hangs in" in line


# --- real trainings ---------------------------------------------------------------------------------------------------


def training(data: Path, folder: Path, world_size: int, stuck: Stuck | None = None, **changes) -> RankGroup:
    """Ranks that train 12 steps with a checkpoint every 4."""
    settings = {"train__max_steps": 12, "train__eval_steps": 4, "train__deepspeed": "zero2"} | changes
    config = small_config(data, folder / "run", train__timeout_seconds=TRAIN_TIMEOUT, **settings)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return RankGroup(folder, [str(folder / "config.yaml")], world_size, stuck)


def children(pid: int | None) -> list[int]:
    """The processes that a process started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(group: RankGroup, ranks: set[int] | None = None) -> None:
    """Wait until those ranks have ended, or all."""
    wait_until(lambda: (ranks or set(range(group.world_size))) <= set(group.look()), "the ranks end", seconds=120)


@pytest.mark.distributed
@pytest.mark.encoder
def test_trainings_lose_a_rank_and_go_on_to_the_losses_of_an_undisturbed_one(small_data, tmp_path):
    """Killed in a backward pass (with loader workers), while publishing a checkpoint; paused; and left in peace."""
    whole = training(small_data, tmp_path / "whole", 2)
    backward = training(small_data, tmp_path / "backward", 2, Stuck(1, "backward", 6), train__dataloader_num_workers=1)
    publishing = training(small_data, tmp_path / "publishing", 2, Stuck(0, "checkpoint", 8))
    paused = training(small_data, tmp_path / "paused", 2)
    groups = [whole, backward, publishing, paused]
    try:
        for group in groups:
            group.start()
        log = tmp_path / "paused" / "run" / "metrics.jsonl"
        wait_until(lambda: log.is_file() and '"step":3' in log.read_text(), "some steps are done", seconds=120)
        paused.signal(1, signal.SIGSTOP)
        stopped = time.monotonic()
        intruder = RankGroup(tmp_path / "intruder", paused.words, 2)
        groups.append(intruder.start())
        wait_until(lambda: backward.is_stuck() and publishing.is_stuck(), "both are stuck", seconds=120)
        workers = [child for rank in backward.processes for child in children(rank.pid)]
        assert len(workers) == 2, "a loader worker each"
        killed = {1: backward.signal(1, signal.SIGKILL)}
        backward.signal(0, signal.SIGTERM)  # as a launcher does: rank 0 is not "preempted" for that
        killed[0] = publishing.signal(0, signal.SIGKILL)
        for group, lost, others in ((backward, 1, {0}), (publishing, 0, {1})):
            ended(group, others)
            for rank in others:
                assert group.ended[rank] - killed[lost] <= DEAD_SECONDS
                assert group.codes()[rank] == 7, group.said(rank)
                place = "backward of step 6" if lost else "checkpoint of step 8"
                (line,) = group.errors(rank)
                assert f"rank {lost} on {socket.gethostname()} was lost in {place} (connection closed);" in line
        wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "loader workers end too")
        ended(intruder)
        wait_until(lambda: time.monotonic() - stopped > 4, "the pause was longer than some signs of life")
        paused.signal(1, signal.SIGCONT)
        assert intruder.codes() == [5, 5], "two runs in one directory"
        for rank in range(2):
            (line,) = intruder.errors(rank)
            assert "error[LOCKED]" in line and f"in use by process {paused.processes[0].pid} on " in line
        for group in (whole, paused):
            ended(group)
            assert group.codes() == [0, 0], group.said(0) + group.said(1)
        undisturbed = losses(tmp_path / "whole" / "run")
        assert len(undisturbed) == 12 and losses(tmp_path / "paused" / "run") == undisturbed

        assert [path.name for path in (tmp_path / "publishing" / "run" / "checkpoints").glob("checkpoint-*")] == [
            "checkpoint-4"
        ], "what was half written is not to be found"
        again = RankGroup(publishing.folder, publishing.words, 2)
        groups.append(again.start())
        ended(again)
        assert again.codes() == [0, 0], again.said(0) + again.said(1)
        assert "resumed step 4" in again.said(0)
        assert losses(tmp_path / "publishing" / "run") == undisturbed
    finally:
        for group in groups:
            group.stop()
