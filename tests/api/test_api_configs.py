"""Configs from Python values: rows as objects of any container, and errors that are ours and name their place."""

import json
from pathlib import Path

import pytest
from api_run import ROWS, TEST, small

import pst_dist
from pst_dist import api
from pst_dist.data.sources.in_memory import rows_file
from pst_dist.errors import ConfigError, DataError, InputError, StaleError


def test_every_container_of_the_same_rows_gives_the_same_shards(tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    from pst_dist.pipeline import make_shards

    files = tmp_path / "files"
    files.mkdir()
    for split, rows in (("train", ROWS), ("test", TEST)):
        lines = (json.dumps(row, sort_keys=True, separators=(",", ":")) for row in rows)
        (files / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    kinds = {
        "list": (ROWS, TEST),
        "frame": (pandas.DataFrame(ROWS), pandas.DataFrame(TEST)),
        "dataset": (datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(TEST)),
        "files": (files / "train.jsonl", files / "test.jsonl"),
    }
    digests = {}
    for name, (train, test) in kinds.items():
        config = pst_dist.load_config(**small(tmp_path / name, train=train, test=test))
        digests[name] = make_shards(config).digest
    assert len(set(digests.values())) == 1, digests
    config = pst_dist.load_config(**small(tmp_path / "one", data=datasets.DatasetDict(train=kinds["dataset"][0])))
    assert Path(config.data.train).read_bytes() == (files / "train.jsonl").read_bytes()


def test_other_rows_in_the_same_directory_are_refused_and_the_old_ones_stay(tmp_path):
    from pst_dist.pipeline import make_shards

    config = pst_dist.load_config(**small(tmp_path / "run"))
    first = make_shards(config)
    with pytest.raises(StaleError):
        api.train(None, **small(tmp_path / "run", train=ROWS[:-1]))
    assert make_shards(config).digest == first.digest
    assert [row for row in (tmp_path / "run" / "data" / "rows").rglob("train.jsonl") if str(row) == config.data.train]


def test_a_missing_answer_is_refused_by_its_row(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    frame["answer"] = frame["answer"].astype(float)
    frame.loc[6, "answer"] = float("nan")
    with pytest.raises(DataError, match="answer is missing") as caught:
        pst_dist.run(None, **small(tmp_path / "run", train=frame))
    assert caught.value.line == 7 and Path(caught.value.path).name == "train.jsonl"
    assert not (tmp_path / "run" / "data" / "shards").exists()
    tolerant = small(tmp_path / "run", train=frame)
    tolerant["data"]["max_bad"] = 1
    from pst_dist.data.sources import load_data

    splits = load_data(pst_dist.load_config(**tolerant)).splits
    assert sorted(int(row.answer) for row in (*splits["train"], *splits["validation"])) == [
        n + 1 for n in range(40) if n != 6
    ]


@pytest.mark.parametrize(
    ("arguments", "keys", "kind", "words"),
    [
        (["demo"], {"train": {"lerning_rate": 1}}, ConfigError, ["train.lerning_rate", "train.learning_rate"]),
        (["demo", "train.lerning_rate=1"], {}, ConfigError, ["train.lerning_rate", "train.learning_rate"]),
        (["demo"], {"lerning": 1}, ConfigError, ["unknown key 'lerning'"]),
        (["demo"], {"train": {"max_steps": "many"}}, ConfigError, ["train.max_steps", "'many'"]),
        (["demo"], {"train": {"max_steps": [3]}}, ConfigError, ["train.max_steps"]),
        (["demo"], {"train": 5}, ConfigError, ["train is a section"]),
        (["demo"], {"train": {3: 5}}, ConfigError, ["key 3 in train"]),
        (["demo"], {"loss": {"whiten": True, "centre": False}}, ConfigError, ["loss.whiten"]),
        (["demo"], {"arm": "pst"}, ConfigError, ["arm=pst has no effect", "arms=[pst]"]),
        (["demmo"], {}, InputError, ["demmo", "did you mean demo?"]),
        (["demo", "+papr_t5"], {}, InputError, ["did you mean +paper_t5?"]),
        (["demo", "max_steps"], {}, ConfigError, ["is not key.sub=value"]),
        (["demo", {"seed": 1}], {}, ConfigError, ["keywords"]),
        ([{"seed": 1}], {}, ConfigError, ["expected the path or name of a config"]),
        ([None], {"train": ROWS}, ConfigError, ['data={"train": rows}']),
        ([None], {"test": ROWS}, ConfigError, ['data={"test": rows}']),
        ([None], {"data": ROWS}, ConfigError, ['data={"train": rows}']),
        ([None], {"data": {"train": [*ROWS, 5]}}, DataError, ["data.train row 41", "int"]),
        ([None], {"data": {"train": {"question": ["a"]}}}, DataError, ["data.train", "mapping"]),
        ([None], {"data.test": [{"a": {1}}]}, DataError, ["data.test row 1", "a is set"]),
        ([None], {"data": {"train": []}}, DataError, ["data.train", "no rows"]),
    ],
)
def test_what_a_user_gets_wrong_is_our_error_with_its_place(arguments, keys, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for function in (pst_dist.load_config, pst_dist.run, api.train, pst_dist.evaluate, pst_dist.export):
        with pytest.raises(kind) as caught:
            function(*arguments, **keys)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing is written before everything is checked"


def test_a_config_does_not_change_and_its_constructor_raises_our_errors():
    config = pst_dist.load_config("demo", "seed=3", train={"max_steps": 5}, **{"train.bf16": True})
    assert (config.seed, config.train.max_steps, config.train.bf16, config.train.learning_rate) == (3, 5, True, 2e-3)
    changed = pst_dist.load_config(config, arms=["pst"])
    assert changed.arms == ["pst"] and changed.seed == 3 and len(config.arms) == 4
    with pytest.raises(ConfigError, match="is immutable"):
        config.seed = 4
    with pytest.raises(ConfigError, match="is immutable"):
        del config.train.max_steps
    with pytest.raises(ConfigError, match=r"unknown key 'train\.lr'"):
        pst_dist.Config(train={"lr": 1})
    with pytest.raises(ConfigError, match="arms names an arm twice"):
        pst_dist.Config(arms=["pst", "pst"])


def test_rows_lie_where_the_config_says_also_with_a_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pst_dist.load_config(output_dir="run", data={"train": ROWS})
    assert config.data.train == f"run/data/rows/{rows_file(ROWS, 'train').sha256[:16]}/train.jsonl"
    assert Path(config.data.train).read_bytes() == rows_file(ROWS, "train").content
    rooted = pst_dist.load_config(output_dir="run", data={"train": ROWS, "root": "elsewhere"})
    assert Path(rooted.data.train) == tmp_path / config.data.train
    both = pst_dist.load_config(data={"train": ["a.jsonl", Path("b.jsonl")], "test": Path("c.jsonl")})
    assert (both.data.train, both.data.test) == (["a.jsonl", "b.jsonl"], "c.jsonl")
