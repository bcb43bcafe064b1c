"""What a command may replace: new files and its own earlier ones, in folders that hold nothing else."""

import json
import os

import pytest

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import record_run, run_dir
from pst_dist.data.sources.rows import Reject, write_rejects
from pst_dist.diagnostics.machine import examine
from pst_dist.diagnostics.machine.facts import collect
from pst_dist.errors import ConfigError, InputError, PstError
from pst_dist.experiment.results_files import check_page_folder
from pst_dist.experiment.spec import Experiment
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.outputs import (
    is_batch_script,
    is_config,
    is_experiment_page,
    is_node_report,
    is_page,
    is_picture,
    is_reject_list,
    refuse_foreign_folder,
    write_output,
)

KINDS = (is_reject_list, is_page, is_node_report, is_picture, is_experiment_page, is_batch_script, is_config)
PRECIOUS = "precious: yes\n"


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_takes_a_stranger_for_its_own(kind, tmp_path):
    strangers = [
        PRECIOUS.encode(),
        b"{}",
        b"[1]",
        b'{"kind": "other"}',
        b"<!doctype html><title>mine</title>",
        b"\0" * 9,
    ]
    strangers += [
        b"[" * 70_000,
        b'{"question": "q", "answer": "a"}\n',
        b"# readme\n",
        b"\x89PNG\r\n\x1a\nSoftware\0Gimp",
    ]
    for content in strangers:
        assert not kind(content)
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError, match="was not written by pst"):
            write_output(tmp_path / "file", "new", kind)
        assert (tmp_path / "file").read_bytes() == content


def test_links_pipes_folders_inputs_and_urls_are_refused_untouched(tmp_path):
    page = '<meta name="generator" content="pst_dist">'
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "link.html").symlink_to("page.html")
    (tmp_path / "dangling.html").symlink_to("nowhere.html")
    (tmp_path / "same.html").hardlink_to(tmp_path / "page.html")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("link.html", "is a link"),
        ("dangling.html", "is a link"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("same.html", "is an input"),
    ):
        with pytest.raises(InputError, match=words):
            write_output(tmp_path / name, "new", is_page, inputs=[tmp_path / "page.html"])
    assert (tmp_path / "page.html").read_text() == page and not (tmp_path / "nowhere.html").exists()
    for path in ("s3://bucket/page.html", "gs:/bucket/page.html", "x" * 300, "a\0b"):
        with pytest.raises(PstError):
            write_output(type(tmp_path)(path), "new", is_page)
    write_output(tmp_path / "page.html", "new", is_page)
    assert (tmp_path / "page.html").read_text() == "new"


def test_no_link_takes_a_file_out_of_its_run(tmp_path):
    run, home = tmp_path / "run", tmp_path / "home"
    run.mkdir()
    home.mkdir()
    (run / "plots").symlink_to(home)
    (run / "report.html").symlink_to(home / "page.html")
    for name in ("plots/loss.png", "report.html"):
        with pytest.raises(InputError, match="leads out of"):
            write_output(run / name, b"new", is_page, inside=run)
    assert list(home.iterdir()) == []
    (tmp_path / "alias").symlink_to(run)  # the whole run behind a link is the usual way to another disk
    write_output(tmp_path / "alias" / "page.html", "new", is_page, inside=tmp_path / "alias")
    assert (run / "page.html").read_text() == "new"


def test_every_kind_knows_its_own_files(tmp_path):
    write_rejects(tmp_path / "rejects.jsonl", [Reject("a.jsonl", 1, "json", "not JSON", "{")])
    write_rejects(tmp_path / "rejects.jsonl", [Reject("a\udc80.jsonl", 2, "json", "not JSON", "{")])
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["line"] == 2
    examine.write_report(collect(), tmp_path / "node.json")
    examine.write_report(collect(), tmp_path / "node.json")
    record_run(load_config(None, [f"output_dir={tmp_path / 'run'}"]))
    record_run(load_config(None, [f"output_dir={tmp_path / 'run'}", "seed=3"]))
    assert "seed: 3" in (tmp_path / "run" / "config.resolved.yaml").read_text()


