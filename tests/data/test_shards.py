"""What shards promise: equal rows give equal bytes, others can read them, damage is noticed, kills leave them whole."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pst_dist
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_tar import write_members, write_shard
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet, read_shard
from pst_dist.errors import DataError, InputError, IntegrityError, LockedError, StaleError
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import sha256_file

REPOSITORY = Path(pst_dist.__file__).parents[1]


def sample(number: int, rationales: int = 1, **fields: str) -> ReasoningSample:
    return ReasoningSample(
        id=fields.get("id", f"row-{number}"),
        question=fields.get("question", f"What is {number} plus {number}? é½ \u2028 'x'"),
        answer=str(2 * number),
        rationales=tuple(f"Adding {number} to itself, way {k}." for k in range(rationales)),
        answer_type="number",
        source=f"rows.jsonl:{number}",
    )


SPLITS = {
    "train": [sample(i, rationales=i % 3) for i in range(10)],
    "validation": [],
    "test": [sample(i) for i in range(100, 103)],
}


def make(directory: Path, splits=SPLITS, fingerprint: str = "one", **settings) -> ShardSet:
    write_shards(splits, directory, samples_per_shard=4, fingerprint=fingerprint, extra={"task": "sums"}, **settings)
    return ShardSet.open(directory)


def state(directory: Path) -> dict[str, tuple[int, str]]:
    """Inode and sha256 of every file: the same only when nothing was written."""
    return {path.name: (path.stat().st_ino, sha256_file(path)) for path in directory.iterdir()}


def test_rows_come_back_in_order_and_unchanged(tmp_path):
    shards = make(tmp_path / "shards")
    assert [info.name for info in shards.shards("train")] == [f"train-{k:06d}.tar" for k in range(3)]
    assert [info.samples for info in shards.shards("train")] == [4, 4, 2]
    assert [s for info in shards.shards("train") for s in read_shard(shards.directory / info.name)] == SPLITS["train"]
    assert list(shards.split("train")) == SPLITS["train"]
    assert list(shards.split("test")) == SPLITS["test"]
    assert shards.manifest.extra["task"] == "sums"
    assert shards.manifest.extra["counts"] == {"train": 10, "validation": 0, "test": 3}


def test_an_empty_split_has_no_shard_and_no_rows_and_an_unknown_one_is_refused(tmp_path):
    shards = make(tmp_path / "shards")
    assert shards.shards("validation") == [] and len(shards.split("validation")) == 0
    assert not list(shards.directory.glob("validation*"))
    with pytest.raises(InputError, match="no split 'dev'; available splits: test, train, validation"):
        shards.split("dev")


def test_any_row_is_one_read_away(tmp_path):
    reader = make(tmp_path / "shards").split("train")
    order = list(range(10))
    random.Random(1).shuffle(order)
    assert [reader[i] for i in order] == [SPLITS["train"][i] for i in order]
    assert reader[-1] == SPLITS["train"][-1] and reader[2:5] == SPLITS["train"][2:5]
    assert reader.ids == [f"row-{i}" for i in range(10)]
    with pytest.raises(IndexError):
        reader[10]


def test_a_reader_works_in_forked_and_in_spawned_processes(tmp_path):
    reader = make(tmp_path / "shards").split("train")
    assert reader[0].id == "row-0"  # a descriptor is open now
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(reader.__getitem__, range(10)) == SPLITS["train"]
    assert pickle.loads(pickle.dumps(reader))[7] == SPLITS["train"][7]


def test_the_keys_of_rationales_are_known_without_reading_samples(tmp_path):
    shards = make(tmp_path / "shards")
    keys = [key for info in shards.shards("train") for key in shards.rationale_keys(info)]
    assert keys == [(f"row-{i}", k) for i in range(10) for k in range(i % 3)]
    counts = [shards.rationale_count(info) for info in shards.shards("train")]
    assert counts == [0 + 1 + 2 + 0, 1 + 2 + 0 + 1, 2 + 0]
    older = [dataclasses.replace(info, rationales=None) for info in shards.shards("train")]
    assert [shards.rationale_count(info) for info in older] == counts


def test_plain_webdataset_reads_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    shards = make(tmp_path / "shards")
    urls = [str(shards.directory / info.name) for info in shards.shards("train")]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [row["__key__"] for row in rows] == [s.id for s in SPLITS["train"]]
    assert [row["json"] for row in rows] == [s.to_json() for s in SPLITS["train"]]


def test_plain_tar_lists_the_shards(tmp_path):
    shards = make(tmp_path / "shards", {"train": [sample(1), sample(2, id="L" * 120)]})
    listing = subprocess.run(
        ["tar", "tf", shards.directory / "train-000000.tar"], capture_output=True, text=True, check=True
    )
    assert listing.stdout.split() == ["row-1.json", "L" * 120 + ".json"]


def test_the_wids_listing_names_every_tar_with_its_size(tmp_path):
    shards = make(tmp_path / "shards")
    listing = json.loads((shards.directory / "train.wids.json").read_text())
    assert (listing["__kind__"], listing["wids_version"]) == ("wids-shard-index-v1", 1)
    for entry, info in zip(listing["shardlist"], shards.shards("train"), strict=True):
        md5 = subprocess.run(["md5sum", shards.directory / info.name], capture_output=True, text=True, check=True)
        assert (entry["url"], entry["nsamples"]) == (info.name, info.samples)
        assert entry["filesize"] == (shards.directory / info.name).stat().st_size
        assert entry["md5sum"] == md5.stdout.split()[0]


BUILD = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[2], 8))
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
rows = [
    ReasoningSample(id=f"r{i}", question=f"q {i} é", answer="x", rationales=("because",) * (i % 3)) for i in range(9)
]
write_shards({"train": rows, "test": [ReasoningSample(id="t", question="q", answer="y")]}, Path(sys.argv[1]),
             samples_per_shard=4, fingerprint="f", extra={"b": 1, "a": 2})
"""


