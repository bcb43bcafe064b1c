"""Shards as chat messages, as Parquet and as Hugging Face datasets, read by the libraries that other programs use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pst_dist
from pst_dist.cli.main import run_verb
from pst_dist.data.interchange import write_interchange
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet
from pst_dist.diagnostics.artefacts import verify
from pst_dist.errors import InputError

datasets = pytest.importorskip("datasets")

TRAIN = [
    ReasoningSample(
        id=f"r-{k}",
        question=f"What is {k} + {k}?",
        answer=str(2 * k),
        rationales=tuple(f"{k} and {k}\nmake {way} {2 * k}" for way in ("at once", "in the end")[: 1 + k % 2]),
        answer_type="number",
        source="rows.jsonl:1",
    )
    for k in range(1, 8)
]
BARE = [ReasoningSample(id="v-0", question="Is it?", answer="yes")]
TURNS = (("system", "You count."), ("user", "What is 3?"), ("assistant", "3"), ("user", "And twice that?"))
CONVERSATIONS = [
    TRAIN[0],
    ReasoningSample(
        id="c-0",
        question="You count.\n\nUser: What is 3?\nAssistant: 3\nUser: And twice that?",
        answer="6",
        rationales=("3 and 3",),
        answer_type="number",
        turns=TURNS,
    ),
]
TEST = [
    ReasoningSample(
        id="t-0",
        question="Which? (A) ä (B) 北",
        answer="B",
        rationales=("it is 北",),
        answer_type="choice",
        choices=("ä", "北"),
    )
]


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    splits = {"train": TRAIN, "validation": BARE, "test": TEST}
    write_shards(splits, folder / "shards", samples_per_shard=3, fingerprint="f", extra={})
    return folder


def expected(sample: ReasoningSample) -> dict:
    return {
        "id": sample.id,
        "question": sample.question,
        "answer": sample.answer,
        "rationales": list(sample.rationales) or None,
        "answer_type": sample.answer_type,
        "choices": list(sample.choices) or None,
        "turns": [{"role": role, "content": text} for role, text in sample.turns] or None,
    }


def test_messages_have_one_line_per_rationale_with_the_answer_first(data):
    folder = write_interchange(ShardSet.open(data / "shards"), "messages")
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == sum(len(sample.rationales) for sample in TRAIN)
    assert len({row["id"] for row in rows}) == len(rows)
    wanted = [(sample.question, f"{sample.answer}\n\n{text}") for sample in TRAIN for text in sample.rationales]
    found = [tuple(turn["content"] for turn in row["messages"]) for row in rows]
    assert found == wanted
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    loaded = datasets.load_dataset(str(folder), cache_dir=str(data / "cache"))  # as TRL's scripts do
    assert {name: len(split) for name, split in loaded.items()} == {"train": len(rows), "validation": 1, "test": 1}
    assert loaded["validation"][0]["messages"][1]["content"] == "yes"
    assert loaded["test"][0]["messages"][1]["content"] == "B\n\nit is 北"


def test_parquet_keeps_every_field_and_is_read_back_as_rows(data, tmp_path):
    import pyarrow.parquet

    folder = write_interchange(ShardSet.open(data / "shards"), "parquet")
    table = pyarrow.parquet.read_table(folder / "train.parquet")
    assert table.to_pylist() == [expected(sample) for sample in TRAIN]
    out = tmp_path / "again"
    from pst_dist.pipeline import make_shards

    for split, kind, samples in (("train", "number", TRAIN), ("test", "choice", TEST)):
        words = [f"data.train={folder / split}.parquet", "data.validation_size=0", f"data.answer_type={kind}"]
        out = tmp_path / split
        make_shards(pst_dist.load_config(None, *words, "arm=answer_only", f"output_dir={out}"))
        again = list(ShardSet.open(out / "data" / "shards").split("train"))
        assert [expected(row) for row in again] == [expected(row) for row in samples]


def test_turns_are_kept_in_both_forms_and_read_back(tmp_path, monkeypatch):
    import pyarrow.parquet

    from pst_dist.pipeline import make_shards

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_shards({"train": CONVERSATIONS}, tmp_path / "shards", samples_per_shard=3, fingerprint="f", extra={})
    shards = ShardSet.open(tmp_path / "shards")
    lines = (write_interchange(shards, "messages") / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["messages"] == [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "What is 3?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And twice that?"},
        {"role": "assistant", "content": "6\n\n3 and 3"},
    ]
    file = write_interchange(shards, "parquet") / "train.parquet"
    assert pyarrow.parquet.read_table(file).to_pylist() == [expected(sample) for sample in CONVERSATIONS]
    assert list(pst_dist.as_dataset(tmp_path, "train")) == [expected(sample) for sample in CONVERSATIONS]
    words = [
        f"data.train={file}",
        "data.validation_size=0",
        "data.answer_type=number",
        f"output_dir={tmp_path / 'run'}",
    ]
    make_shards(pst_dist.load_config(None, *words))
    again = list(ShardSet.open(tmp_path / "run" / "data" / "shards").split("train"))
    assert [(row.question, row.turns) for row in again] == [(row.question, row.turns) for row in CONVERSATIONS]


def test_the_command_writes_once_and_verify_knows_when_the_shards_have_changed(data, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": s.question, "answer": s.answer, "rationale": "so"}) + "\n" for s in TRAIN)
    )
    words = [
        "shard",
        "--to",
        "messages",
        f"data.train={rows}",
        "data.validation_size=0",
        f"output_dir={tmp_path / 'run'}",
    ]
    from pst_dist.config.loading import dump_config, load_config

    config = tmp_path / "my.yaml"
    config.write_text(dump_config(load_config(None, [])))
    assert run_verb(["shard", str(config), *words[1:]]) == 0
    folder = tmp_path / "run" / "data" / "messages"
    assert str(folder / "train.jsonl") in capsys.readouterr().out
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert run_verb(["shard", str(config), *words[1:]]) == 0
    assert (folder / "train.jsonl").stat().st_mtime_ns == before
    assert not any(finding.is_problem for finding in verify(tmp_path / "run"))
    assert run_verb(["shard", str(config), "--rebuild", *words[3:], "data.max_rows=3"]) == 0
    (stale,) = (finding for finding in verify(tmp_path / "run") if finding.is_problem)
    assert (stale.kind, stale.state) == ("messages", "stale") and "pst shard --to messages" in stale.remedy


def test_a_folder_with_other_files_is_left_alone(data):
    (data / "messages").mkdir()
    (data / "messages" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'notes.txt' in it was not written by pst"):
        write_interchange(ShardSet.open(data / "shards"), "messages")
    assert [path.name for path in (data / "messages").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_shards_are_a_hugging_face_dataset(data, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for place in (data, data / "shards", pst_dist.load_config(None, f"output_dir={tmp_path}")):
        every = pst_dist.as_dataset(place, streaming=streaming)
        assert sorted(every) == ["test", "train", "validation"]
        assert list(every["validation"]) == [expected(BARE[0])]
        assert list(every["train"]) == [expected(sample) for sample in TRAIN]
    alone = pst_dist.as_dataset(data, "test", streaming=streaming)
    assert list(alone) == [expected(sample) for sample in TEST]
    if streaming:
        assert pst_dist.as_dataset(data, "train", streaming=True).num_shards == 3


def test_a_cached_dataset_is_not_that_of_other_shards_in_the_same_place(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(pst_dist.as_dataset(data, "train")) == 7
    write_shards({"train": TRAIN[:2]}, data / "shards", samples_per_shard=3, fingerprint="g", extra={}, rebuild=True)
    assert len(pst_dist.as_dataset(data, "train")) == 2
    with pytest.raises(InputError, match="no split 'test'"):
        pst_dist.as_dataset(data, "test")


def test_without_shards_the_message_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="no finished shards found"):
        pst_dist.as_dataset(pst_dist.load_config(None, f"output_dir={tmp_path}"))
