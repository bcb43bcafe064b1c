"""What is not a regular file is refused at once wherever a user may name one; sizes in files are not trusted."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config, StudentConfig, TrainConfig
from pst_dist.config.yaml_text import read_yaml
from pst_dist.config.zero import zero_stage
from pst_dist.data.shard_tar import read_shard
from pst_dist.data.sources import survey
from pst_dist.diagnostics.machine.network import hostfile
from pst_dist.distributed.hostfile import read_hostfile
from pst_dist.errors import ConfigError, InputError, PstError
from pst_dist.storage.regular_files import open_regular, read_regular, read_regular_text, safetensors_header
from pst_dist.training.engines.deepspeed_config import deepspeed_settings
from pst_dist.training.memory.model_size import shape_of

KINDS = ("pipe", "folder", "loop", "dangling", "socket")


@pytest.fixture(autouse=True)
def no_endless_wait():
    """A reader that waits for a pipe's writer fails here instead of stopping the tests."""

    def expired(signum, frame):
        raise AssertionError("a reader waited")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _make(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to(path.name + "-none")
    else:
        place = os.getcwd()
        os.chdir(path.parent)  # a socket's address has room for 100 characters
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(place)
    return path


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("pipe", r"is a pipe \(FIFO\), not a regular file"),
        ("folder", "is a folder, not a regular file"),
        ("socket", "is a socket, not a regular file"),
        ("loop", "symbolic links form a loop"),
        ("dangling", "no such file"),
    ],
)
def test_every_other_kind_is_named(tmp_path, kind, what):
    path = _make(tmp_path / "it", kind)
    (tmp_path / "link").symlink_to(path)
    for name in ("it", "link"):
        with pytest.raises(InputError, match=what):
            open_regular(tmp_path / name)
    with pytest.raises(ConfigError, match=what):
        read_regular(path, kind=ConfigError)


def test_a_link_to_a_regular_file_is_followed_and_a_device_is_never_opened(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "link").symlink_to("file")
    assert read_regular_text(tmp_path / "link") == "text"
    with pytest.raises(InputError, match="is larger than 3 bytes"):
        read_regular(tmp_path / "file", 3)
    with pytest.raises(InputError, match="cannot open it"):
        read_regular(tmp_path / "nul\0name")
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(InputError, match="byte 1 is not UTF-8"):
        read_regular_text(tmp_path / "file")
    real = os.stat

    class _Device:
        st_mode = 0o020666

    monkeypatch.setattr("pst_dist.storage.regular_files.os.stat", lambda path: _Device())
    monkeypatch.setattr("pst_dist.storage.regular_files.os.open", lambda *_: pytest.fail("opened"))
    with pytest.raises(InputError, match="is a device"):
        open_regular(tmp_path / "file")
    monkeypatch.setattr("pst_dist.storage.regular_files.os.stat", real)


def _rows(root: Path, **data) -> object:
    return survey(Config.model_validate({"arm": "answer_only", "data": {"root": str(root), **data}}))


READERS = {
    "rows.jsonl": lambda path: _rows(path.parent, train=path.name),
    "rows.jsonl.gz": lambda path: _rows(path.parent, train=path.name),
    "rows.parquet": lambda path: _rows(path.parent, train=path.name),
    "test.csv": lambda path: _rows(path.parent, train="good.jsonl", test=path.name),
    "split.json": lambda path: _rows(path.parent, train="good.jsonl", split_file=path.name),
    "teacher.json": lambda path: _rows(path.parent, train="good.jsonl", teacher_completions=path.name),
    "config.yaml": lambda path: load_config(str(path)),
    "overlay.yaml": lambda path: load_config("demo", [f"+{path}"]),
    "zero.json": lambda path: deepspeed_settings(TrainConfig(deepspeed=str(path)), 1),
    "stage.json": lambda path: zero_stage(str(path)),
    "hosts": read_hostfile,
    "shard.tar": read_shard,
    "model/config.json": lambda path: shape_of(StudentConfig(model_name_or_path=str(path.parent)), max_length=8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_a_path_that_a_user_names_must_be_a_regular_file(tmp_path, name, kind):
    (tmp_path / "good.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    with pytest.raises(PstError):
        READERS[name](_make(tmp_path / name, kind))


def test_a_hostfile_that_is_a_pipe_is_a_finding_of_the_doctor(tmp_path):
    (found,) = hostfile(_make(tmp_path / "hosts", "pipe"), 1)
    assert "cannot be read" in str(found)


def test_a_pipe_in_a_saved_dataset_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(tmp_path / "saved")
    _make(tmp_path / "saved" / "more.arrow", "pipe")
    with pytest.raises(InputError, match=r"more\.arrow: is a pipe"):
        _rows(tmp_path, train="saved")


def test_a_header_longer_than_its_file_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for start, content in ((2**63, b"{}"), (3, b"{}"), (2**40, b""), (2, b"[]"), (2, b"{x")):
        path.write_bytes(start.to_bytes(8, "little") + content)
        with pytest.raises(InputError, match="not safetensors"):
            safetensors_header(path)
    path.write_bytes(b"\1")
    with pytest.raises(InputError, match="not safetensors"):
        safetensors_header(path)
    path.write_bytes((16).to_bytes(8, "little") + b'{"a": {"x": 1}} ' + b"data")
    assert safetensors_header(path) == ({"a": {"x": 1}}, 24)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40)),
            "100,000",
        ),
        ("".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(9)), "100,000"),
        ("a: &a [*a]\n", "an alias refers to itself"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested deeper than 64"),
        ("a: !!int x\n", "a value cannot be read"),
        ("a: " + "9" * 5000 + "\n", "a value cannot be read"),
    ],
)
def test_a_yaml_file_may_not_grow_without_end(tmp_path, text, what):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_yaml(path)