def test_equal_rows_give_equal_bytes_whatever_the_process_and_its_settings(tmp_path):
    digests = []
    settings_of = [("UTC", "022", "0"), ("Asia/Kolkata", "077", "4711")]
    for number, (zone, mask, seed) in enumerate(settings_of):
        directory = tmp_path / str(number) / "shards"
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-c", BUILD, directory, mask], env=environment, check=True)
        digests.append({path.name: sha256_file(path) for path in directory.iterdir()})
        time.sleep(1.1 * (number == 0))  # so that a clock in the bytes would show
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3 * 2 + 1 * 2 + 2 + 1  # tars and indexes of both splits, two listings, the manifest


def test_the_same_rows_again_are_a_no_op(tmp_path):
    shards = make(tmp_path / "shards")
    before = state(shards.directory)
    again = make(tmp_path / "shards")
    assert state(shards.directory) == before and again.manifest == shards.manifest


def test_other_rows_are_refused_and_rebuilt_when_asked(tmp_path):
    before = state(make(tmp_path / "shards").directory)
    other = {"train": [sample(1)]}
    with pytest.raises(StaleError, match="were made from different rows or settings; run again with --rebuild"):
        make(tmp_path / "shards", other, fingerprint="two")
    assert state(tmp_path / "shards") == before
    assert list(make(tmp_path / "shards", other, fingerprint="two", rebuild=True).split("train")) == other["train"]
    assert sorted(os.listdir(tmp_path)) == [".shards.lock", ".shards.verified.json", "shards"]


def test_another_shard_size_is_stale_too(tmp_path):
    make(tmp_path / "shards")
    with pytest.raises(StaleError):
        write_shards(SPLITS, tmp_path / "shards", samples_per_shard=5, fingerprint="one", extra={})


def test_damaged_shards_are_refused_by_a_reader_and_mended_by_the_writer(tmp_path, caplog):
    shards = make(tmp_path / "shards")
    digest = shards.manifest.digest
    path = shards.directory / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"itself", b"itselv"))
    with pytest.raises(IntegrityError, match=r"train-000001\.tar.*sha256 differs"):
        ShardSet.open(tmp_path / "shards")
    assert make(tmp_path / "shards").manifest.digest == digest
    assert "damaged" in caplog.text


