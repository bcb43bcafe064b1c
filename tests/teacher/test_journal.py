"""The journal: what is in it survives, and another job's is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pst_dist.errors import EnvironmentFault, IntegrityError, LockedError, StaleError
from pst_dist.teacher.journal import open_journal, read_replies
from pst_dist.teacher.messages import Reply, Usage

SETTINGS = {"--model": "m", "--seed": 0}


def reply(text: str) -> Reply:
    return Reply(text=text, finish="stop", usage=Usage(prompt=3, completion=7), thought="hm\ud800")


def opened(folder: Path, settings=SETTINGS):
    return open_journal(folder, settings, in_flight=2, reply_tokens=10)


def test_replies_come_back_as_they_were_written(tmp_path):
    with opened(tmp_path) as journal:
        journal.add("a", reply("line\nand \u2028 more"))
        journal.add("b", reply(""))
    with opened(tmp_path) as journal:
        assert list(journal.replies) == ["a", "b"] and journal.replies["a"].text == "line\nand \u2028 more"
        assert journal.replies["a"].thought == "hm\ufffd", "half of a surrogate pair is no text"
    assert read_replies(tmp_path, SETTINGS) == journal.replies
    assert sorted(os.listdir(tmp_path)) == [".lock", "journal.jsonl"], "the reserve is gone"


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_a_kill_cut_off_is_removed_and_nothing_else(tmp_path, cut):
    with opened(tmp_path) as journal:
        journal.add("a", reply("first"))
        journal.add("b", reply("second"))
    file = tmp_path / "journal.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert list(read_replies(tmp_path, SETTINGS)) == ["a"], "reading changes nothing"
    with opened(tmp_path) as journal:
        assert list(journal.replies) == ["a"]
        journal.add("c", reply("third"))
    assert list(read_replies(tmp_path, SETTINGS)) == ["a", "c"]


def test_a_cut_first_line_begins_a_new_journal(tmp_path):
    with opened(tmp_path):
        pass
    file = tmp_path / "journal.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    with opened(tmp_path) as journal:
        assert journal.replies == {}


def test_other_settings_are_refused_by_their_names(tmp_path):
    with opened(tmp_path) as journal:
        journal.add("a", reply("x"))
    before = (tmp_path / "journal.jsonl").read_bytes()
    for call in (lambda s: opened(tmp_path, s).__enter__(), lambda s: read_replies(tmp_path, s)):
        with pytest.raises(StaleError) as caught:
            call({"--model": "other", "--seed": 1})
        assert '--model was "m", now "other"' in str(caught.value) and "also --seed" in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["[]", '{"text": 3}', '{"key": "a", "text": 3}', "x"])
def test_a_damaged_line_is_told_with_its_place(tmp_path, line):
    with opened(tmp_path):
        pass
    with (tmp_path / "journal.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(IntegrityError, match=r"journal\.jsonl"):
        opened(tmp_path).__enter__()


def test_two_processes_cannot_share_a_journal(tmp_path):
    with opened(tmp_path), pytest.raises(LockedError), opened(tmp_path):
        pass


def test_every_reply_is_synced_before_it_is_used(tmp_path, monkeypatch):
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr("pst_dist.teacher.journal.os.fsync", fsync)
    with opened(tmp_path) as journal:
        for key in "abc":
            journal.add(key, reply(key))
            assert synced[-1] == (tmp_path / "journal.jsonl").stat().st_size
    assert len(synced) == 4  # the settings and three replies


def test_a_full_disk_gives_up_the_reserve_and_keeps_the_reply(tmp_path, monkeypatch):
    real = os.write
    refusals = iter([True])

    def write(descriptor: int, data) -> int:
        if next(refusals, False):
            real(descriptor, bytes(data)[:7])  # a part had room
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with opened(tmp_path) as journal:
        journal.add("a", reply("x"))
        monkeypatch.setattr("pst_dist.teacher.journal.os.write", write)
        journal.add("b", reply("y"))
        assert isinstance(journal.full, EnvironmentFault)
        assert not (tmp_path / "journal.reserve").exists()
    assert list(read_replies(tmp_path, SETTINGS)) == ["a", "b"]
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("key") for line in lines] == [None, "a", "b"], "no half line between them"
