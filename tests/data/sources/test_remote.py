"""Rows in object storage and on web servers: the rows of the same file here, fetched once, and one line when it fails.

The servers are real: S3 over HTTP on loopback, and a web server.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import socket
import sys
from pathlib import Path

import fsspec
import pytest
from s3_server import forget_stores, s3_server
from web_server import web_server

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.locate import is_rows
from pst_dist.config.run_dir import record_run
from pst_dist.config.schema import Config
from pst_dist.data.sources import load_data, unchanged
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.specs import read_specs, stream_specs
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, PstError, StaleError
from pst_dist.pipeline import make_shards
from pst_dist.storage.manifest import sha256_file
from pst_dist.storage.stored_objects import download, look_up
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.teach import plan

LONG_AGO = "Thu, 01 Jan 2026 00:00:00 GMT"
SECRET = "abcdef0123456789"


def lines(answers: range) -> bytes:
    rows = [{"question": f"{n} + 0?", "answer": str(n), "rationale": f"{n} stays {n}."} for n in answers]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def config(machine: Path, train, **data) -> Config:
    tree = {"output_dir": str(machine), "shards": {"samples_per_shard": 8}}
    return Config.model_validate({**tree, "data": {"answer_type": "number", "train": train, **data}})


def questions(loaded, split: str = "train") -> list[str]:
    return sorted(sample.question for sample in loaded.splits[split])


def copies(machine: Path) -> list[str]:
    """The files below the folder of copies, without locks and notes."""
    folder = machine / "data" / "rows"
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def web():
    with web_server() as found:
        yield found


class Store:
    """What both kinds of server can do."""

    def __init__(self, kind: str, request: pytest.FixtureRequest) -> None:
        self.server = request.getfixturevalue(kind)
        self.is_web = kind == "web"
        self.base = self.server.url if self.is_web else f"s3://data/{request.node.name.partition('[')[0]}"

    def put(self, name: str, content: bytes) -> str:
        if self.is_web:
            self.server.files[name] = content
        else:
            self.server.system.pipe_file(f"{self.base}/{name}", content)
        return f"{self.base}/{name}"

    def downloads(self) -> int:
        return len(self.server.downloads())


@pytest.fixture(params=["s3", "web"])
def store(request) -> Store:
    return Store(request.param, request)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv"])
def test_the_shards_of_a_url_are_those_of_the_same_file_here(store, tmp_path, name):
    content = lines(range(10, 40))
    if name.endswith(".csv"):
        content = b"question,answer,rationale\n" + b"".join(b"%d + 0?,%d,It stays.\n" % (n, n) for n in range(10, 40))
    content = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(content)
    url = store.put(name, content)
    here = make_shards(config(tmp_path / "here", str(tmp_path / name)))
    there = make_shards(config(tmp_path / "there", url))
    assert there.digest == here.digest and copies(tmp_path / "there") == [name]
    (source,) = json.loads((tmp_path / "there" / "data" / ".shards.inputs.json").read_text())["inputs"]
    assert source["name"] == url and source["sha256"] == sha256_file(tmp_path / name)
    assert source["version"].startswith("ETag ") and source["bytes"] == len(content) and source["mtime_ns"] is None


def test_an_unchanged_file_is_not_fetched_again_and_a_changed_one_is(store, tmp_path):
    url = store.put("rows.jsonl", lines(range(10, 40)))
    made = make_shards(config(tmp_path, url))
    before = store.downloads()
    assert make_shards(config(tmp_path, url)).digest == made.digest
    assert len(load_data(config(tmp_path, url, validation_size=0)).splits["train"]) == 30
    assert store.downloads() == before, "neither to recognise the shards, nor to read the rows with another setting"

    store.put("rows.jsonl", lines(range(20, 50)))
    with pytest.raises(StaleError):
        make_shards(config(tmp_path, url))
    again = make_shards(config(tmp_path, url), rebuild=True)
    assert again.digest != made.digest and store.downloads() == before + 1
    assert questions(load_data(config(tmp_path, url, validation_size=0)))[0] == "20 + 0?"
    assert store.downloads() == before + 1 and copies(tmp_path) == ["rows.jsonl"]


def test_a_copy_that_somebody_changed_or_removed_is_fetched_again(web, tmp_path):
    web.files["rows.jsonl"] = lines(range(10, 40))
    url = f"{web.url}/rows.jsonl"
    for damage in (lambda path: path.write_bytes(lines(range(50, 80))), lambda path: path.unlink()):
        load_data(config(tmp_path, url))
        web.requests.clear()
        damage(next((tmp_path / "data" / "rows").rglob("rows.jsonl")))
        assert questions(load_data(config(tmp_path, url, validation_size=0)))[0] == "10 + 0?"
        assert web.downloads() == ["rows.jsonl"]


def test_a_date_counts_as_a_version_once_it_is_past_and_without_any_the_file_is_fetched_again(web, tmp_path):
    web.files["rows.jsonl"] = lines(range(10, 40))
    url = f"{web.url}/rows.jsonl"
    web.dates = {"rows.jsonl": LONG_AGO}
    known = 0 if "Last-Modified" in fsspec.filesystem("http").info(url) else 1  # older fsspec does not tell it
    for date, silent, fetched in (
        (LONG_AGO, False, known),
        ("Fri, 01 Jan 2100 00:00:00 GMT", False, 1),
        (None, True, 1),
    ):
        web.dates, web.silent = ({"rows.jsonl": date} if date else {}), silent
        machine = tmp_path / f"{date}"
        made = make_shards(config(machine, url))
        web.requests.clear()
        assert make_shards(config(machine, url)).digest == made.digest
        assert len(web.downloads()) == fetched


def test_a_server_need_not_say_the_length(web, tmp_path):
    web.files["rows.jsonl"], web.chunked = lines(range(10, 40)), True
    made = make_shards(config(tmp_path, f"{web.url}/rows.jsonl"))
    web.requests.clear()
    assert make_shards(config(tmp_path, f"{web.url}/rows.jsonl")).digest == made.digest
    load_data(config(tmp_path, f"{web.url}/rows.jsonl"))
    # Without the length in HEAD, the library asks with GET and does not read the answer: twice for each look.
    assert web.downloads() == ["rows.jsonl"] * 2


def test_a_pattern_names_its_objects_in_order_and_a_new_one_is_noticed(s3, tmp_path):
    for number in (2, 1):
        s3.system.pipe_file(f"data/many/part-{number}.jsonl", lines(range(10 * number, 10 * number + 5)))
    s3.system.pipe_file("data/many/other.csv", b"x")
    settings = config(tmp_path, "s3://data/many/part-*.jsonl", validation_size=0)
    loaded = load_data(settings)
    assert [one.name for one in loaded.inputs] == [f"s3://data/many/part-{number}.jsonl" for number in (1, 2)]
    assert questions(loaded) == [f"{n} + 0?" for n in (*range(10, 15), *range(20, 25))]
    assert unchanged.unchanged(settings, loaded.inputs) == loaded.inputs

    before = len(s3.requests())
    s3.system.pipe_file("data/many/part-3.jsonl", lines(range(30, 35)))
    assert unchanged.unchanged(settings, loaded.inputs) is None
    assert len(load_data(settings).splits["train"]) == 15
    assert s3.downloads(before) == ["/data/many/part-3.jsonl"]
    with pytest.raises(InputError, match=r"s3://data/many/none-\*\.jsonl: no object matches"):
        load_data(config(tmp_path, "s3://data/many/none-*.jsonl"))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_a_saved_dataset_is_read_split_by_split_and_files_that_it_lost_are_removed(s3, tmp_path):
    import datasets

    def save(train: range) -> None:
        rows = {"train": train, "test": range(80, 90)}
        whole = datasets.DatasetDict(
            {
                name: datasets.Dataset.from_list([json.loads(line) for line in lines(numbers).splitlines()])
                for name, numbers in rows.items()
            }
        )
        whole.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
        if s3.system.exists("data/saved"):
            s3.system.rm("data/saved", recursive=True)
        # The slash copies the folder's content: older s3fs leaves `train/` behind, and would put the folder there.
        s3.system.put(f"{tmp_path / 'saved'}/", "data/saved", recursive=True)

    save(range(10, 20))
    settings = config(tmp_path / "run", "s3://data/saved", test="s3://data/saved", validation_size=0)
    loaded = load_data(settings)
    assert (len(loaded.splits["train"]), len(loaded.splits["test"])) == (10, 10)
    here = load_data(config(tmp_path / "run", str(tmp_path / "saved"), test=str(tmp_path / "saved"), validation_size=0))
    assert loaded.source_digest == here.source_digest
    assert loaded.inputs[0].name.startswith("s3://data/saved/train/data-00000")
    assert unchanged.unchanged(settings, loaded.inputs) == loaded.inputs

    many = load_data(config(tmp_path / "run", "s3://data/saved/t[er]*", validation_size=0))
    assert len(many.splits["train"]) == 20, "both folders match"
    s3.system.call_s3("put_object", Bucket="data", Key="saved/train/", Body=b"")
    assert unchanged.unchanged(settings, loaded.inputs) == loaded.inputs

    stray = next((tmp_path / "run").rglob("state.json")).with_name("data-00007-of-00008.arrow")
    stray.write_bytes(b"of an earlier version")
    save(range(30, 45))
    assert unchanged.unchanged(settings, loaded.inputs) is None
    assert len(load_data(settings).splits["train"]) == 15 and not stray.exists()

    with pytest.raises(InputError, match=r"s3://data/saved: the dataset has no split 'validation'; .*test, train"):
        load_data(config(tmp_path / "run", "gen:coin_flip?rows=5", validation="s3://data/saved"))
    s3.system.pipe_file("data/folder/a.jsonl", lines(range(3)))
    with pytest.raises(InputError, match=r"not written by save_to_disk; .*'s3://data/folder/\*\.jsonl'"):
        load_data(config(tmp_path / "run", "s3://data/folder"))


def test_completions_split_files_mixtures_and_a_root_at_a_url(s3, tmp_path):
    asked = [{"question": f"{n} + 0?", "answer": str(n)} for n in range(10, 20)]
    teacher = [{"reasoning_completion": f"{n} stays.", "completion": str(n)} for n in range(10, 20)]
    completions = json.dumps({"data": {str(place): [one] for place, one in enumerate(teacher)}}).encode()
    split = json.dumps({"train": list(range(8)), "test": [8, 9]}).encode()
    rows = "".join(json.dumps(row) + "\n" for row in asked).encode()
    for name, content in (("rows.jsonl", rows), ("D.json", completions), ("split.json", split)):
        (tmp_path / name).write_bytes(content)
        s3.system.pipe_file(f"data/root/{name}", content)
    keys = {"teacher_completions": "D*.json", "split_file": "./split.json", "validation_size": 0}
    settings = config(tmp_path / "there", "rows.jsonl", root="s3://data/root/", **keys)
    loaded, here = load_data(settings), load_data(config(tmp_path / "here", "rows.jsonl", root=str(tmp_path), **keys))
    assert [one.name.rpartition("/")[2] for one in loaded.inputs] == ["rows.jsonl", "D.json", "split.json"]
    assert all(one.name.startswith("s3://data/root/") and one.version for one in loaded.inputs)
    assert loaded.source_digest == here.source_digest and questions(loaded) == questions(here)
    assert next(iter(loaded.splits["train"])).rationales
    assert unchanged.unchanged(settings, loaded.inputs) == loaded.inputs
    s3.system.pipe_file("data/root/split.json", b'{"train": [0, 99]}')
    assert unchanged.unchanged(settings, loaded.inputs) is None
    with pytest.raises(DataError, match=r"s3://data/root/split\.json: train contains row 99"):
        load_data(settings)
    with pytest.raises(InputError, match=r"outside of data\.root"):
        load_data(config(tmp_path, "../rows.jsonl", root="s3://data/root"))

    own = str(tmp_path / "rows.jsonl")  # an absolute path is one of this machine, whatever data.root is
    mixture = [{"rows": own, "name": "a"}, {"rows": "rows.jsonl", "name": "b", "answer_type": "text"}]
    mixed = config(tmp_path / "mixed", mixture, root="s3://data/root").model_copy(update={"arm": "answer_only"})
    assert [one.name for one in load_data(mixed).inputs] == [own, "s3://data/root/rows.jsonl"]


def test_bad_rows_and_damaged_files_are_named_by_their_url(web, tmp_path):
    web.files["rows.jsonl"] = lines(range(10, 12)) + b'{"question": \n'
    web.files["rows.csv"] = b"question,answer\nq,1\nq,1,2\n"
    web.files["rows.jsonl.gz"] = gzip.compress(lines(range(10, 40)))[:-9]
    web.files["empty.jsonl"] = b""
    for name, error in (
        ("rows.jsonl", "rows.jsonl:3: column"),
        ("rows.csv", "rows.csv:3: 3 cells"),
        ("rows.jsonl.gz", "rows.jsonl.gz: cannot decompress"),
        ("empty.jsonl", "empty.jsonl: the file has no rows"),
    ):
        with pytest.raises(DataError) as caught:
            load_data(config(tmp_path, f"{web.url}/{name}", validation_size=0))
        assert f"{web.url}/{error}" in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_an_address_without_a_file_name_is_refused(web, tmp_path):
    web.files[""] = lines(range(10, 40))
    with pytest.raises(InputError, match="names no file"):
        load_data(config(tmp_path, web.url))


def one_line(error: PstError) -> str:
    assert "\n" not in str(error) and SECRET not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("s3://nobody/rows.jsonl", InputError, "s3://nobody/rows.jsonl: there is no such bucket"),
        ("s3://nobody/*.jsonl", InputError, "there is no such bucket"),
        ("s3://data/absent.jsonl", InputError, "s3://data/absent.jsonl: there is no such object"),
        ("s3://data/errors/rows.zip", InputError, "cannot read .zip"),
        ("s3://data/errors/rows.txt", InputError, "cannot read .txt"),
        ("nonsense://a/rows.jsonl", InputError, "nonsense:// is not a known kind of storage"),
        ("s3:/data/rows.jsonl", InputError, "is a URL with a single slash"),
        ("https://***@127.0.0.1:9/rows.jsonl", ConfigError, "its secret was not saved"),
    ],
)
def test_what_is_not_there_is_one_line(s3, tmp_path, url, kind, said):
    for name in ("rows.zip", "rows.txt"):
        s3.system.pipe_file(f"data/errors/{name}", b"x")
    with pytest.raises(kind) as caught:
        load_data(config(tmp_path, url))
    assert said in one_line(caught.value) and not (tmp_path / "data").exists()


def test_missing_packages_and_credentials_are_one_line(s3, tmp_path, monkeypatch):
    for package, url in (("gcsfs", "gs://b/rows.jsonl"), ("adlfs", "abfs://b/rows.jsonl")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(EnvironmentFault, match=rf"needs {package}; pip install {package}"):
            load_data(config(tmp_path, url))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    forget_stores()
    try:
        with pytest.raises(EnvironmentFault, match="check credentials, endpoint and network") as caught:
            load_data(config(tmp_path, "s3://data/rows.jsonl"))
        assert "redential" in one_line(caught.value)
    finally:
        forget_stores()


def test_what_a_web_server_refuses_is_one_line_without_the_secret(web, tmp_path):
    url = f"{web.url}/rows.jsonl?token={SECRET}"
    with pytest.raises(InputError, match="there is no such object") as missing:
        load_data(config(tmp_path, url))
    errors = [missing.value]
    for status, said in ((401, r"refuses access \(HTTP 401\)"), (403, "HTTP 403"), (500, "500")):
        web.status = status
        with pytest.raises(EnvironmentFault, match=said) as caught:
            load_data(config(tmp_path, url))
        errors.append(caught.value)
    with pytest.raises(InputError, match="a web server does not list its files"):
        load_data(config(tmp_path, f"{web.url}/*.jsonl"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(EnvironmentFault, match="the object storage failed") as refused:
            load_data(config(tmp_path, f"http://me:{SECRET}@127.0.0.1:{port}/rows.jsonl?sig={SECRET}"))
    for error in (*errors, refused.value):
        one_line(error)
    assert not (tmp_path / "data").exists()


def test_a_secret_in_a_url_is_used_and_is_in_no_record_or_log(web, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    web.files["rows.jsonl"] = lines(range(10, 40))
    address = web.url.replace("//", f"//me:{SECRET}@")
    settings = config(tmp_path, f"{address}/rows.jsonl?sig={SECRET}")
    made = make_shards(settings)
    web.requests.clear()
    caplog.clear()
    renewed = config(tmp_path, f"{address}/rows.jsonl?sig={SECRET}0")  # signed again
    assert make_shards(renewed).digest == made.digest and web.downloads() == []
    assert "its sources have not changed" in caplog.text
    assert any(found and found.startswith("Basic ") for found in web.authorizations)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes() or SECRET in str(path)]
    assert SECRET not in caplog.text and SECRET not in dump_config(settings)
    assert [one.name for one in load_data(settings).inputs] == [f"{web.url.replace('//', '//***@')}/rows.jsonl?sig=***"]


def test_a_saved_run_needs_the_secret_again_only_to_read_rows(web, tmp_path):
    web.files["rows.jsonl"] = lines(range(10, 40))
    record_run(config(tmp_path, f"{web.url}/rows.jsonl?sig={SECRET}"))
    saved = load_config(str(tmp_path))
    assert saved.data.train == f"{web.url}/rows.jsonl?sig=***"
    with pytest.raises(ConfigError, match="its secret was not saved"):
        load_data(saved)


def test_a_redirect_to_another_server_gets_no_password(web, tmp_path):
    with web_server() as other:
        other.files["rows.jsonl"] = lines(range(10, 40))
        web.redirect = other.url
        url = f"{web.url.replace('//', f'//me:{SECRET}@')}/rows.jsonl"
        assert len(load_data(config(tmp_path, url, validation_size=0)).splits["train"]) == 30
        assert web.authorizations != {None} and other.authorizations == {None}


def test_a_download_that_is_cut_off_leaves_nothing_and_the_next_one_is_whole(web, tmp_path):
    web.files["rows.jsonl"] = lines(range(10, 400))
    web.cut_after = 1000
    with pytest.raises(EnvironmentFault, match=r"the object storage failed|ended after") as caught:
        load_data(config(tmp_path, f"{web.url}/rows.jsonl"))
    one_line(caught.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".fetch"]
    web.cut_after = None
    assert len(load_data(config(tmp_path, f"{web.url}/rows.jsonl", validation_size=0)).splits["train"]) == 390


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_a_file_that_changes_while_it_is_fetched_is_refused(web, tmp_path, change):
    web.files["rows.jsonl"] = lines(range(10, 40))

    def strike() -> None:
        if change == "changed":
            web.files["rows.jsonl"] = lines(range(20, 50))
        else:
            del web.files["rows.jsonl"]

    web.on_get = strike
    with pytest.raises(InputError, match="changed while it was read" if change == "changed" else "no such object"):
        load_data(config(tmp_path, f"{web.url}/rows.jsonl"))
    assert copies(tmp_path) == []


def test_the_bytes_that_arrive_are_counted(web, tmp_path):
    web.files["rows.jsonl"] = content = lines(range(10, 4000))
    counts: list[int] = []
    download(look_up(f"{web.url}/rows.jsonl"), tmp_path / "rows.jsonl", counts.append)
    assert sum(counts) == len(content) and (tmp_path / "rows.jsonl").read_bytes() == content


def test_a_key_that_would_leave_the_folder_of_copies_is_refused(s3, tmp_path):
    body = b"x"
    for key in ("evil/state.json", "evil/../../out.arrow"):
        s3.system.call_s3("put_object", Bucket="data", Key=key, Body=body)
    with pytest.raises(InputError, match=r"has an object named '\.\./\.\./out\.arrow'"):
        load_data(config(tmp_path, "s3://data/evil"))


def test_a_file_url_is_read_in_place_and_memory_is_a_store_too(tmp_path):
    import fsspec

    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(range(10, 40)))
    loaded = load_data(config(tmp_path / "a", f"file://{tmp_path}/*.jsonl", validation_size=0))
    assert [one.name for one in loaded.inputs] == [str(path)] and not (tmp_path / "a").exists()
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/rows.jsonl", path.read_bytes())
    try:
        again = load_data(config(tmp_path / "b", "memory://bucket/*.jsonl", validation_size=0))
    finally:
        memory.rm("/bucket", recursive=True)
    assert again.source_digest == loaded.source_digest and again.inputs[0].name == "memory://bucket/rows.jsonl"


def test_data_cache_is_where_copies_are_and_a_source_that_is_named_twice_is_refused(web, tmp_path):
    web.files["rows.jsonl"] = lines(range(10, 40))
    url = f"{web.url}/rows.jsonl"
    settings = config(tmp_path / "run", url).model_copy(update={"data_cache": str(tmp_path / "fast")})
    load_data(settings)
    assert [path.name for path in (tmp_path / "fast" / "rows").rglob("rows.jsonl")] == ["rows.jsonl"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="names the same source twice"):
        load_data(config(tmp_path, [url, url]))
    with pytest.raises(InputError, match=r"data\.train and data\.test have the same content"):
        load_data(config(tmp_path, url, test=f"{url}?again"))


def test_commands_take_urls(web, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    web.files["rows.jsonl"] = web.files["more.jsonl"] = lines(range(10, 40))
    web.files["more.jsonl"] = lines(range(50, 60))
    first, second = f"{web.url}/rows.jsonl", f"{web.url}/more.jsonl?a=b"
    assert is_rows(first) and is_rows(second) and is_rows("s3://b/saved") and not is_rows("s3://b/my.yaml")
    assert run_verb(["check", first, second, "data.answer_type=number"]) == 0
    out = capsys.readouterr().out
    assert "train 40" in " ".join(out.replace("|", " ").split()) or "40" in out
    with pytest.raises(InputError, match="these are rows, not a config"):
        load_config(first)
    assert len(list(stream_specs([first, second], "test", SourceRoot("", tmp_path / "own"), []))) == 40
    settings = TeachSettings(
        output=tmp_path / "taught.jsonl", endpoint="http://127.0.0.1:9/v1", model="m", avoid=(second,)
    )
    asked = plan(load_config(None, [f"data.train={first}"]), settings)
    assert asked["requests"] and sorted(
        path.name for path in (tmp_path / "taught.teach" / "rows").rglob("*.jsonl")
    ) == [
        "more.jsonl",
        "rows.jsonl",
    ]


def test_sources_are_looked_up_before_the_first_is_fetched(web, tmp_path):
    web.files["rows.jsonl"] = lines(range(10, 40))
    with pytest.raises(InputError, match=r"absent\.jsonl: there is no such object"):
        load_data(config(tmp_path, f"{web.url}/rows.jsonl", test=f"{web.url}/absent.jsonl"))
    assert web.downloads().count("rows.jsonl") == 0
    (source,) = read_specs(f"{web.url}/rows.jsonl", "train", SourceRoot("", tmp_path))
    assert source.stem == "rows" and source.path == f"{web.url}/rows.jsonl" and not source.sha256


def test_a_config_written_from_a_url_uses_the_copy_that_was_checked(web, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    web.files["rows.jsonl"] = lines(range(10, 60))
    url = f"{web.url}/rows.jsonl"
    assert run_verb(["check", url, "--write", "my.yaml"]) == 0
    assert load_config("my.yaml").data.train == url and web.downloads() == ["rows.jsonl"]
    assert copies(tmp_path / "runs" / "my") == ["rows.jsonl"]
    assert run_verb(["check", f"{url}?sig={SECRET}", "--write", "other.yaml"]) == 2
    assert not Path("other.yaml").exists()