def test_nothing_to_open_says_which_command_makes_it(tmp_path):
    with pytest.raises(InputError, match="run `pst shard` first"):
        ShardSet.open(tmp_path / "shards")


def test_a_folder_with_other_peoples_files_is_left_alone(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.tex").write_text("years of work")
    for rebuild in (False, True):
        with pytest.raises(InputError, match=r"thesis\.tex is not part of a shard directory"):
            make(tmp_path / "shards", rebuild=rebuild)
    assert (tmp_path / "shards" / "thesis.tex").read_text() == "years of work"


def test_two_writers_do_not_meet(tmp_path):
    with directory_lock(tmp_path / ".shards.lock"), pytest.raises(LockedError):
        make(tmp_path / "shards")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [sample(1), sample(1)]}, "duplicate id 'row-1'"),
        ({"train": [sample(1)], "test": [sample(1)]}, "duplicate id 'row-1', in train and test"),
        ({"train": []}, "no rows"),
        ({"../train": [sample(1)]}, "split name"),
        ({"train": [sample(1, question="bad \ud800 text")]}, "lone surrogate"),
    ],
)
def test_rows_that_cannot_be_packed_are_refused_and_leave_nothing(tmp_path, splits, message):
    with pytest.raises(DataError, match=message):
        make(tmp_path / "shards", splits)
    assert not (tmp_path / "shards").exists()
    assert [name for name in os.listdir(tmp_path) if name != ".shards.lock"] == []


