"""What data in object storage promises: the same files as in a folder, fetched once, and one line when it is missing.

The storage is real: folders by `file://`, and an S3 server on loopback, spoken to over HTTP by s3fs.
"""

from __future__ import annotations

import logging
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
from s3_server import forget_stores, s3_server

from pst_dist.config.run_dir import data_settings, expand_arms, fetch_data, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.store import EmbeddingStore
from pst_dist.errors import EnvironmentFault, InputError, IntegrityError, StaleError
from pst_dist.pipeline import make_embeddings, make_shards
from pst_dist.storage import object_store
from pst_dist.storage.manifest import sha256_file
from pst_dist.storage.object_store import RemoteFolder

needs_encoder = pytest.mark.encoder


def config(machine: Path, url: str | None, **settings) -> Config:
    """A run of 24 rows whose output_dir, and so whose mirror, is one machine's."""
    base = {"output_dir": str(machine), "data_dir": url, "data": {"train": "gen:coin_flip?rows=24&seed=1"}}
    return Config.model_validate({**base, "task": "coin_flip", "shards": {"samples_per_shard": 6}, **settings})


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, str]:
    """Digests of shards and embeddings made in a folder."""
    machine = tmp_path_factory.mktemp("reference")
    make_shards(config(machine, None))
    make_embeddings(config(machine, None))
    return digests(machine / "data")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The client of a real S3 server that has the bucket `data`."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server.system


def stored(system, place: str) -> dict[str, str]:
    """Digests of the objects below a place, by their names in it."""
    import hashlib

    return {path[len(place) + 1 :]: hashlib.sha256(system.cat_file(path)).hexdigest() for path in system.find(place)}


def count_encoded(monkeypatch) -> list[int]:
    seen: list[int] = []
    forward = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, texts, **rest: seen.append(len(texts)) or forward(self, texts, **rest)
    )
    return seen


@needs_encoder
def test_a_file_url_holds_what_a_folder_would_and_every_machine_reads_it(reference, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/bucket"
    here, there = config(tmp_path / "here", url), config(tmp_path / "there", url)
    make_shards(here)
    make_embeddings(here)
    assert digests(tmp_path / "bucket") == reference
    assert not list((tmp_path / "bucket").rglob(".*"))
    fetch_data(there)
    run = run_dir(there)
    assert digests(run.data) == reference
    assert EmbeddingStore.open(run.embeddings, ShardSet.open(run.shards)).manifest.extra["rows"] > 0

    encoded = count_encoded(monkeypatch)
    fetched = []
    real = RemoteFolder.fetch
    monkeypatch.setattr(
        RemoteFolder, "fetch", lambda self, name, *rest: fetched.append(name) or real(self, name, *rest)
    )
    make_shards(there)
    make_embeddings(there)
    fetch_data(there)
    assert encoded == [] and set(fetched) == {"manifest.json"}

    path = run.embeddings / "train-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (run.shards / ".train-000000.tar.0123abcd.partial").touch()  # of a fetch that was killed
    fetched.clear()
    fetch_data(there)
    assert digests(run.data) == reference and set(fetched) == {"manifest.json", path.name}
    assert not list(run.shards.glob(".*"))


@needs_encoder
def test_an_s3_bucket_holds_the_same_and_a_second_machine_does_only_what_is_missing(
    s3, reference, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "pst_dist")
    first = config(tmp_path / "first", "s3://data/run")
    make_shards(first)
    make_embeddings(first)
    assert stored(s3, "data/run") == reference

    # As a run leaves it that was killed: no manifest, a file missing, one of another time.
    for name in ("manifest.json", "statistics.safetensors", "train-000001.safetensors"):
        s3.rm_file(f"data/run/embeddings/{name}")
    s3.pipe_file("data/run/embeddings/train-000009.safetensors", b"of a shard that is no more")
    encoded = count_encoded(monkeypatch)
    second = config(tmp_path / "second", "s3://data/run")
    make_embeddings(second)
    assert len(encoded) == 1 and "1 of 5 shards encoded now" in caplog.text
    assert stored(s3, "data/run") == reference
    fetch_data(second)
    assert digests(run_dir(second).data) == reference

    with pytest.raises(StaleError, match="made from different rows or settings"):
        make_shards(config(tmp_path / "first", "s3://data/run", shards={"samples_per_shard": 5}))
    make_shards(config(tmp_path / "third", "s3://data/run", shards={"samples_per_shard": 12}), rebuild=True)
    assert len([name for name in stored(s3, "data/run") if name.endswith(".tar")]) == 2 + 1

    s3.pipe_file("data/run/shards/train-000000.tar", b"somebody else's")
    fourth = config(tmp_path / "fourth", "s3://data/run")
    with pytest.raises(IntegrityError, match=r"s3://data/run/shards/train-000000\.tar: sha256 differs"):
        fetch_data(fourth)
    assert not (run_dir(fourth).shards / "manifest.json").exists()


@needs_encoder
@pytest.mark.ray
@pytest.mark.slow
def test_actors_fetch_and_put_by_themselves_and_the_driver_holds_nothing(s3, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's 15 would leave actors little of a busy machine
    machine = config(tmp_path / "one", "s3://data/actors", embed={"backend": "ray"})
    make_shards(machine)
    shutil.rmtree(run_dir(machine).data)
    make_embeddings(machine)
    assert stored(s3, "data/actors") == reference
    assert not [path for path in run_dir(machine).data.rglob("*.*") if not path.name.startswith(".")]


def test_what_is_not_there_is_one_line_in_seconds(s3, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"s3://nobody/run.*there is no such bucket"):
        RemoteFolder("s3://nobody/run").check()
    with pytest.raises(InputError, match=r"s3://data/empty.*no finished shards found; run `pst shard` first"):
        make_embeddings(config(tmp_path / "m", "s3://data/empty"))
    with pytest.raises(InputError, match=r"nonsense:// is not a known kind of storage"):
        RemoteFolder("nonsense://a/b").check()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(EnvironmentFault, match=r"gs:// needs gcsfs; pip install gcsfs"):
        RemoteFolder("gs://a/b").check()


def test_an_endpoint_that_does_not_answer_or_hangs_is_one_line_in_bounded_time(s3, monkeypatch):
    monkeypatch.setattr(object_store, "_SECONDS", 5.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port, said in ((9, "s3://"), (silent.getsockname()[1], "no answer from the storage within 5 s")):
            forget_stores()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            begin = time.monotonic()
            with pytest.raises(EnvironmentFault, match=said) as caught:
                RemoteFolder("s3://data/run").check()
            assert "\n" not in str(caught.value) and time.monotonic() - begin < 60
    forget_stores()


def test_arms_and_tasks_of_an_array_share_the_url_and_the_mirror(tmp_path):
    whole = config(tmp_path / "run", "s3://data/run/", arms=["pst", "answer_only"])
    runs = [run_dir(arm) for arm in expand_arms(whole)]
    assert {run.data for run in runs} == {tmp_path / "run" / "data"}
    assert {run.remote for run in runs} == {RemoteFolder("s3://data/run")}
    assert data_settings(whole) == {"data_dir": "s3://data/run", "data_cache": str(tmp_path / "run" / "data")}
    assert run_dir(config(tmp_path / "run", "s3://data/run", data_cache="/fast")).shards == Path("/fast/shards")
    assert run_dir(config(tmp_path / "run", "/plain")).remote is None
