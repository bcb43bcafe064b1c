"""The file with the places of many rows: the same as the indexes give, and made again whenever it is not right."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pst_dist.data import places
from pst_dist.data.places import PLACE, open_places
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet


@pytest.fixture
def shards(tmp_path, monkeypatch):
    rows = [ReasoningSample(id=f"r-{n}", question=f"{n}?", answer=f"{n}", source=f"rows:{n}") for n in range(40)]
    write_shards({"train": rows, "test": rows[:0]}, tmp_path / "shards", samples_per_shard=7, fingerprint="f", extra={})
    few = ShardSet.open(tmp_path / "shards").split("train")
    monkeypatch.setattr("pst_dist.data.places.FROM_ROWS", 10)
    return few, tmp_path / ".shards.train.places"


def test_rows_are_found_through_the_file_without_reading_an_index(shards, tmp_path, monkeypatch):
    few, path = shards
    assert not path.exists()
    first = ShardSet.open(tmp_path / "shards").split("train")
    assert list(first) == list(few) and path.stat().st_size < 40 * PLACE.itemsize + 200
    monkeypatch.setattr(ShardSet, "index", None)
    again = ShardSet.open(tmp_path / "shards").split("train")
    assert [again[n] for n in (39, 0, 7)] == [few[n] for n in (39, 0, 7)]
    assert isinstance(again._places, np.memmap)
    sent = pickle.dumps(again)
    assert len(sent) < 10_000 and list(pickle.loads(sent)) == list(few)


@pytest.mark.parametrize("damage", ["other shards", "flipped", "cut", "empty", "text"])
def test_a_file_that_is_damaged_or_of_other_shards_is_made_again(shards, tmp_path, damage):
    few, path = shards
    assert len(list(ShardSet.open(tmp_path / "shards").split("train"))) == 40
    right = path.read_bytes()
    if damage == "other shards":
        open_places(path, "another digest", 40, lambda: np.zeros(40, PLACE))
    elif damage == "flipped":
        path.write_bytes(right[:-3] + bytes([right[-3] ^ 1]) + right[-2:])
    else:
        path.write_bytes({"cut": right[:-9], "empty": b"", "text": b"[1]\n"}[damage])
    assert path.read_bytes() != right
    assert list(ShardSet.open(tmp_path / "shards").split("train")) == list(few)
    assert path.read_bytes() == right


def test_where_the_file_cannot_be_written_places_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "FROM_ROWS", 1)
    (tmp_path / "file").write_text("")
    made = np.arange(3 * 16, dtype=np.uint8).view(PLACE)
    assert (open_places(tmp_path / "file" / "x", "d", 3, lambda: made) == made).all()
