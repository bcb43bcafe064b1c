"""One artefact: complete for its inputs, intact to the last byte, published whole, readable by others; and no manifest
may name a file elsewhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pst_dist.errors import EnvironmentFault, IntegrityError, LockedError, PstError
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import atomic_directory, write_text
from pst_dist.storage.json_files import json_text, read_json, read_typed
from pst_dist.storage.leftovers import final_name, remove_leftovers, restore_replaced
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import MANIFEST, REMAKE, Manifest, read_manifest, write_manifest
from pst_dist.storage.names import bad_name
from pst_dist.storage.object_store import RemoteFolder, fetch_folder

SHA = "0" * 64


def made(directory: Path, kind: str = "shards", fingerprint: str = "f") -> Artefact:
    artefact = Artefact(directory, kind)
    with artefact.publish(fingerprint, {"rows": 1}) as draft:
        write_text(draft.path / "a.txt", "alpha\n")
        write_text(draft.path / "sub" / "b.txt", "beta\n")
        draft.extra["more"] = 2
    return artefact


def test_what_is_published_is_finished_for_its_fingerprint_and_no_other(tmp_path):
    artefact = made(tmp_path / "shards")
    manifest = artefact.finished("f")
    assert manifest is not None and manifest.extra == {"rows": 1, "more": 2}
    assert sorted(manifest.files) == ["a.txt", "sub/b.txt"]
    assert artefact.finished("other") is None and artefact.is_intact()
    assert Artefact(tmp_path / "none", "shards").finished() is None


def test_a_publication_that_fails_leaves_the_older_one(tmp_path):
    artefact = made(tmp_path / "shards")
    with pytest.raises(RuntimeError), artefact.publish("g") as draft:
        write_text(draft.path / "a.txt", "half")
        raise RuntimeError
    assert artefact.finished("f") is not None and os.listdir(tmp_path) == ["shards"]


def test_every_byte_of_every_file_and_of_the_manifest_counts(tmp_path):
    """Each byte changed, each cut, and bytes added: all 1,700 ways are noticed."""
    artefact = made(tmp_path / "shards")
    for name in ("a.txt", "sub/b.txt", MANIFEST):
        path = artefact.directory / name
        whole = path.read_bytes()
        assert whole.endswith(b"\n")
        changed = [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in range(len(whole))]
        for content in (*changed, *(whole[:k] for k in range(len(whole))), whole + b"\n", whole + b" ", b" " + whole):
            path.write_bytes(content)
            with pytest.raises(IntegrityError) as caught:
                artefact.verified()
            assert Path(caught.value.path) == path
        path.write_bytes(whole)
    assert artefact.is_intact()


def test_a_manifest_of_an_older_run_still_loads(tmp_path):
    """Written out by hand, as every version so far has written it."""
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / MANIFEST).write_text("""{
  "digest": "9ecf7c4a",
  "extra": {
    "best": 0.25,
    "note": "ä"
  },
  "files": {
    "a.txt": {
      "bytes": 5,
      "sha256": "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8"
    }
  },
  "fingerprint": "f",
  "kind": "export"
}
""")
    said = Manifest("export", "f", json.loads((tmp_path / MANIFEST).read_text())["files"], {"best": 0.25, "note": "ä"})
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace("9ecf7c4a", said.digest))
    assert Artefact(tmp_path, "export").verified("f") == said


HOSTILE = [
    "/etc/passwd",
    "~/.bashrc",
    "../b",
    "a/../../b",
    "a/./b",
    "a//b",
    "",
    ".",
    "..",
    "a/",
    "a\\..\\b",
    "C:\\b",
    "C:b",
    "a\nb",
    "a\x00b",
    "a\x7fb",
    "a\u202eb",
    "a\ud800",
    MANIFEST,
    "Manifest.JSON",
    MANIFEST + "/a",
    "x" * 256,
]


def forged(directory: Path, kind: str, names: list[str]) -> Path:
    """A manifest that is intact in itself and names these files."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(kind, "f", {name: {"bytes": 1, "sha256": SHA} for name in names}, {})
    try:
        write_manifest(directory, manifest)
    except UnicodeEncodeError:  # our writer cannot write half a surrogate pair, but JSON can hold it
        content = {"kind": kind, "fingerprint": "f", "files": manifest.files, "extra": {}, "digest": SHA}
        (directory / MANIFEST).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("kind", sorted(REMAKE))
def test_a_manifest_of_any_kind_that_names_a_file_elsewhere_is_refused(kind, tmp_path):
    for number, name in enumerate(HOSTILE):
        directory = forged(tmp_path / str(number), kind, [name])
        with pytest.raises(IntegrityError, match=f"not an intact {kind} manifest"):
            read_manifest(directory, kind)


