"""Files compared with their manifest by several ranks: every file once, and every rank learns of a fault."""

import pytest

from pst_dist.distributed.ranks import Ranks
from pst_dist.errors import IntegrityError
from pst_dist.storage.manifest import Manifest, describe_files, sha256_file
from pst_dist.training.checkpoints import verifying
from pst_dist.training.checkpoints.verifying import digests_together, parts_of, verify_together


def test_files_are_dealt_out_once_each_in_parts_of_about_as_many_bytes():
    files = {f"f{k}": {"bytes": size} for k, size in enumerate([10, 900, 30, 500, 400, 20])}
    parts = parts_of(files, 3)
    assert sorted(name for part in parts for name in part) == sorted(files)
    assert [sum(files[name]["bytes"] for name in part) for part in parts] == [900, 500, 460]
    assert parts_of({}, 2) == [[], []]


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name * 1000)
    return tmp_path


@pytest.mark.parametrize(
    ("hosts", "on_each_node", "mine"),
    [(["n0", "n0"], False, 2), (["n0", "n1"], False, 2), (["n0", "n1"], True, 4), (["n0", "n0"], True, 2)],
)
def test_each_node_compares_all_files_only_where_asked(folder, monkeypatch, hosts, on_each_node, mine):
    seen = []
    monkeypatch.setattr(verifying, "gathered", lambda _: hosts)
    monkeypatch.setattr(verifying, "verify_at_once", lambda _d, _m, names, **_: seen.extend(names))
    manifest = Manifest("shards", "f", describe_files(folder, "abcd"))
    verify_together(folder, manifest, Ranks(1, 1, 2), on_each_node=on_each_node)
    assert len(seen) == mine


def test_a_damaged_file_is_named(folder):
    manifest = Manifest("shards", "f", describe_files(folder, "abcd"))
    verify_together(folder, manifest, Ranks())
    (folder / "c").write_text("b" * 1000)
    with pytest.raises(IntegrityError, match="sha256 differs"):
        verify_together(folder, manifest, Ranks())


def test_digests_are_those_of_one_process(folder):
    paths = [folder / name for name in "abcd"]
    assert digests_together(paths, Ranks()) == {path: sha256_file(path) for path in paths}


def test_a_large_file_gives_signs_while_it_is_read(tmp_path):
    path, signs = tmp_path / "large", []
    with path.open("wb") as stream:
        stream.truncate(200 << 20)
    sha256_file(path, on_part=lambda: signs.append(1))
    assert len(signs) == 3
