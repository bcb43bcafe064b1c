"""What `storage` promises: files whole or absent, digests that notice damage, locks that die with their owner."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pst_dist.errors import EnvironmentFault, IntegrityError, LockedError
from pst_dist.storage import atomic, manifest
from pst_dist.storage.atomic import atomic_directory, atomic_path, remove_directory, write_text
from pst_dist.storage.locks import directory_lock, lock_holder
from pst_dist.storage.manifest import (
    Manifest,
    all_files,
    append_line,
    canonical_json,
    describe_files,
    digest_of,
    read_json,
    read_lines,
    read_manifest,
    sha256_file,
    verify_files,
    write_json,
    write_manifest,
)
from pst_dist.storage.mounts import filesystem_of

REPOSITORY = Path(manifest.__file__).parents[2]


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_canonical_json_is_the_same_for_any_order_of_keys():
    assert canonical_json({"b": [1, 2.5], "a": "ä"}) == '{"a":"ä","b":[1,2.5]}'
    assert digest_of({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


def test_canonical_json_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


def test_sha256_of_a_file_over_several_pieces_is_hashlibs(tmp_path):
    content = os.urandom(2 * 2**20 + 17)
    (tmp_path / "f").write_bytes(content)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(path) as partial:
        partial.write_text("new, but")
        raise RuntimeError("half way")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_write_makes_missing_folders(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", {"x": 1})
    assert read_json(tmp_path / "a" / "b" / "c.json") == {"x": 1}


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "stage"
    with atomic_directory(target) as partial:
        (partial / "one").write_text("1")
    with atomic_directory(target) as partial:
        (partial / "two").write_text("2")
        assert os.listdir(target) == ["one"]
    assert os.listdir(target) == ["two"] and os.listdir(tmp_path) == ["stage"]


def test_a_directory_that_fails_half_way_is_not_there(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), atomic_directory(tmp_path / "stage") as partial:
        (partial / "one").write_text("1")
        raise RuntimeError("half way")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_with_the_space_that_is_left(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
from pst_dist.errors import EnvironmentFault
from pst_dist.storage.atomic import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]) / "big.txt", "x" * 100_000)
except EnvironmentFault as error:
    print(error)
"""
    output, _ = run_python(code, tmp_path).communicate()
    assert output.startswith("error[ENVIRONMENT]") and "big.txt" in output and "MiB are free" in output
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(EnvironmentFault, match="something else has that name"):
        write_text(tmp_path / "a" / "b.txt", "text")


def test_json_that_is_damaged_names_its_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(IntegrityError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1, "note": "line\u2028separator"})
    append_line(path, {"step": 2})
    with path.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert [row["step"] for row in read_lines(path)] == [1, 2]
    assert read_lines(tmp_path / "absent.jsonl") == []


def made_manifest(directory: Path) -> Manifest:
    write_text(directory / "a.txt", "alpha")
    write_text(directory / "sub" / "b.txt", "beta")
    files = describe_files(directory, all_files(directory))
    manifest = Manifest("shards", "f" * 64, files, {"counts": {"train": 2}})
    write_manifest(directory, manifest)
    return manifest


def test_a_manifest_comes_back_as_it_was_and_lists_sizes_and_digests(tmp_path):
    manifest = made_manifest(tmp_path)
    assert read_manifest(tmp_path, "shards") == manifest
    assert manifest.files["sub/b.txt"] == {"bytes": 4, "sha256": hashlib.sha256(b"beta").hexdigest()}
    verify_files(tmp_path, manifest)


def test_a_directory_without_a_manifest_is_unfinished(tmp_path):
    assert read_manifest(tmp_path, "shards") is None


@pytest.mark.parametrize(
    ("old", "new"), [('"train": 2', '"train": 3'), ('"bytes": 4', '"bytes": 5'), ("ffff", "fffe"), ('"kind"', '"kinf"')]
)
def test_a_manifest_that_was_edited_is_refused(tmp_path, old, new):
    made_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(IntegrityError, match="not an intact shards manifest"):
        read_manifest(tmp_path, "shards")


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    made_manifest(tmp_path)
    with pytest.raises(IntegrityError, match="embeddings"):
        read_manifest(tmp_path, "embeddings")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_text("alph"), "4 bytes, manifest says 5"),
        (lambda path: path.write_text("alphb"), "sha256 differs"),
    ],
)
def test_every_damage_to_a_file_is_noticed_and_named(tmp_path, damage, message):
    manifest = made_manifest(tmp_path)
    damage(tmp_path / "a.txt")
    with pytest.raises(IntegrityError, match=message) as caught:
        verify_files(tmp_path, manifest)
    assert caught.value.path == tmp_path / "a.txt"