def member(name: str, content: bytes | None = None, kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = "/etc/passwd"
    if content is None:
        content = json.dumps(sample(1, id="a").to_json()).encode()
    content = content if info.isreg() else b""
    info.size = len(content)
    return info, content


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


GOOD = json.dumps(sample(1, id="a").to_json())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("../a.json")], "is not <id>.json"),
        ([member("/a.json")], "is not <id>.json"),
        ([member("C:\\a.json")], "is not <id>.json"),
        ([member("dir/a.json")], "is not <id>.json"),
        ([member("a.b.json")], "is not <id>.json"),
        ([member("a.JSON")], "is not <id>.json"),
        ([member("a.pyd")], "is not <id>.json"),
        ([member("a\udcff.json")], "is not <id>.json"),
        ([member("a.json", kind=tarfile.SYMTYPE)], "not a plain file"),
        ([member("a.json", kind=tarfile.LNKTYPE)], "not a plain file"),
        ([member("a.json", kind=tarfile.FIFOTYPE)], "not a plain file"),
        ([member("a.json", kind=tarfile.CHRTYPE)], "not a plain file"),
        ([member("a", kind=tarfile.DIRTYPE)], "not a plain file"),
        ([member("a.json"), member("a.json")], "duplicate member"),
        ([member("b.json")], "contains the sample 'a'"),
        ([], "has no samples"),
        ([member("a.json", GOOD[:-5].encode())], r"t\.tar!a\.json: not a valid sample"),
        ([member("a.json", b"[1, 2]")], "not a valid sample"),
        ([member("a.json", b"\xff\xfe")], "not a valid sample"),
        ([member("a.json", GOOD.replace('"question"', '"answer"', 1).encode())], "duplicate key"),
        ([member("a.json", GOOD.replace('"2"', "2").encode())], "a value is not text"),
        ([member("a.json", GOOD.replace('"2"', "NaN").encode())], "NaN is not JSON"),
        ([member("a.json", GOOD.replace('"2"', '" "').encode())], "answer is empty"),
        ([member("a.json", GOOD.replace('"choices": []', '"choices": "AB"').encode())], "not lists"),
        (
            [member("a.json", GOOD.replace('"choices": []', '"choices": [], "more": "x"').encode())],
            "not a valid sample",
        ),
        ([member("a.json", b"[" * 100_000)], "not a valid sample"),
    ],
)
def test_a_tar_that_our_writer_would_not_make_is_refused_by_name(tmp_path, members, message):
    path = tar_of(tmp_path / "t.tar", *members, format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(IntegrityError, match=message) as caught:
        read_shard(path)
    assert "t.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_extension_headers_are_refused_but_for_a_long_name(tmp_path):
    info, content = member("a.json")
    info.pax_headers = {"comment": "hidden"}
    with pytest.raises(IntegrityError, match="not a plain file"):
        read_shard(tar_of(tmp_path / "comment.tar", (info, content), format=tarfile.PAX_FORMAT))
    with pytest.raises(IntegrityError, match="not a plain file"):
        headers = {"comment": "for all"}
        read_shard(tar_of(tmp_path / "g.tar", member("a.json"), format=tarfile.PAX_FORMAT, pax_headers=headers))
    long = [sample(1, id="x" * 120)]
    write_shard(tmp_path / "long.tar", long)
    assert read_shard(tmp_path / "long.tar") == long


def test_a_tar_has_the_bytes_that_webdataset_writes(tmp_path):
    """Names of up to 100 bytes are in the header, longer ones in a record before it; contents around one block."""
    from webdataset import TarWriter

    names = [1, 90, 95, 96, 110, 120]
    sizes = [1, 511, 512, 513, 3000]
    for count in (0, 1, 9, 30):
        members = [(f"{k}-".ljust(names[k % 6], "x"), b"y" * sizes[k % 5], k) for k in range(count)]
        with (
            (tmp_path / "theirs.tar").open("wb") as stream,
            TarWriter(stream, user="pst", group="pst", mode=0o444, mtime=0, encoder=False) as tar,
        ):
            for name, content, _ in members:
                tar.write({"__key__": name, "json": content})
        written = write_members(tmp_path / "ours.tar", members)
        ours = (tmp_path / "ours.tar").read_bytes()
        assert ours == (tmp_path / "theirs.tar").read_bytes()
        assert (written.bytes, written.sha256) == (len(ours), sha256_file(tmp_path / "ours.tar"))
        assert written.md5 == hashlib.md5(ours).hexdigest()
        places = zip(written.index.offsets, written.index.sizes, strict=True)
        assert [ours[start : start + size] for start, size in places] == [content for _, content, _ in members]
        assert written.index.rationales == list(range(count))


def test_two_samples_of_one_name_are_refused_while_they_are_written(tmp_path):
    with pytest.raises(DataError, match="two samples have the id 'row-1'"):
        write_shard(tmp_path / "t.tar", [sample(1), sample(2), sample(1)])


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b\x08rest", b"<html>404</html>", b"version https://git-lfs", b"\0" * 10240]
)
def test_what_is_no_tar_at_all_is_said_to_be_none(tmp_path, content):
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"t\.tar"):
        read_shard(tmp_path / "t.tar")


def test_a_tar_cut_at_any_byte_is_noticed_even_without_a_manifest(tmp_path):
    write_shard(tmp_path / "whole.tar", SPLITS["train"][:3])
    whole = (tmp_path / "whole.tar").read_bytes()
    assert len(read_shard(tmp_path / "whole.tar")) == 3
    used = len(whole.rstrip(b"\0"))
    for cut in {*range(0, len(whole), 97), *range(0, used, 512), used}:
        if cut >= -(-used // 512) * 512 + 1024:
            continue  # two closing blocks are there: the rest is tar's padding to a full record
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(IntegrityError):
            read_shard(tmp_path / "cut.tar")


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_changed_byte_of_any_file_is_noticed(tmp_path_factory, position, mask):
    base = tmp_path_factory.getbasetemp() / "flips"
    directory = base / "shards"
    if not directory.exists():
        make(directory)
    files = sorted(directory.iterdir())
    path = files[int(position * 1000) % len(files)]
    original = path.read_bytes()
    changed = bytearray(original)
    changed[int(position * len(original))] ^= mask
    path.write_bytes(changed)
    try:
        with pytest.raises(IntegrityError):
            ShardSet.open(directory)
    finally:
        path.write_bytes(original)


def test_a_shard_exchanged_while_in_use_is_noticed(tmp_path):
    shards = make(tmp_path / "shards")
    reader = shards.split("train")
    path = shards.directory / "train-000001.tar"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError, match="cannot read"):
        reader[5]
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    for _ in range(2):  # a caller that tries again is refused again
        with pytest.raises(IntegrityError, match="exchanged"):
            reader[5]


