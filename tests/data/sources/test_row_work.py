"""Rows that several processes read and pack: the same bytes and errors as in one, and nothing broken by a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import pst_dist
import pst_dist.data.pack_work
from pst_dist.config.loading import load_config
from pst_dist.data.shards import ShardSet
from pst_dist.data.sources import load_data
from pst_dist.data.sources.row_work import MOST_LINES
from pst_dist.errors import DataError, InputError
from pst_dist.pipeline import make_shards

ROWS = MOST_LINES + 90


def row(number: int) -> dict:
    return {"question": f"{number} plus 0?", "answer": f"{number}", "rationale": f"{number} stays. é½ \u2028"}


def lines(rows) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


def sources(folder: Path) -> dict:
    """Sources of several formats, with bad, repeated and leaking rows, and a ready-made layout."""
    import pyarrow
    import pyarrow.parquet

    bad = {7: {"question": "?", "rationale": "no answer"}, MOST_LINES + 3: {"answer": "1"}}
    plain = [bad.get(number, row(number % 500)) for number in range(ROWS)]
    (folder / "a.jsonl").write_text(lines(plain) + "\n{broken\n" + lines([row(1000), {"a": float("nan")}]))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row(number) for number in range(2000, 2150)]), folder / "b.parquet"
    )
    (folder / "c.csv").write_text(
        "question,answer,rationale\n" + "".join(f"{n} times 1?,{n},It is {n}.\n" for n in range(90))
    )
    chats = [
        [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"<think>It is {n}.</think>{n}"},
        ]
        for n in range(60)
    ]
    (folder / "d.jsonl").write_text(lines({"messages": chat} for chat in chats))
    names = ["a.jsonl", "b.parquet", "c.csv", "d.jsonl"]
    return {"train": names, "root": str(folder), "test_size": 0.1, "validation_size": 5, "max_bad": "50%"}


def config_of(folder: Path, data: dict, workers: int | None):
    words = [f"output_dir={folder}/run-{workers}", "data.answer_type=number", "shards.samples_per_shard=64"]
    words += [f"shards.workers={workers}"] if workers else []
    return load_config(None, words, keys={"data": data})


def made(folder: Path, data: dict, workers: int | None) -> dict[str, bytes]:
    """Every file of the shards, and the rejects."""
    make_shards(config_of(folder, data, workers))
    found = folder / f"run-{workers}" / "data"
    return {path.name: path.read_bytes() for path in [*(found / "shards").iterdir(), found / "rejects.jsonl"]}


def test_shards_and_rejects_are_the_same_to_the_byte_however_many_processes_made_them(tmp_path, monkeypatch):
    data = sources(tmp_path)
    one = made(tmp_path, data, 1)
    assert len([name for name in one if name.endswith(".tar")]) > 10
    assert one["rejects.jsonl"].count(b"\n") == 4
    assert made(tmp_path, data, 2) == one
    assert made(tmp_path, data, 3) == one
    # A shard with much text is packed while it is read.
    monkeypatch.setattr(pst_dist.data.pack_work, "_MOST_BYTES", 3000)
    assert made(tmp_path, data, 4) == one


def test_another_number_of_processes_makes_no_other_shards(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(row(number) for number in range(40)))
    os.utime(tmp_path / "rows.jsonl", (10**9, 10**9))
    data = {"train": "rows.jsonl", "root": str(tmp_path)}
    first = make_shards(config_of(tmp_path, data, 2))
    (tmp_path / "run-2").rename(tmp_path / "run-1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run-1").rglob("*")}
    assert make_shards(config_of(tmp_path, data, 1)).digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run-1").rglob("*")} == before


def test_a_teachers_completions_reach_the_rows_that_another_process_reads(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(row(number) for number in range(ROWS)))
    texts = [f"It stays {number}. So the answer is (A)" for number in range(ROWS)]
    (tmp_path / "teacher.json").write_text(json.dumps(texts))
    data = {"train": "rows.jsonl", "teacher_completions": "teacher.json", "root": str(tmp_path), "validation_size": 0}
    loaded = load_data(config_of(tmp_path, data, 2))
    found = list(loaded.splits["train"])
    assert [sample.rationales for sample in found] == [(f"It stays {number}.",) for number in range(ROWS)]
    assert [sample.source for sample in found] == [f"rows.jsonl:{number + 1}" for number in range(ROWS)]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (
            lines([row(1), {**row(2), "id": "x"}, {**row(3), "id": "x"}]),
            r"rows.jsonl:3: duplicate id 'x', first used at",
        ),
        (lines([row(1), {**row(2), "answer": "many"}, row(3), row(4)]), r"rows.jsonl:2: answer "),
        (lines([row(1)]) + "\udc80\n" + lines([row(2), row(3)]), r"rows.jsonl:2: byte 1 is not UTF-8"),
        ("\n\n", "the file has no rows"),
    ],
)
def test_errors_name_the_same_place(tmp_path, content, error):
    (tmp_path / "rows.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    told = []
    for workers in (1, 2):
        data = {"train": "rows.jsonl", "root": str(tmp_path)}
        with pytest.raises((DataError, InputError), match=error) as caught:
            load_data(config_of(tmp_path, data, workers))
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_command_that_is_ended_leaves_no_process_and_the_next_one_succeeds(tmp_path, how):
    (tmp_path / "rows.jsonl").write_text(lines(row(number) for number in range(8000)))
    config = {"data": {"train": f"{tmp_path}/rows.jsonl", "answer_type": "number"}, "output_dir": f"{tmp_path}/run-2"}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pst_dist", "shard", f"{tmp_path}/c.yaml", "shards.workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(pst_dist.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE) as child:
        end = time.monotonic() + 60
        while len(found := psutil.Process(child.pid).children()) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
        if how == "interrupted":
            os.killpg(child.pid, signal.SIGINT)  # as a terminal does, for all of its processes
        else:
            child.kill()
        _, said = child.communicate(timeout=60)
    assert len(found) == 2 and child.returncode == (130 if how == "interrupted" else -signal.SIGKILL)
    assert b"Traceback" not in said
    _, alive = psutil.wait_procs(found, timeout=20)
    assert alive == []
    data = {"train": "rows.jsonl", "root": str(tmp_path)}
    make_shards(config_of(tmp_path, data, 2))
    assert sum(info.samples for info in ShardSet.open(tmp_path / "run-2/data/shards").shards()) == 8000