def test_a_lock_refuses_another_process_and_dies_with_its_owner(tmp_path):
    code = """
import sys, time
from pathlib import Path
from pst_dist.storage.locks import directory_lock
with directory_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
    owner = run_python(code, tmp_path)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=f"process {owner.pid}"), directory_lock(tmp_path):
            pass
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with directory_lock(tmp_path):
        pass


def test_a_directory_killed_at_any_moment_is_the_old_or_the_new_one(tmp_path):
    code = """
import sys
from pathlib import Path
from pst_dist.storage.atomic import atomic_directory
from pst_dist.storage.manifest import describe_files, all_files, Manifest, write_manifest
print("go", flush=True)
for generation in range(10**9):
    with atomic_directory(Path(sys.argv[1])) as partial:
        for name in "abcd":
            (partial / name).write_text(f"{generation} " * 2000)
        write_manifest(partial, Manifest("shards", str(generation), describe_files(partial, all_files(partial))))
"""
    target, states = tmp_path / "stage", []
    for attempt in range(6):
        process = run_python(code, target)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        while attempt == 5 and not target.exists():  # on a slow disk nothing may have been whole before
            time.sleep(0.005)
        time.sleep(0.02 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        manifest = read_manifest(target, "shards") if target.exists() else None
        if manifest is not None:
            verify_files(target, manifest)
            assert (target / "a").read_text().split() == [manifest.fingerprint] * 2000
        else:  # killed before the first was whole
            assert not target.exists() and not any(states)
        states.append(manifest and int(manifest.fingerprint))
    assert any(state is not None for state in states)


def test_what_a_killed_writer_left_goes_with_the_next_write_and_nobody_elses(tmp_path):
    code = """
import sys, time
from pathlib import Path
from pst_dist.storage.atomic import atomic_directory, atomic_path
with atomic_directory(Path(sys.argv[1]) / "model") as one, atomic_path(Path(sys.argv[1]) / "note") as two:
    (one / "weights").write_text("half")
    two.write_text("half")
    print("go", flush=True)
    time.sleep(600)