def rebuild_forever(directory: Path) -> None:
    for generation in itertools.count():
        rows = [ReasoningSample(id=f"r{i}", question=f"q{i}", answer=str(generation)) for i in range(12)]
        fingerprint = str(generation)
        write_shards({"train": rows}, directory, samples_per_shard=3, fingerprint=fingerprint, extra={}, rebuild=True)


def test_a_writer_killed_at_any_moment_leaves_old_shards_or_new_ones(tmp_path):
    directory, seen = tmp_path / "shards", set()
    make(tmp_path / "warm-up")  # imports what the writer needs, so that the children write from their first instant
    draw = random.Random(0)
    for _ in range(25):
        process = multiprocessing.get_context("fork").Process(target=rebuild_forever, args=(directory,))
        process.start()
        time.sleep(draw.uniform(0.005, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if directory.exists():
            rows = list(ShardSet.open(directory).split("train"))
            assert [row.id for row in rows] == [f"r{i}" for i in range(12)]
            assert len({row.answer for row in rows}) == 1
            seen.add(rows[0].answer)
    assert seen
    write_shards({"train": [sample(1)]}, directory, samples_per_shard=3, fingerprint="end", extra={}, rebuild=True)
    # The note on what was compared stays; temporary files do not.
    assert {path.name for path in tmp_path.glob(".shards.*.*")} <= {".shards.verified.json"}


def test_old_shards_come_back_when_a_rebuild_died_between_its_two_renames(tmp_path):
    before = make(tmp_path / "shards").manifest
    (tmp_path / "shards").rename(tmp_path / ".shards.0123abcd.replaced")
    assert make(tmp_path / "shards").manifest == before
    assert sorted(os.listdir(tmp_path)) == [".shards.lock", ".shards.verified.json", "shards"]


@pytest.mark.parametrize(
    ("column", "value"), [("sizes", 2**62), ("offsets", 2**62), ("offsets", -512), ("sizes", -1), ("sizes", "9")]
)
def test_an_index_that_points_outside_its_tar_is_refused_before_anything_is_read(tmp_path, column, value):
    write_shards(SPLITS, tmp_path / "shards", samples_per_shard=4, fingerprint="f" * 64, extra={})
    path = tmp_path / "shards" / "train-000001.index.json"
    index = json.loads(path.read_text())
    index[column][2] = value
    path.write_text(json.dumps(index))
    shards = ShardSet.open(tmp_path / "shards", verify=False)
    with pytest.raises(IntegrityError, match=r"index points outside its tar of|should be a valid integer"):
        shards.split("train")


def test_turns_are_read_back_and_a_conversation_without_a_question_is_refused(tmp_path):
    turns = (("system", "Be brief."), ("user", "2 + 3?"), ("assistant", "5"), ("user", "And 4?"))
    told = ReasoningSample(id="a", question="Be brief. And 4?", answer="9", turns=turns)
    plain = ReasoningSample(id="b", question="2?", answer="2")
    write_shards({"train": [told, plain]}, tmp_path / "s", samples_per_shard=2, fingerprint="f" * 64, extra={})
    assert list(ShardSet.open(tmp_path / "s").split("train")) == [told, plain]
    assert "turns" not in plain.to_json(), "as older versions wrote it"
    for odd in (turns[:-1], (("tool", "x"), *turns), (("user", " "),)):
        with pytest.raises(DataError, match="not a conversation that ends with a question"):
            ReasoningSample(id="a", question="q", answer="9", turns=odd)
    with pytest.raises(DataError, match="not a valid sample"):
        ReasoningSample.from_json({**told.to_json(), "turns": [["user"]]})