@pytest.mark.parametrize("name", ["config.resolved.yaml", "command.txt", "environment.json"])
def test_the_record_of_a_run_replaces_no_file_of_a_project(name, tmp_path):
    (tmp_path / name).write_text(PRECIOUS)
    with pytest.raises(InputError, match="was not written by pst"):
        record_run(load_config(None, [f"output_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == PRECIOUS


def test_options_of_the_command_line_replace_nothing_of_others(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, mine = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    rows.write_text('{"question": "q", "answer": "a"}\n{\n')
    mine.write_text("arm: answer_only\n")
    (tmp_path / "link").symlink_to(mine)
    for words in (
        ("check", rows, "--rejects", rows),
        ("check", rows, "--rejects", mine),
        ("check", rows, "--rejects", "link"),
        ("check", rows, "--rejects", tmp_path),
        ("compare", "one", "two", "--output", mine),
        ("doctor", mine, "--report", mine),
        ("experiment", "letters", "--collect", "--page", "docs", f"output_dir={tmp_path / 'out'}"),
    ):
        if "docs" in words:
            (tmp_path / "docs").mkdir()
            (tmp_path / "docs" / "README.md").write_text(PRECIOUS)
            (tmp_path / "docs" / "cost.png").write_text(PRECIOUS)
        assert run_verb([str(word) for word in words]) == 2, words
        assert "Traceback" not in capsys.readouterr().err
    assert mine.read_text() == "arm: answer_only\n" and rows.read_text().endswith("{\n")
    assert {path.read_text() for path in (tmp_path / "docs").iterdir()} == {PRECIOUS}
    assert not (tmp_path / "out").exists()


def test_a_file_beside_an_experiments_page_is_only_replaced_in_a_folder_of_ours(tmp_path):
    (tmp_path / "results.json").write_text(PRECIOUS)
    with pytest.raises(InputError, match="was not written by pst"):
        check_page_folder(tmp_path)
    (tmp_path / "README.md").write_text("# letters\n[outcomes.jsonl](outcomes.jsonl) has the right rows\n")
    check_page_folder(tmp_path)


FOLDERS = {
    "shards": ["train-000000.tar", "train-000000.index.json", "train.wids.json"],
    "embeddings": ["train-000000.safetensors"],
    "student": ["pst.json", "model.safetensors", "vocab.txt"],
    "export": ["pst.json", "README.md"],
    "evaluation": ["results.json", "samples.jsonl"],
    "checkpoint": ["run_state.json", "rank-0.safetensors"],
    "checkpoints": ["checkpoint-7"],
    "lm_eval": ["rows.jsonl", "utils.py", "pst_svamp.yaml"],
}


@pytest.mark.parametrize("through_link", [False, True], ids=["folder", "link"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_with_anything_foreign_is_never_emptied(kind, through_link, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    folder = real
    if through_link:
        folder = tmp_path / "run"
        folder.symlink_to(real)
    refuse_foreign_folder(folder, kind)  # empty
    refuse_foreign_folder(tmp_path / "missing", kind)
    for name in FOLDERS[kind]:
        (real / name).write_text("ours")
    (real / f".{FOLDERS[kind][0]}.partial").write_text("ours")
    refuse_foreign_folder(folder, kind)  # ours, damaged: there is no manifest
    for name in os.listdir(real):
        (real / name).unlink()
    (real / "thesis.tex").write_text(PRECIOUS)
    with pytest.raises(InputError, match=r"'thesis\.tex' in it was not written by pst"):
        refuse_foreign_folder(folder, kind)
    if kind not in ("checkpoints", "lm_eval"):
        with pytest.raises(InputError, match="was not written by pst"), Artefact(folder, kind).publish("f") as draft:
            (draft.path / "file").write_text("new")
        (real / "thesis.tex").unlink()
        with Artefact(folder, kind).publish("f") as draft:
            (draft.path / "file").write_text("new")
        (real / "thesis.tex").write_text(PRECIOUS)  # beside an intact manifest
        with pytest.raises(InputError, match="was not written by pst"), Artefact(folder, kind).publish("f") as draft:
            (draft.path / "file").write_text("newer")
        assert (folder / "file").read_text() == "new"
    assert (real / "thesis.tex").read_text() == PRECIOUS
    assert not [path for path in tmp_path.rglob(".*.partial")]


def test_a_file_where_a_folder_should_go_and_a_link_into_another_run_are_refused(tmp_path):
    (tmp_path / "best").write_text(PRECIOUS)
    with pytest.raises(InputError, match="is a file"), Artefact(tmp_path / "best", "student").publish("f"):
        pass
    other = tmp_path / "other"
    record_run(load_config(None, [f"output_dir={other}"]))
    with Artefact(other / "best", "student").publish("f") as draft:
        (draft.path / "weights").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best").symlink_to(other / "best")
    with pytest.raises(InputError, match="another run"), Artefact(tmp_path / "run" / "best", "student").publish("g"):
        pass
    assert (other / "best" / "weights").read_text() == "theirs" and (tmp_path / "best").read_text() == PRECIOUS


@pytest.mark.parametrize("name", ["best", "checkpoints"])
def test_a_rebuild_never_empties_a_foreign_folder_behind_a_link(name, tmp_path):
    from pst_dist.training.starting import refuse_foreign_folders

    run = run_dir(load_config(None, [f"output_dir={tmp_path / 'run'}"]))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text(PRECIOUS)
    run.path.mkdir()
    (run.path / name).symlink_to(tmp_path / "thesis")
    with pytest.raises(InputError, match=r"chapter\.tex"):
        refuse_foreign_folders(run)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == PRECIOUS


@pytest.mark.parametrize("url", ["s3://bucket/runs", "gs://b", "file:///tmp/x", "s3:/bucket/runs"])
def test_a_run_directory_may_not_be_a_url(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="only data_dir may be a URL"):
        load_config(None, [f"output_dir={url}"])
    with pytest.raises(ConfigError, match="only data_dir may be a URL"):
        load_config(None, [f"data_cache={url}"])
    with pytest.raises(ConfigError, match="only data_dir may be a URL"):
        Experiment(name="x", tasks={"t": {}}, output_dir=url)
    assert load_config(None, ["data_dir=s3://bucket/data"]).data_dir == "s3://bucket/data"
    assert list(tmp_path.iterdir()) == []
