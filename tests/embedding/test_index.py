"""Embeddings open without being read again while they have not changed, and each rationale is found at its row."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_run import make_small_data, small_config

from pst_dist.config.run_dir import run_dir
from pst_dist.data.sample import question_group
from pst_dist.data.shards import ShardSet
from pst_dist.embedding import store as store_module
from pst_dist.embedding.index import RationaleIndex, _first_not_less
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.errors import IntegrityError
from pst_dist.student.tokenizer import KeptTokenizer, build_tokenizer
from pst_dist.training.batching.batches import Collator
from pst_dist.training.batching.order import OrderPlan
from pst_dist.training.batching.step_batches import _Steps
from pst_dist.training.checked_rows import CheckedRows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_small_data(tmp_path_factory.mktemp("indexed") / "data")


def opened(data) -> EmbeddingStore:
    return EmbeddingStore.open(data / "embeddings", ShardSet.open(data / "shards"))


def test_a_rationale_is_found_at_its_row():
    files = [[("a", 0), ("a", 1), ("b", 0)], [], [("c", 0), ("d", 0), ("d", 1), ("d", 2)]]
    index = RationaleIndex.of(files)
    keys = [key for file in files for key in file]
    assert index.rows(keys).tolist() == list(range(7)) and index.rows(keys[::-1]).tolist() == list(range(7))[::-1]
    assert index.rows([("a", 2), ("b", 1), ("e", 0), ("d", -1), ("d", 2)]).tolist() == [-1, -1, -1, -1, 6]
    assert index.entries.itemsize == 16 and len(index.entries) == 4, "16 bytes for each sample"
    assert RationaleIndex.of([]).rows([("a", 0)]).tolist() == [-1]
    with pytest.raises(IntegrityError, match="the same sample"):
        RationaleIndex.of([[("a", 0)], [("a", 0)]])
    with pytest.raises(IntegrityError, match="in order"):
        RationaleIndex.of([[("a", 1), ("a", 0)]])


def test_unchanged_embeddings_are_opened_without_reading_them(data, monkeypatch):
    first = opened(data)
    keys = [key for split in first.splits for key in first.keys(split)]
    wanted = first.vectors(keys)
    assert np.array_equal(wanted, np.concatenate([first.rows(split)[1] for split in first.splits]))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "read_vectors", lambda *_, **__: pytest.fail("read again"))
        again = opened(data)
    assert np.array_equal(again.vectors(keys[::-1]), wanted[::-1])
    assert np.array_equal(again.vector(*keys[3]), wanted[3])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of others", "no JSON"])
def test_a_damaged_index_is_made_again(data, damage):
    whole = opened(data)
    path = data / ".embeddings.index"
    before = path.read_bytes()
    header, _, rest = before.partition(b"\n")
    others = json.dumps({**json.loads(header), "embeddings": "0" * 64}).encode()
    flipped = rest[:9] + bytes([rest[9] ^ 1]) + rest[10:]
    contents = {"cut": before[:-3], "flipped": header + b"\n" + flipped, "empty": b"", "no JSON": b"\xff\n" + rest}
    path.unlink()  # the map of `whole` keeps the old file
    path.write_bytes(contents.get(damage, others + b"\n" + rest))
    key = whole.keys("train")[5]
    assert np.array_equal(opened(data).vector(*key), whole.vector(*key))
    assert path.read_bytes() == before


def test_changed_vectors_are_found_although_there_is_an_index(data):
    opened(data)
    path = next((data / "embeddings").glob("train-*.safetensors"))
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="sha256 differs"):
        opened(data)
    path.write_bytes(before)
    opened(data)


def test_further_negatives_are_known_without_reading_rows(data, tmp_path):
    shards = ShardSet.open(data / "shards")
    reader, store = shards.split("train"), opened(data)
    loss = small_config(data, tmp_path, loss__alignment="info_nce", loss__negatives=9).loss
    collate = Collator(loss=loss, pad_id=0, teacher=store)
    cut = {"rank": 0, "world_size": 1, "size": 4, "by_length": None}
    plan = OrderPlan(len(reader), 8, 3)
    from_table, from_rows = (_Steps(plan, rows, None, collate, **cut) for rows in (reader, list(reader)))
    for step in range(4):
        indices = plan.global_batch(step).tolist()
        assert from_table._candidates(step, indices, 1) == from_rows._candidates(step, indices, 1)
    known = [reader.candidates.of(k) for k in range(len(reader))]
    assert known == [(row.id, len(row.rationales), question_group(row.question)) for row in reader]
    table = data / ".shards.train.candidates"
    content = table.read_bytes()
    table.unlink()
    table.write_bytes(content[:-1] + b"?")
    assert [shards.split("train").candidates.of(k) for k in range(len(reader))] == known
    assert table.read_bytes() == content


def test_a_fresh_tokenizer_is_trained_once_for_the_same_rows_and_settings(data, tmp_path, monkeypatch):
    config = small_config(data, tmp_path)
    shards = ShardSet.open(run_dir(config).shards)
    kept = KeptTokenizer(tmp_path / ".tokenizer.json", shards.manifest.digest)
    first = build_tokenizer(config.student, shards.split("train"), kept)
    again = build_tokenizer(config.student, (), kept)
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    plain = build_tokenizer(config.student, shards.split("train"))
    text = shards.split("train")[0].question
    assert again(text)["input_ids"] == first(text)["input_ids"] == plain(text)["input_ids"]
    assert (again.eos_token, again.pad_token, len(again)) == (plain.eos_token, plain.pad_token, len(plain))
    kept.path.write_text(kept.path.read_text().replace("Ġ", "ġ", 1))
    assert kept.read(config.student) is None, "a damaged one is trained again"
    assert KeptTokenizer(kept.path, "other rows").read(config.student) is None


def test_rows_are_checked_once_for_each_student_and_layout(tmp_path):
    path = tmp_path / "checked.json"
    assert CheckedRows(path, {"layout.max_length": 8}).read() is None
    CheckedRows(path, {"layout.max_length": 8}).write(2, "'x' of sample a")
    CheckedRows(path, {"layout.max_length": 9}).write(0, "")
    assert CheckedRows(path, {"layout.max_length": 8}).read() == (2, "'x' of sample a")
    assert CheckedRows(path, {"layout.max_length": 9}).read() == (0, "")
    assert CheckedRows(path, {"layout.max_length": 10}).read() is None
    path.write_text("[]")
    assert CheckedRows(path, {"layout.max_length": 9}).read() is None


def test_a_column_is_searched_as_numpy_searches_an_array():
    chance = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 8, 9, 100):
        table = np.zeros(size, [("hash", "<u8"), ("other", "<u8")])
        table["hash"] = np.sort(chance.integers(0, 60, size).astype(np.uint64))
        wanted = np.concatenate([table["hash"], table["hash"] + 1, np.array([0, 2**64 - 1], np.uint64)])
        assert (_first_not_less(table["hash"], wanted) == np.searchsorted(table["hash"], wanted)).all()