@pytest.mark.parametrize(
    "names", [["a", "A"], ["\u00e9", "e\u0301"], ["a", "a/b"], ["A/b", "a"], ["Stra\u00dfe", "STRASSE"]]
)
def test_two_names_of_one_file_are_refused(names, tmp_path):
    with pytest.raises(IntegrityError, match=r"the same file|both a file and the folder"):
        read_manifest(forged(tmp_path / "x", "export", names), "export")


def test_the_names_that_we_and_transformers_write_are_good():
    for name in ("train-000000.tar", "model-00001-of-00002.safetensors", "1_Pooling/config.json", ".gitattributes"):
        assert bad_name(name) is None


@pytest.mark.parametrize("kind", ["shards", "embeddings"])
def test_a_hostile_manifest_in_object_storage_writes_nothing_here(kind, tmp_path):
    store, mirror, victim = tmp_path / "store", tmp_path / "here" / "mirror", tmp_path / "victim"
    (tmp_path / "here").mkdir()
    victim.write_text("mine")
    for name in ("../../victim", str(victim), "../victim", "a/../../../victim"):
        forged(store / kind, kind, [name])
        with pytest.raises(IntegrityError, match="not an intact"):
            fetch_folder(RemoteFolder(f"file://{store / kind}"), mirror, kind)
        assert victim.read_text() == "mine"
        assert {path.name for path in (tmp_path / "here").rglob("*") if path.is_file()} <= {".mirror.fetch"}


def test_a_shard_table_may_not_name_a_file_elsewhere(tmp_path):
    """Names in the table become paths too, of embedding files as well."""
    from pst_dist.data.sample import SCHEMA_VERSION
    from pst_dist.data.shards import ShardSet

    row = {"name": "../../evil.tar", "split": "train", "samples": 1, "bytes": 1, "sha256": SHA, "rationales": 1}
    extra = {"shards": [row], "counts": {"train": 1}, "schema_version": SCHEMA_VERSION}
    with pytest.raises(IntegrityError, match=r"evil\.tar"):
        ShardSet(tmp_path, Manifest("shards", "f", {}, extra))


@pytest.mark.parametrize(
    "change",
    [
        {"shards": None},
        {"shards": [1]},
        {"shards": [{"name": "train-000000.tar"}]},
        {"counts": [1]},
        {"counts": {"train": "1"}},
        {"schema_version": None},
    ],
)
def test_a_shard_table_of_other_types_is_one_line(change, tmp_path):
    from pst_dist.data.sample import SCHEMA_VERSION
    from pst_dist.data.shards import ShardSet

    extra = {"shards": [], "counts": {}, "schema_version": SCHEMA_VERSION} | change
    with pytest.raises(IntegrityError):
        ShardSet(tmp_path, Manifest("shards", "f", {}, extra))


UNEXPECTED = [
    b"",
    b"\xff",
    b"null",
    b"[]",
    b"{}",
    b"5",
    b'"text"',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
    b'{"kind": 1e999}',
    b'{"kind": NaN}',
    b'{"kind": "export", "fingerprint": 5, "files": [], "extra": null, "digest": {}}',
    b'{"kind": "export", "fingerprint": "", "files": {"a": 5}, "extra": {}, "digest": ""}',
    b'{"kind": "\\ud800", "fingerprint": "", "files": {}, "extra": {}, "digest": ""}',
]


@pytest.mark.parametrize("number", range(len(UNEXPECTED)))
def test_an_unexpected_manifest_is_one_line_that_names_it(number, tmp_path):
    (tmp_path / MANIFEST).write_bytes(UNEXPECTED[number])
    with pytest.raises(IntegrityError) as caught:
        Artefact(tmp_path, "export").manifest()
    assert caught.value.path == tmp_path / MANIFEST and len(str(caught.value)) < 600
    assert not Artefact(tmp_path, "export").is_intact()


@dataclass(frozen=True)
class Record:
    step: int
    name: str
    value: float | None = None
    rows: list[list[int]] = field(default_factory=list)


def test_a_typed_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json_text({"step": 3, "name": "a", "value": 1, "rows": [[1, 2]]}))
    assert read_typed(path, Record) == Record(3, "a", 1.0, [[1, 2]])
    path.write_text('{"step": 3, "name": "a"}')  # of an older version, without the newer fields
    assert read_typed(path, Record) == Record(3, "a")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"step": 3}', "name"),
        ('{"step": "3", "name": "a"}', "step"),
        ('{"step": 3.5, "name": "a"}', "step"),
        ('{"step": true, "name": "a"}', "step"),
        ('{"step": 3, "name": "a", "later": 1}', "later"),
        ('{"step": 3, "name": "a", "value": 1e999}', "1e999"),
        ('{"step": 3, "name": "a", "value": Infinity}', "Infinity"),
        ('{"step": 3, "name": "a", "rows": [[1, "2"]]}', "rows.0.1"),
        ('{"step": 3, "name": null}', "name"),
        ("[]", ""),
        ("[" * 50_000, "nested too deeply"),
    ],
)
def test_a_typed_file_with_anything_unexpected_names_the_field(content, named, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"r\.json") as caught:
        read_typed(tmp_path / "r.json", Record)
    assert named in caught.value.what


