"""Finished shards are recognised from the state of their sources; whatever changes the rows is noticed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

import pst_dist.data.sources
from pst_dist.config.loading import load_config
from pst_dist.errors import IntegrityError, StaleError
from pst_dist.pipeline import make_shards
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.manifest import sha256_file

LONG_AGO = time.time_ns() - 3600 * 10**9


def write(path: Path, answers: range, mtime_ns: int = LONG_AGO) -> Path:
    rows = [{"question": f"{n} + 0?", "answer": str(n), "rationale": f"{n} stays {n}."} for n in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


@pytest.fixture
def config(tmp_path):
    write(tmp_path / "rows.jsonl", range(10, 40))
    words = [f"output_dir={tmp_path}/run", "data.answer_type=number", "shards.samples_per_shard=8"]
    return load_config(None, words, keys={"data": {"train": "rows*.jsonl", "root": str(tmp_path)}})


@pytest.fixture
def no_reading(monkeypatch):
    def refuse(*_):
        raise AssertionError("the rows were read again")

    return lambda: monkeypatch.setattr(pst_dist.data.sources, "load_data", refuse)


def test_finished_shards_are_recognised_without_reading_a_row_or_taking_the_lock(config, no_reading, tmp_path):
    made = make_shards(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    no_reading()
    assert make_shards(config).digest == made.digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_the_same_bytes_with_another_time_are_recognised_and_the_time_is_noted(config, no_reading, tmp_path):
    made = make_shards(config)
    os.utime(tmp_path / "rows.jsonl", ns=(LONG_AGO + 1, LONG_AGO + 1))
    no_reading()
    assert make_shards(config).digest == made.digest
    record = json.loads((tmp_path / "run" / "data" / ".shards.inputs.json").read_text())
    (source,) = record["inputs"]
    assert source["mtime_ns"] == LONG_AGO + 1 and source["sha256"] == sha256_file(tmp_path / "rows.jsonl")


def test_a_file_that_changed_just_before_it_was_read_is_compared_by_its_bytes(config, no_reading, tmp_path):
    now = time.time_ns()
    write(tmp_path / "rows.jsonl", range(10, 40), mtime_ns=now)
    made = make_shards(config)
    no_reading()
    assert make_shards(config).digest == made.digest
    write(tmp_path / "rows.jsonl", range(20, 50), mtime_ns=now)
    with pytest.raises(AssertionError, match="read again"):
        make_shards(config)


@pytest.mark.parametrize("change", ["same size", "longer", "another file", "removed and another"])
def test_changed_rows_are_refused_and_packed_anew_with_rebuild(config, tmp_path, change):
    made = make_shards(config)
    path = tmp_path / "rows.jsonl"
    size = path.stat().st_size
    if change == "same size":
        write(path, range(20, 50), mtime_ns=LONG_AGO + 5)
        assert path.stat().st_size == size
    elif change == "longer":
        write(path, range(10, 41))
    else:
        write(tmp_path / "rows2.jsonl", range(60, 70))
    if change == "removed and another":
        path.unlink()
    with pytest.raises(StaleError):
        make_shards(config)
    again = make_shards(config, rebuild=True)
    assert again.digest != made.digest and make_shards(config).digest == again.digest


def test_other_bytes_of_the_same_size_and_with_the_old_time_are_noticed(config, tmp_path):
    make_shards(config)
    write(tmp_path / "rows.jsonl", range(20, 50))
    assert (tmp_path / "rows.jsonl").stat().st_mtime_ns == LONG_AGO
    with pytest.raises(StaleError):
        make_shards(config)


@pytest.mark.parametrize("word", ["data.max_rows=5", "data.validation_size=3", "shards.samples_per_shard=4"])
def test_another_setting_is_noticed(config, word):
    make_shards(config)
    section, _, rest = word.partition(".")
    key, _, value = rest.partition("=")
    part = getattr(config, section).model_copy(update={key: int(value)})
    with pytest.raises(StaleError):
        make_shards(config.model_copy(update={section: part}))


def test_without_the_record_the_rows_are_read_and_it_is_written_again(config, no_reading, tmp_path):
    made = make_shards(config)
    record = tmp_path / "run" / "data" / ".shards.inputs.json"
    whole = record.read_bytes()
    for damage in (None, b"", b"{}", whole[:40]):
        record.unlink()
        if damage is not None:
            record.write_bytes(damage)
        assert make_shards(config).digest == made.digest and record.read_bytes() == whole
    no_reading()
    make_shards(config)


def test_shards_that_were_damaged_meanwhile_are_made_again(config, tmp_path):
    made = make_shards(config)
    tar = tmp_path / "run" / "data" / "shards" / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        Artefact(tar.parent, "shards", remembers=True).verified()
    assert make_shards(config).digest == made.digest
    assert Artefact(tar.parent, "shards").verified() is not None


def test_only_changed_files_are_compared_again(config, tmp_path, monkeypatch):
    make_shards(config)
    folder = tmp_path / "run" / "data" / "shards"
    hashed = []
    monkeypatch.setattr(
        "pst_dist.storage.manifest.sha256_file",
        lambda path, **rest: hashed.append(path.name) or sha256_file(path, **rest),
    )
    assert Artefact(folder, "shards", remembers=True).verified() is not None and hashed == []
    os.utime(folder / "train-000000.tar")
    assert Artefact(folder, "shards", remembers=True).verified() is not None and hashed == ["train-000000.tar"]
    hashed.clear()
    assert Artefact(folder, "shards").verified() is not None and len(hashed) > 4, "pst verify reads everything"
    (tmp_path / "run" / "data" / ".shards.verified.json").write_text("{")
    hashed.clear()
    assert Artefact(folder, "shards", remembers=True).verified() is not None and len(hashed) > 4
