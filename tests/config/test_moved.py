"""A run directory that was moved or copied is the one that a command works on."""

import shutil
from pathlib import Path

import pytest

from pst_dist.config.loading import load_config
from pst_dist.config.locate import RESOLVED
from pst_dist.config.run_dir import expand_arms, record_run, run_dir


def recorded(output: Path, *words: str) -> Path:
    """A run directory with nothing but its record."""
    record_run(load_config(None, [f"output_dir={output}", *words]))
    return output


def test_a_copied_run_is_used_where_it_is_and_the_original_is_left_alone(tmp_path):
    recorded(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    run = run_dir(load_config(str(tmp_path / "new")))
    assert (run.path, run.data) == (tmp_path / "new", tmp_path / "new" / "data")
    assert run_dir(load_config(str(tmp_path / "old"))).path == tmp_path / "old"


def test_a_run_named_through_a_link_or_from_another_directory_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded(Path("runs/one"), "data_dir=shared")
    (tmp_path / "shared").mkdir()
    (tmp_path / "link").symlink_to("runs/one")
    assert load_config("link").output_dir == "runs/one"
    assert load_config("runs/one/").data_dir == "shared"
    monkeypatch.chdir(tmp_path / "shared")
    there = load_config(str(tmp_path / "runs" / "one"))
    assert there.output_dir == str(tmp_path / "runs" / "one") and there.data_dir == str(tmp_path / "shared")


def test_data_inside_the_run_moves_with_it(tmp_path):
    recorded(tmp_path / "old", f"data_dir={tmp_path / 'old' / 'rows'}")
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_config(str(tmp_path / "new")).data_dir == str(tmp_path / "new" / "rows")


def test_the_arms_of_a_moved_run_find_each_other_and_their_data(tmp_path):
    base = load_config(None, [f"output_dir={tmp_path / 'old'}", "arms=[pst,answer_only]"])
    for config in (base, *expand_arms(base)):
        record_run(config)
    (tmp_path / "old" / "data").mkdir()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    arm = load_config(str(tmp_path / "new" / "pst"))
    assert (arm.output_dir, arm.data_dir) == (str(tmp_path / "new" / "pst"), str(tmp_path / "new" / "data"))
    whole = load_config(str(tmp_path / "new"))
    assert [one.output_dir for one in expand_arms(whole)] == [str(tmp_path / "new" / a) for a in ("pst", "answer_only")]


@pytest.mark.parametrize("data", ["/datasets/shared", "s3://bucket/data"])
def test_data_of_somewhere_else_stays_where_it_is(tmp_path, data):
    recorded(tmp_path / "old", f"data_dir={data}")
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_config(str(tmp_path / "new")).data_dir == data


def test_an_override_wins_and_a_config_file_means_what_it_says(tmp_path):
    recorded(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_config(str(tmp_path / "new"), ["output_dir=elsewhere"]).output_dir == "elsewhere"
    assert load_config(str(tmp_path / "new" / RESOLVED)).output_dir == str(tmp_path / "old")