def test_a_folder_or_a_missing_file_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "none"):
        with pytest.raises(IntegrityError):
            read_json(path)


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_published_files_have_the_mode_of_any_new_file(tmp_path, umask):
    """safetensors writes 0600 whatever the umask: nobody else could load the weights."""
    with atomic_directory(tmp_path / "model") as partial:
        private = partial / "weights"
        private.write_text("x")
        private.chmod(0o600)
        (partial / "sub").mkdir(mode=0o700)
        (partial / "sub" / "open").write_text("x")
        (partial / "sub" / "open").chmod(0o777)
    write_text(tmp_path / "note", "x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"model": 0o750, "weights": 0o640, "sub": 0o750, "open": 0o640, "note": 0o640}


def test_a_student_can_be_loaded_by_the_group(tmp_path, umask):
    from safetensors.numpy import save_file

    with Artefact(tmp_path / "best", "student").publish("f") as draft:
        save_file({}, draft.path / "model.safetensors")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "best").iterdir()} == {0o640}


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that another user can reach and not write to; see `as_nobody`."""
    if os.getuid() != 0:
        pytest.skip("needs to become another user")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(work: Callable[[], object]) -> str:
    """What another user is told: "ok", or the line of the error."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            work()
            sender.send("ok")
        except PstError as error:
            sender.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return str(receiver.recv())


def test_a_colleagues_finished_directory_is_recognised_and_an_unreadable_one_is_one_line(shared):
    artefact = made(shared / "shards")

    def recognise() -> None:
        assert artefact.finished("f") is not None

    assert as_nobody(recognise) == "ok"
    (artefact.directory / "a.txt").chmod(0o600)
    said = as_nobody(recognise)
    assert said.startswith("error[ENVIRONMENT]") and "a.txt: cannot be read: Permission denied" in said


def test_a_colleagues_lock_file_serves_and_one_that_cannot_be_opened_is_named_with_its_mode(shared):
    def lock() -> None:
        with directory_lock(shared):
            pass

    said = as_nobody(lock)
    assert f"{shared}/.lock: cannot open the lock file: Permission denied" in said and "directory is 0755" in said
    with directory_lock(shared):
        assert f"in use by process {os.getpid()}" in as_nobody(lock), "it may be read, so it is taken or refused"
    assert as_nobody(lock) == "ok"
    (shared / ".lock").chmod(0o600)
    assert "its mode is 0600" in as_nobody(lock)


def test_a_holder_that_may_not_sign_the_lock_is_not_mistaken_for_an_earlier_one(tmp_path):
    with directory_lock(tmp_path):
        (tmp_path / ".lock").write_text(f"process {2**22 + 1} on {os.uname().nodename} since 2020-01-01 00:00:00 UTC")
        code = "import sys; from pathlib import Path; from pst_dist.storage.locks import directory_lock\n"
        code += "with directory_lock(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert LockedError.__name__ in done.stderr and "in use by another process" in done.stderr


def test_temporary_names_are_told_from_others():
    assert final_name(f".model.{'0' * 20}.partial") == "model"
    assert final_name(".checkpoint-8.partial") == "checkpoint-8"
    assert final_name(".best.0123abcd.replaced") == "best"
    for name in ("model", ".model", "model.partial", ".partial", ".model.partial.txt"):
        assert final_name(name) is None


def test_with_the_lock_every_leftover_of_a_pattern_goes_and_nothing_else(tmp_path):
    leftovers = [".checkpoint-8.partial", f".checkpoint-9.{'0' * 20}.replaced", ".checkpoint-7.0a.partial"]
    others = [".best.0a.partial", "checkpoint-8", ".checkpoint-8", ".lock"]
    for name in (*leftovers, *others):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "checkpoint-*", locked=True)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    remove_leftovers(tmp_path / "none")


def test_what_was_being_replaced_gets_its_name_back(tmp_path):
    (tmp_path / f".shards.{'0' * 20}.replaced").mkdir()
    assert restore_replaced(tmp_path / "shards") and os.listdir(tmp_path) == ["shards"]
    assert not restore_replaced(tmp_path / "shards") and not restore_replaced(tmp_path / "none" / "x")


def test_an_error_of_reading_names_the_way_out(tmp_path):
    with pytest.raises(PstError) as caught:
        Artefact(tmp_path / ("x" * 300), "shards").manifest()
    assert isinstance(caught.value, EnvironmentFault) and re.search("cannot be read", str(caught.value))