"""
    writers = [run_python(code, tmp_path) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "go\n"
        writers[0].kill()
        writers[0].wait()
        (tmp_path / ".note.mine.partial").write_text("a user's own file")
        foreign = [tmp_path / f".note.{'0' * 16}{number}.partial" for number in ("0001", "0002")]
        for path in foreign:
            path.write_text("of another machine")
        os.utime(foreign[0], (0, 0))
        write_text(tmp_path / "note", "whole")
        with atomic_directory(tmp_path / "model") as partial:
            (partial / "weights").write_text("whole")
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert ".note.mine.partial" in left and foreign[1].name in left and foreign[0].name not in left
        assert sum(name.startswith(".model.") for name in left) == 1, "the living writer's alone"
        assert sum(name.startswith(".note.") for name in left) == 3
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_a_library_that_meets_a_full_disk_is_one_line_too(tmp_path):
    # safetensors' words, as seen on a full tmpfs; it raises a kind of its own, not OSError.
    with pytest.raises(EnvironmentFault, match="No space left") as caught, atomic_directory(tmp_path / "out"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "free some space" in caught.value.remedy and list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="a bug"), atomic_directory(tmp_path / "out"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(("number", "remedy"), [(27, "free some space"), (122, "free some space"), (5, "failing")])
def test_a_library_tells_the_systems_refusal_by_its_number(tmp_path, number, remedy):
    with pytest.raises(EnvironmentFault, match=os.strerror(number)) as caught, atomic_directory(tmp_path / "out"):
        raise RuntimeError(f"Error while serializing: I/O error: some words (os error {number})")
    assert remedy in caught.value.remedy and list(tmp_path.iterdir()) == []


def test_a_failing_disk_and_a_mount_in_the_way_are_one_line(tmp_path):
    for number, words in ((errno.EIO, "failing"), (errno.EBUSY, "mounted")):
        with pytest.raises(EnvironmentFault, match=words), atomic_path(tmp_path / "file"):
            raise OSError(number, os.strerror(number))


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    (elsewhere / "model" / "old").write_text("old")
    (tmp_path / "model").symlink_to(elsewhere / "model")
    (tmp_path / "note").symlink_to(elsewhere / "note")
    write_text(tmp_path / "note", "new")
    with atomic_directory(tmp_path / "model") as partial:
        assert partial.parent == elsewhere, "on the disk that the link was made for"
        (partial / "weights").write_text("new")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "note").is_symlink()
    assert sorted(os.listdir(elsewhere)) == ["model", "note"] and os.listdir(elsewhere / "model") == ["weights"]
    remove_directory(tmp_path / "model")
    assert (tmp_path / "model").is_symlink() and os.listdir(elsewhere / "model") == []
    remove_directory(elsewhere / "model")
    assert os.listdir(elsewhere) == ["note"]


def test_a_directory_that_cannot_take_its_name_leaves_the_old_one_there(tmp_path, monkeypatch):
    with atomic_directory(tmp_path / "stage") as partial:
        (partial / "one").write_text("1")
    replace, asked = os.replace, []

    def refusing(source, target):
        asked.append(target)
        if len(asked) == 2:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        replace(source, target)

    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)  # as on NFS
    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(EnvironmentFault, match="quota"), atomic_directory(tmp_path / "stage") as partial:
        (partial / "two").write_text("2")
    assert os.listdir(tmp_path) == ["stage"] and os.listdir(tmp_path / "stage") == ["one"]


def test_without_an_exchange_of_names_a_directory_is_replaced_too(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    for word in ("one", "two"):
        with atomic_directory(tmp_path / "stage") as partial:
            (partial / word).write_text(word)
    assert os.listdir(tmp_path) == ["stage"] and os.listdir(tmp_path / "stage") == ["two"]


def test_a_directory_that_is_replaced_is_never_missing(tmp_path):
    target, missing, ended = tmp_path / "stage", [], threading.Event()
    target.mkdir()

    def look() -> None:
        while not ended.is_set():
            if not os.path.isdir(target):
                missing.append(1)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(100):
            with atomic_directory(target) as partial:
                (partial / str(number)).touch()
    finally:
        ended.set()
        watcher.join()
    assert not missing and os.listdir(target) == ["99"]


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path):
    """Whoever opened it before it went must not take the old file for the lock."""
    code = """
import sys, time
from pathlib import Path
from pst_dist.storage.locks import directory_lock
with directory_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""
    with directory_lock(tmp_path):
        before = (tmp_path / ".lock").stat().st_ino
        waiting = run_python(code.replace("1]))", "1]), wait_seconds=60)"), tmp_path)
        try:
            time.sleep(1)  # most often it has opened the file by now; the test holds either way
            (tmp_path / ".lock").unlink()
            (tmp_path / ".other").touch()  # so that the number is not used again
            assert waiting.stdout is not None and waiting.stdout.readline() == "locked\n"
            assert (tmp_path / ".lock").stat().st_ino != before
            assert lock_holder(tmp_path) is not None and str(waiting.pid) in str(lock_holder(tmp_path))
        finally:
            waiting.kill()
            waiting.wait()


def test_a_place_where_no_file_can_be_made_is_one_line(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_text(tmp_path / ("a" * 300), "x")


def test_the_file_system_of_a_folder_is_that_of_its_deepest_mount():
    mounts = "overlay / overlay rw 0 0\ntmpfs /tmp tmpfs rw 0 0\nserver:/x /tmp/my\\040disk nfs4 rw 0 0\n"
    assert filesystem_of(Path("/tmp/runs/a"), mounts) == "tmpfs"
    assert filesystem_of(Path("/tmp/my disk/a"), mounts) == "nfs4"
    assert filesystem_of(Path("/tmpfs"), mounts) == "overlay"
