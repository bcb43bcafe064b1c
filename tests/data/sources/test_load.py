"""From a config to splits: joins, cuts, leaks, ids, budgets, and the 12 tasks from their public files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.data.sample import normalise_question
from pst_dist.data.sources import load_data
from pst_dist.data.sources.splits import rank_of
from pst_dist.errors import ConfigError, DataError, InputError
from pst_dist.storage.manifest import digest_of

TASK_NAMES = (
    "single_eq addsub multiarith gsm8k aqua svamp date_understanding tracking_shuffled_objects "
    "last_letter_concatenation coin_flip commonsense_qa strategy_qa"
).split()


def _row(number, **more):
    return {"question": f"What is number {number}?", "answer": f"a{number}", "rationale": f"Because {number}."} | more


def _write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _load(root: Path, task=None, arm="pst", **data):
    return load_data(Config.model_validate({"task": task, "arm": arm, "data": {"root": str(root), **data}}))


def _questions(loaded, split):
    return [sample.question for sample in loaded.splits[split]]


# --- reading -----------------------------------------------------------------------------------------------


def test_the_same_rows_are_loaded_from_every_kind_of_file(tmp_path):
    import datasets

    rows = [_row(number) for number in range(12)]
    _write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "nested.json").write_text(json.dumps({"version": 1, "data": rows}))
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_csv(str(tmp_path / "rows.csv"))
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": dataset, "other": dataset}).save_to_disk(str(tmp_path / "dict"))
    expected = [(row["question"], row["answer"], (row["rationale"],)) for row in rows]
    for name in ("rows.jsonl", "rows.json", "nested.json", "rows.csv", "rows.parquet", "saved", "dict", "dict/other"):
        loaded = _load(tmp_path, train=name, validation_size=0)
        found = [(sample.question, sample.answer, sample.rationales) for sample in loaded.splits["train"]]
        assert found == expected, name
    with pytest.raises(
        InputError, match="the dataset has no split 'test'; name the folder of one of its splits: other, train"
    ):
        _load(tmp_path, train="rows.csv", test="dict")
    with pytest.raises(InputError, match="was not written by save_to_disk"):
        _load(tmp_path.parent, train=tmp_path.name)


def test_a_hub_name_is_loaded_by_the_datasets_library(tmp_path, monkeypatch):
    # The library reads a local folder under the same call as a hub name: our real code, without a network.
    rows = [_row(number) for number in range(5)]
    folder = tmp_path / "hub"
    folder.mkdir()
    _write(folder / "train.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = _load(Path(), train="hf:./hub:train", validation_size=0)
    assert _questions(loaded, "train") == [row["question"] for row in rows]
    assert loaded.splits["train"][0].id.startswith("hub-train-000000-")
    with pytest.raises(InputError, match="cannot load the dataset"):
        _load(Path(), train="hf:./hub:dev")
    with pytest.raises(ConfigError, match="is not hf:NAME"):
        _load(Path(), train="hf:hub")


def test_class_labels_become_their_names(tmp_path):
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    dataset = datasets.Dataset.from_dict({"question": ["a?", "b?"], "answer": [1, 0]}, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    loaded = _load(tmp_path, "strategy_qa", "answer_only", train="saved", validation_size=0)
    assert [sample.answer for sample in loaded.splits["train"]] == ["yes", "no"]


def test_globs_and_lists_are_read_in_order_and_a_file_only_once(tmp_path):
    for name in ("b", "a"):
        _write(tmp_path / f"{name}.jsonl", [_row(name)])
    loaded = _load(tmp_path, train="*.jsonl", validation_size=0)
    assert _questions(loaded, "train") == ["What is number a?", "What is number b?"]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="names the same source twice"):
        _load(tmp_path, train=["a.jsonl", "link.jsonl"])
    with pytest.raises(InputError, match="have the same content"):
        _load(tmp_path, train="a.jsonl", test="link.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        _load(tmp_path, train="*.csv")


def test_without_data_or_with_contradictions_the_config_is_refused(tmp_path):
    _write(tmp_path / "a.jsonl", [_row(1)])
    for data, reason in (
        ({}, "data.train is not set"),
        ({"test": "a.jsonl", "split_file": "s.json"}, "refer to rows of data.train"),
        (
            {"train": "a.jsonl", "test": "a.jsonl", "split_file": "s.json"},
            "data.split_file cannot be combined with data.test",
        ),
        ({"train": "a.jsonl", "keep": "teacher_correct"}, "needs the teacher's answers"),
        ({"train": "a.jsonl", "max_bad": "many"}, "neither a number nor a percentage"),
        ({"train": []}, "empty list"),
    ):
        with pytest.raises(ConfigError, match=reason):
            _load(tmp_path, **data)


# --- bad rows ----------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_against_the_budget_and_the_first_is_named(tmp_path):
    rows = [_row(number) for number in range(8)]
    rows[2] = {"question": "no answer?", "rationale": "r"}
    rows[5] = _row(5, rationale=None)
    path = _write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        _load(tmp_path, train="rows.jsonl")
    assert (caught.value.path, caught.value.line) == (str(path), 3)
    assert "answer is missing (2 of 8 rows are bad, data.max_bad is 0)" in str(caught.value)
    assert "`pst check` lists them" in str(caught.value)
    for budget in (2, "25%"):
        loaded = _load(tmp_path, train="rows.jsonl", max_bad=budget, validation_size=0)
        assert [(reject.line, reject.code) for reject in loaded.rejects] == [(3, "missing"), (6, "missing")]
        assert len(loaded.splits["train"]) == 6
    with pytest.raises(DataError):
        _load(tmp_path, train="rows.jsonl", max_bad="24%")


def test_answers_that_fit_no_type_are_bad_rows(tmp_path):
    _write(tmp_path / "rows.jsonl", [_row(1, answer="12"), _row(2, answer="about 3 or 4"), _row(3, answer=7)])
    loaded = _load(tmp_path, train="rows.jsonl", answer_type="number", max_bad=1, validation_size=0)
    assert [sample.answer for sample in loaded.splits["train"]] == ["12", "7"]
    assert loaded.rejects[0].what == "answer 'about 3 or 4' is not a number: it does not start with a number"
    with pytest.raises(DataError, match="answer is a number, expected text"):
        _load(tmp_path, train="rows.jsonl")


def test_an_arm_that_needs_rationales_is_refused_without_any(tmp_path):
    _write(tmp_path / "rows.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(5)])
    with pytest.raises(DataError, match="no training row has a rationale, and arm pst needs one"):
        _load(tmp_path, train="rows.jsonl")
    assert len(_load(tmp_path, arm="answer_only", train="rows.jsonl", validation_size=0).splits["train"]) == 5


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    _write(tmp_path / "rows.jsonl", ["text", 3])
    with pytest.raises(DataError, match="none of 2 rows is left for training: bad rows 2"):
        _load(tmp_path, train="rows.jsonl", max_bad="100%")


def test_ten_thousand_mutated_rows_never_raise_and_no_good_row_is_lost(tmp_path):
    rng = random.Random(0)
    good = json.dumps(_row(1)).encode()
    lines, untouched = [], 0
    for number in range(10_000):
        line = bytearray(json.dumps(_row(number)).encode())
        kind = rng.randrange(6)
        if kind == 0:
            line = line[: rng.randrange(1, len(line))]
        elif kind == 1:
            line[rng.randrange(len(line))] = rng.choice([0x00, 0x80, 0xFF, 0x22, 0x7B])
        elif kind == 2:
            line.insert(rng.randrange(len(line)), rng.choice(b'{}[]",:\\\x01'))
        else:
            untouched += 1
        lines.append(bytes(line).replace(b"\n", b" "))
    assert good in lines or untouched
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    loaded = _load(tmp_path, train="rows.jsonl", max_bad="100%", validation_size=0, duplicates="keep")
    kept, bad = len(loaded.splits["train"]), len(loaded.rejects)
    assert kept + bad == 10_000
    assert untouched <= kept
    intact = {f"What is number {number}?" for number in range(10_000)}
    assert len(intact & set(_questions(loaded, "train"))) >= untouched
    assert all(reject.line >= 1 and reject.code and reject.what for reject in loaded.rejects)


# --- ids ---------------------------------------------------------------------------------------------------


def test_own_ids_are_kept_and_others_are_made_from_file_place_and_question(tmp_path):
    rows = [_row(1, id="own-1"), _row(2, id="has.dot"), _row(3)]
    _write(tmp_path / "my rows.jsonl", rows)
    ids = [sample.id for sample in _load(tmp_path, train="my rows.jsonl", validation_size=0).splits["train"]]
    assert ids[0] == "own-1"
    assert ids[1].startswith("my-rows-000001-")
    assert ids[2].startswith("my-rows-000002-")


def test_equal_ids_of_different_rows_are_an_error_that_names_both_places(tmp_path):
    path = _write(tmp_path / "rows.jsonl", [_row(1, id="x"), _row(2), _row(3, id="x")])
    with pytest.raises(DataError) as caught:
        _load(tmp_path, train="rows.jsonl")
    assert f"{path}:3" in str(caught.value)
    assert f"first used at {path}:1" in str(caught.value)


def test_files_that_each_count_from_zero_get_different_ids(tmp_path):
    _write(tmp_path / "a.jsonl", [_row(1, id="0"), _row(2, id="1")])
    _write(tmp_path / "b.jsonl", [_row(3, id="0"), _row(4, id="2")])
    loaded = _load(tmp_path, train="a.jsonl", test="b.jsonl", validation_size=0)
    assert [sample.id for sample in loaded.splits["train"]] == ["0", "1"]
    assert [sample.id for sample in loaded.splits["test"]] == ["test-0", "2"]


# --- splits ------------------------------------------------------------------------------------------------


def test_several_rationales_for_one_question_become_one_sample(tmp_path):
    rows = [_row(1), _row(1, rationale="Otherwise."), _row(1), _row(2), _row(1, answer="b")]
    _write(tmp_path / "rows.jsonl", rows)
    loaded = _load(tmp_path, train="rows.jsonl", validation_size=0)
    first = loaded.splits["train"][0]
    assert first.rationales == ("Because 1.", "Otherwise.")
    assert len(loaded.splits["train"]) == 3
    assert (loaded.report["rationales_merged"], loaded.report["duplicates_dropped"]) == (1, 1)
    assert loaded.report["conflicting_answers"] == 1
    assert loaded.report["first_conflict"] == "rows.jsonl:1 has a1, rows.jsonl:5 has b"
    kept = _load(tmp_path, train="rows.jsonl", validation_size=0, duplicates="keep").splits["train"]
    assert len(kept) == 5
    assert len({sample.id for sample in kept}) == 5


def _three_wordings(path: Path) -> Path:
    """150 rows: 50 questions with three rationales each, the wordings of one question 50 rows apart."""
    return _write(path, [_row(n, rationale=f"{wording} {n}.") for wording in ("Since", "For", "As") for n in range(50)])


@pytest.mark.parametrize(
    ("settings", "held_out"),
    [
        ({"test_size": 10}, {"test": 10}),
        ({"test_size": 10, "validation_size": 5}, {"test": 10, "validation": 5}),
        ({"test_size": 0.3}, {"test": None}),
        ({"validation_size": 0.3}, {"validation": None}),
        ({"split_file": "split.json"}, {"test": 10, "validation": 5}),
        ({"test": "held.jsonl"}, {"test": 50}),
        ({"validation": "held.jsonl"}, {"validation": 50}),
    ],
)
def test_no_split_repeats_a_question_and_sizes_count_questions(tmp_path, settings, held_out):
    _three_wordings(tmp_path / "rows.jsonl")
    held = [_row(n + 100, rationale=f"{word} {n}.") for word in ("Since", "For", "As") for n in range(50)]
    _write(tmp_path / "held.jsonl", held)
    places = [[n + 50 * wording for n in range(50) for wording in range(3)][start:stop] for start, stop in SPLIT_PLACES]
    (tmp_path / "split.json").write_text(json.dumps(dict(zip(("train", "validation", "test"), places, strict=True))))
    loaded = _load(tmp_path, train="rows.jsonl", **{"validation_size": 0, **settings})
    seen = [question for split in loaded.splits for question in _questions(loaded, split)]
    assert len(seen) == len(set(seen)) == 50 + 50 * ("held.jsonl" in settings.values())
    for samples in loaded.splits.values():
        assert all(len(sample.rationales) == 3 for sample in samples)
    for split, count in held_out.items():
        assert len(loaded.splits[split]) == (count or len(loaded.splits[split])) > 0
    if "split_file" not in settings:
        assert loaded.report["leaks_found"] == 0


SPLIT_PLACES = ((0, 105), (105, 120), (120, 150))
"""35 questions to train on, 5 to validate and 10 to test, with all three rows of each."""


def test_repeated_test_rows_are_counted_and_kept_only_on_request(tmp_path):
    _write(tmp_path / "train.jsonl", [_row(n) for n in range(3)])
    test = [_row(7), _row(7, rationale="Otherwise."), _row(7, question="what is NUMBER 7"), _row(8)]
    _write(tmp_path / "test.jsonl", test)
    files = {"train": "train.jsonl", "test": "test.jsonl", "validation_size": 0}
    loaded = _load(tmp_path, **files)
    assert [sample.rationales for sample in loaded.splits["test"]] == [("Because 7.", "Otherwise."), ("Because 8.",)]
    assert (loaded.report["test_duplicates"], loaded.report["test_rows"]) == (2, 2)
    assert len(_load(tmp_path, **files, duplicates="keep").splits["test"]) == 4


def test_training_questions_that_are_held_out_are_dropped_kept_or_refused(tmp_path):
    _write(tmp_path / "train.jsonl", [_row(n) for n in range(10)])
    _write(tmp_path / "test.jsonl", [_row(3, question="what is  NUMBER 3", answer="z"), _row(77)])
    files = {"train": "train.jsonl", "test": "test.jsonl", "validation_size": 0}
    loaded = _load(tmp_path, **files)
    assert len(loaded.splits["train"]) == 9
    assert "What is number 3?" not in _questions(loaded, "train")
    assert len(loaded.splits["test"]) == 2
    assert loaded.report["leaks_dropped"] == 1
    assert loaded.report["first_leak"] == "train.jsonl:4 and test.jsonl:1"
    assert len(_load(tmp_path, **files, leaks="keep").splits["train"]) == 10
    with pytest.raises(DataError, match=r"the first at train\.jsonl:4 and test\.jsonl:1"):
        _load(tmp_path, **files, leaks="refuse")


def test_a_cut_is_stable_when_rows_are_added_and_never_parts_one_question(tmp_path):
    rows = [_row(n, id=f"r{n}") for n in range(400)] + [_row(n, id=f"s{n}", answer="other") for n in range(400)]
    _write(tmp_path / "few.jsonl", rows[:200])
    _write(tmp_path / "all.jsonl", rows)
    few = _load(tmp_path, train="few.jsonl", validation_size=0.2)
    everything = _load(tmp_path, train="all.jsonl", validation_size=0.2)
    held = set(_questions(few, "validation"))
    assert 20 <= len(held) <= 60
    assert held == {q for q in _questions(everything, "validation") if q in set(_questions(few, "train")) | held}
    assert not set(_questions(everything, "train")) & set(_questions(everything, "validation"))


def test_a_share_of_few_questions_that_comes_out_uneven_is_said(tmp_path, caplog):
    def rows(near: int, far: int):
        names = [f"id{n}" for n in range(1000)]
        low = [name for name in names if rank_of(name, "validation") < 0.1][:near]
        high = [name for name in names if rank_of(name, "validation") >= 0.1][:far]
        return [_row(n, id=name) for n, name in enumerate(low + high)]

    for near, said in ((7, True), (3, False), (4, False), (0, True)):
        caplog.clear()
        _write(tmp_path / "rows.jsonl", rows(near, 30 - near))
        loaded = _load(tmp_path, train="rows.jsonl", validation_size=0.1)
        assert len(loaded.splits["validation"]) == (near or 1)
        assert [record.getMessage().startswith("data.validation_size=0.1 took") for record in caplog.records] == [
            True
        ] * said
    assert "took 1 of 30 questions instead of about 3" in caplog.text and "validation_size=3 takes" in caplog.text


def test_cuts_by_number_are_exact_and_test_and_validation_are_apart(tmp_path):
    _write(tmp_path / "rows.jsonl", [_row(n) for n in range(100)])
    loaded = _load(tmp_path, train="rows.jsonl", test_size=20, validation_size=10)
    assert {name: len(samples) for name, samples in loaded.splits.items()} == {
        "train": 70,
        "validation": 10,
        "test": 20,
    }
    assert len({sample.id for samples in loaded.splits.values() for sample in samples}) == 100
    with pytest.raises(ConfigError, match="leaves none of the 100 questions"):
        _load(tmp_path, train="rows.jsonl", validation_size=100)
    with pytest.raises(ConfigError, match="neither a fraction nor a number"):
        _load(tmp_path, train="rows.jsonl", validation_size=1.5)


def test_fewer_rows_are_a_subset_and_validation_stays(tmp_path):
    _write(tmp_path / "rows.jsonl", [_row(n) for n in range(100)])
    whole, some, less = (_load(tmp_path, train="rows.jsonl", max_rows=n) for n in (None, 50, 20))
    assert len(less.splits["train"]) == 20
    assert set(less.splits["train"]) < set(some.splits["train"]) < set(whole.splits["train"])
    assert less.splits["validation"] == whole.splits["validation"]


def test_a_share_of_wrong_rationales_spoils_just_so_many_training_rows_and_a_larger_share_the_same_and_more(tmp_path):
    rows = [_row(k, rationale=f"because of {k}") for k in range(40)]
    path = _write(tmp_path / "rows.jsonl", rows)

    def spoilt(share):
        loaded = _load(tmp_path, train=path.name, validation_size=10, wrong_rationales=share)
        own = {row["question"]: row["rationale"] for row in rows}
        held = loaded.splits["validation"]
        assert all(sample.rationales == (own[sample.question],) for sample in held)
        train = loaded.splits["train"]
        assert {text for sample in train for text in sample.rationales} <= set(own.values())
        wrong = {sample.question for sample in train if sample.rationales != (own[sample.question],)}
        assert loaded.report["wrong_rationales"] == len(wrong)
        return wrong

    few, many = spoilt(0.1), spoilt(0.5)
    assert (len(spoilt(0)), len(few), len(many)) == (0, 3, 15) and few < many


def test_a_split_file_names_rows_of_the_file_bad_ones_counted(tmp_path):
    rows = [_row(n) for n in range(6)]
    rows[1] = {"question": "bad"}
    _write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "split.json").write_text(json.dumps({"train": [5, 1, 2], "test": [0, 4]}))
    loaded = _load(tmp_path, train="rows.jsonl", split_file="split.json", max_bad=1, validation_size=0)
    assert _questions(loaded, "train") == ["What is number 5?", "What is number 2?"]
    assert _questions(loaded, "test") == ["What is number 0?", "What is number 4?"]
    assert loaded.report["rows_unused"] == 1
    for split, reason in (
        ({"train": [0, 9]}, "contains row 9, but data.train has 6 rows"),
        ({"train": [0], "test": [0]}, "row 0 is in train and again in test"),
        ({"train": ["0"]}, "which is not a row index"),
        ({"test": [0]}, "split file is not"),
        ([0], "split file is not"),
    ):
        (tmp_path / "split.json").write_text(json.dumps(split))
        with pytest.raises(DataError, match=reason):
            _load(tmp_path, train="rows.jsonl", split_file="split.json", max_bad=1)


# --- teachers ----------------------------------------------------------------------------------------------


def _completion(row, answer):
    return [{"question": row["question"], "reasoning_completion": f" Taught {answer}. ", "completion": f" {answer}."}]


def test_completions_are_joined_by_index_and_wrong_ones_dropped_but_never_from_test(tmp_path):
    rows = [{"question": f"{n} + 0?", "answer": str(n)} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = {str(n): _completion(row, n if n % 2 else 9) for n, row in enumerate(rows)}
    (tmp_path / "D.json").write_text(json.dumps({"metadata": {}, "data": data}))
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 1, 2, 3], "test": [4, 5]}))
    files = {"train": "rows.json", "split_file": "split.json", "teacher_completions": "D.json", "validation_size": 0}
    loaded = _load(tmp_path, "svamp", **files, keep="teacher_correct")
    assert [(sample.answer, sample.rationales) for sample in loaded.splits["train"]] == [
        ("1", ("Taught 1.",)),
        ("3", ("Taught 3.",)),
    ]
    assert len(loaded.splits["test"]) == 2
    assert loaded.report["teacher_wrong_dropped"] == 2
    assert len(_load(tmp_path, "svamp", **files).splits["train"]) == 4
    data["3"][0]["question"] = "another?"
    del data["1"]
    (tmp_path / "D.json").write_text(json.dumps({"data": data}))
    rejects = _load(tmp_path, "svamp", **files, max_bad=2).rejects
    assert [reject.what for reject in rejects] == [
        "row 1 has no completion in D.json",
        "the question of row 3 differs from its completion's in D.json",
    ]


def test_raw_continuations_are_cut_where_the_model_goes_on_by_itself(tmp_path):
    rows = [
        {"question": f"q{n}", "choices": ["x", "y"], "answer": "y", "abstractive_explanation": ""} for n in range(3)
    ]
    _write(tmp_path / "rows.json", rows)
    (tmp_path / "t_2.json").write_text(json.dumps(["It is one of these. So the answer is one of them."]))
    (tmp_path / "t_1.json").write_text(
        json.dumps(["Y fits. So the answer is (b) y.\n\nQ: more? So the answer is (a) x.", "No. So the answer is (a)."])
    )
    files = {"train": "rows.json", "teacher_completions": "t_*.json", "columns": "csqa_palm", "validation_size": 0}
    loaded = _load(tmp_path, "commonsense_qa", **files)
    assert [sample.rationales for sample in loaded.splits["train"]] == [
        ("Y fits.",),
        ("No.",),
        ("It is one of these. So the answer is one of them.",),
    ]
    assert {sample.answer for sample in loaded.splits["train"]} == {"B"}
    assert len(_load(tmp_path, "commonsense_qa", **files, keep="teacher_correct").splits["train"]) == 1
    (tmp_path / "t_3.json").write_text(json.dumps(["one more"]))
    with pytest.raises(DataError, match="4 completions for 3 training rows"):
        _load(tmp_path, "commonsense_qa", **files)


# --- generators and digests --------------------------------------------------------------------------------


def test_generated_rows_of_train_and_test_share_no_question_even_with_one_seed(tmp_path):
    spec = "gen:last_letters?rows=300&seed=0"
    loaded = _load(tmp_path, "last_letter_concatenation", train=spec, test=spec)
    assert len(loaded.splits["train"]) + len(loaded.splits["validation"]) == 300
    assert loaded.report["leaks_found"] == 0
    assert len(loaded.splits["test"]) == 300
    with pytest.raises(ConfigError, match="task=last_letter_concatenation"):
        _load(tmp_path, "coin_flip", train=spec)


def test_every_wording_of_a_generated_row_becomes_one_of_its_rationales(tmp_path):
    loaded = _load(tmp_path, task="arithmetic", train="gen:arithmetic?rows=20&wordings=3", validation_size=4)
    plain = _load(tmp_path, task="arithmetic", train="gen:arithmetic?rows=20", validation_size=4)
    for sample, usual in zip(loaded.splits["train"], plain.splits["train"], strict=True):
        assert len(sample.rationales) == 3 and sample.rationales[:1] == usual.rationales


def test_the_digest_follows_the_bytes_and_nothing_else(tmp_path):
    _write(tmp_path / "rows.jsonl", [_row(n) for n in range(20)])
    first = _load(tmp_path, train="rows.jsonl")
    assert first.source_digest == _load(tmp_path, train="rows.jsonl", validation_size=5).source_digest
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    _write(moved / "rows.jsonl", [_row(n) for n in range(20)])
    again = _load(moved, train="rows.jsonl")
    assert again.source_digest == first.source_digest
    assert digest_of(again.report) == digest_of(first.report)
    assert again.splits == first.splits
    _write(tmp_path / "rows.jsonl", [_row(n) for n in range(21)])
    assert _load(tmp_path, train="rows.jsonl").source_digest != first.source_digest
    assert (
        _load(tmp_path, train="gen:coin_flip?rows=20&seed=0").source_digest
        != _load(tmp_path, train="gen:coin_flip?rows=20&seed=1").source_digest
    )


# --- the public files --------------------------------------------------------------------------------------

TRAIN_AND_TEST_ROWS = {
    "single_eq": (356, 152),
    "addsub": (276, 119),
    "multiarith": (420, 180),
    "gsm8k": (7473, 1319),
    "aqua": (6100 - 74, 254),
    "svamp": (700, 300),
    "date_understanding": (258, 111),
    "tracking_shuffled_objects": (525, 225),
    "last_letter_concatenation": (350, 150),
    "coin_flip": (350, 150),
    "commonsense_qa": (9741, 1221),
    "strategy_qa": (1603, 687),
}
TEACHER_CORRECT_ROWS = {
    "single_eq": 289,
    "addsub": 209,
    "multiarith": 323,
    "svamp": 448,
    "date_understanding": 170,
    "tracking_shuffled_objects": 284,
    "last_letter_concatenation": 201,
    "coin_flip": 314,
    "strategy_qa": 856,
}
ALL_ROWS = ["data.keep=all", "data.duplicates=keep", "data.leaks=keep", "data.validation_size=0"]


@pytest.mark.data
@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_ready_made_config_of_a_task_reads_its_public_files(shared_data, name):
    loaded = load_data(load_config(name, [f"data.root={shared_data}", *ALL_ROWS]))
    assert (len(loaded.splits["train"]), len(loaded.splits["test"])) == TRAIN_AND_TEST_ROWS[name]
    assert all(sample.rationales for sample in loaded.splits["train"])


@pytest.mark.data
@pytest.mark.parametrize("name", TEACHER_CORRECT_ROWS)
def test_the_published_number_of_training_rows_has_a_right_teacher(shared_data, name):
    words = [f"data.root={shared_data}", *ALL_ROWS, "data.keep=teacher_correct"]
    loaded = load_data(load_config(name, words))
    assert len(loaded.splits["train"]) == TEACHER_CORRECT_ROWS[name]
    assert len(loaded.splits["test"]) == TRAIN_AND_TEST_ROWS[name][1]


@pytest.mark.data
@pytest.mark.parametrize(("name", "leaks"), [("multiarith", 5), ("strategy_qa", 1), ("svamp", 0)])
def test_the_known_leaks_of_the_published_splits_are_found(shared_data, name, leaks):
    words = [f"data.root={shared_data}", "data.keep=all", "data.duplicates=keep", "data.validation_size=0"]
    loaded = load_data(load_config(name, words))
    assert loaded.report["leaks_dropped"] == leaks
    held_out = {normalise_question(sample.question) for sample in loaded.splits["test"]}
    assert not held_out & {normalise_question(sample.question) for sample in loaded.splits["train"]}


@pytest.mark.data
@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_ready_made_config_scores_all_published_test_rows(shared_data, name):
    loaded = load_data(load_config(name, [f"data.root={shared_data}"]))
    assert len(loaded.splits["test"]) == TRAIN_AND_TEST_ROWS[name][1]


@pytest.mark.data
def test_multiarith_keeps_its_three_repeated_test_rows_and_no_leak(shared_data):
    loaded = load_data(load_config("multiarith", [f"data.root={shared_data}"]))
    questions = {
        split: [normalise_question(sample.question) for sample in rows] for split, rows in loaded.splits.items()
    }
    assert (len(questions["test"]), len(set(questions["test"]))) == (180, 177)
    # The teacher is right on 323 training rows; 4 of them ask a test question.
    assert len(questions["train"]) + len(questions["validation"]) == 323 - 4
    held_out = set(questions["validation"]) | set(questions["test"])
    assert not held_out & set(questions["train"])
    assert not set(questions["validation"]) & set(questions["test"])
    ids = [sample.id for rows in loaded.splits.values() for sample in rows]
    assert len(ids) == len(set(ids)) == 323 - 4 + 180
    assert all(len(sample.rationales) == 1 for sample in loaded.splits["train"])


@pytest.mark.data
def test_commonsense_qa_with_palm_asks_the_questions_of_fine_tune_cot(shared_data):
    loaded = load_data(load_config("commonsense_qa", [f"data.root={shared_data}", *ALL_ROWS]))
    published = json.loads((shared_data / "reasoning_teacher/dataset_acl/commonsense_qa.json").read_text())
    theirs = {normalise_question(row["question"]) for row in published}
    ours = {normalise_question(sample.question) for split in loaded.splits.values() for sample in split}
    assert ours == theirs


@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_task_has_a_ready_made_config_that_names_itself(name):
    config = load_config(name)
    assert config.task == name
    assert config.output_dir == f"runs/{name}"
    written = yaml.safe_load((Path(__file__).parents[3] / f"pst_dist/config/presets/{name}.yaml").read_text())
    assert "global_batch_size" in written["train"]
    assert config.train.learning_rate == 1e-3 and "learning_rate" not in written["train"], "it follows the student"
    assert not Path(config.data.train).is_absolute()
