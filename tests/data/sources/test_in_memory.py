"""Rows given as Python objects: one canonical file whatever they came in, and faults named by row and key."""

import datetime
import decimal
import json

import numpy as np
import pytest

from pst_dist.config.loading import load_config
from pst_dist.data.sources import load_data
from pst_dist.data.sources.in_memory import is_in_memory, rows_file
from pst_dist.errors import DataError

ROWS = [
    {"question": f"What is {n} + 1?", "answer": n + 1, "why": {"text": f"{n} and one", "steps": [n, 1]}}
    for n in range(6)
]


def lines(rows, split="train"):
    return [json.loads(line) for line in rows_file(rows, split).content.decode().splitlines()]


def test_every_container_gives_the_bytes_of_the_same_file():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    wanted = b"".join(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n" for row in ROWS)
    shuffled = [dict(reversed(row.items())) for row in ROWS]
    for rows in (
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        shuffled,
        pandas.DataFrame(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_format("numpy"),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    ):
        assert rows_file(rows, "train").content == wanted, type(rows)


def test_a_missing_value_is_null_and_never_the_text_nan():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "question": ["a", "b", "c"],
            "answer": [5, None, 7],
            "text": ["x", None, "z"],
            "when": [pandas.Timestamp("2024-05-01"), pandas.NaT, pandas.Timestamp("2024-05-02 13:00")],
            "maybe": pandas.array([True, pandas.NA, False], dtype="boolean"),
            "share": [0.5, float("nan"), 1.5],
        }
    )
    first, second, _ = lines(frame)
    assert second == {"question": "b", "answer": None, "text": None, "when": None, "maybe": None, "share": None}
    assert first["answer"] == 5 and isinstance(first["answer"], int), "pandas made it 5.0 because of the gap"
    assert first["when"] == "2024-05-01T00:00:00" and first["maybe"] is True and first["share"] == 0.5
    assert lines([{"a": float("nan"), "b": [np.float32("nan"), None], "c": decimal.Decimal("NaN")}]) == [
        {"a": None, "b": [None, None], "c": None}
    ]


def test_numpy_dates_and_decimals_become_plain_values():
    row = {
        "int": np.int64(3),
        "float": np.float64(0.25),
        "half": np.float16(0.5),
        "bool": np.bool_(True),
        "text": np.str_("t"),
        "matrix": np.array([[1, 2], [3, 4]]),
        "objects": np.array(["a", None], dtype=object),
        "moment": np.datetime64("2024-05-01T12:00:00.000000000"),
        "day": datetime.date(2024, 5, 1),
        "price": decimal.Decimal("1.10"),
        "pair": (1, 2),
    }
    assert lines([row]) == [
        {
            "int": 3,
            "float": 0.25,
            "half": 0.5,
            "bool": True,
            "text": "t",
            "matrix": [[1, 2], [3, 4]],
            "objects": ["a", None],
            "moment": "2024-05-01T12:00:00.000000000",
            "day": "2024-05-01",
            "price": "1.10",
            "pair": [1, 2],
        }
    ]


def test_narrow_floats_keep_the_decimals_that_were_written():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    assert lines([{"a": np.float32(0.1), "b": np.array([2.7], np.float16)}]) == [{"a": 0.1, "b": [2.7]}]
    assert lines(pandas.DataFrame({"a": np.array([0.1, np.nan], np.float32)})) == [{"a": 0.1}, {"a": None}]
    features = datasets.Features({"a": datasets.Value("float32"), "b": datasets.Sequence(datasets.Value("float32"))})
    assert lines(datasets.Dataset.from_dict({"a": [0.1], "b": [[0.3]]}, features=features)) == [{"a": 0.1, "b": [0.3]}]


def test_class_labels_are_names_and_a_named_index_is_a_column():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.ClassLabel(names=["no", "yes"])})
    assert lines(datasets.Dataset.from_dict({"q": ["x"], "a": [1]}, features=features)) == [{"q": "x", "a": "yes"}]
    frame = pandas.DataFrame({"id": ["r7"], "q": ["x"]})
    assert lines(frame.set_index("id")) == [{"id": "r7", "q": "x"}]
    assert lines(frame) == [{"id": "r7", "q": "x"}]


@pytest.mark.parametrize(
    ("rows", "where", "what"),
    [
        ([], "data.train", "contains no rows"),
        ({"question": ["a"], "answer": ["b"]}, "data.train", "mapping with question, answer"),
        (7, "data.train", "is int, not rows"),
        (b"rows", "data.train", "is bytes"),
        (["text", {"a": 1}], "data.train row 1", "is str, not a dict"),
        ([{"a": 1}, ["b"]], "data.train row 2", "is list, not a dict"),
        ([{"a": 1}, {"a": {"b": [0, {1, 2}]}}], "data.train row 2", "a.b[1] is set"),
        ([{"a": b"bytes"}], "data.train row 1", "a is bytes"),
        ([{"a": {3: 1}}], "data.train row 1", "key a.3 is int"),
        ([{"a": float("inf")}], "data.train row 1", "a is infinite"),
        ([{"a": np.array([1.0, -np.inf])}], "data.train row 1", "a[1] is infinite"),
        ([{"a": np.timedelta64(3, "s")}], "data.train row 1", "a is NumPy timedelta64"),
        ([{"a": "\ud800"}], "data.train row 1", "half of a surrogate pair"),
        ([{"a": 10**5000}], "data.train row 1", "cannot be written as JSON"),
    ],
)
def test_a_value_without_a_form_is_refused_by_row_and_key(rows, where, what):
    with pytest.raises(DataError) as caught:
        rows_file(rows, "train")
    assert caught.value.where == where and what in caught.value.what and caught.value.remedy


def test_a_row_that_contains_itself_ends_in_an_error():
    row = {}
    row["self"] = row
    with pytest.raises(DataError, match="nested deeper"):
        rows_file([row], "train")


def test_columns_of_a_frame_must_have_one_text_name_each():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="duplicate"):
        rows_file(pandas.DataFrame([[1, 2]], columns=["a", "a"]), "train")
    with pytest.raises(DataError, match="of the frame is not text"):
        rows_file(pandas.DataFrame([[1, 2]]), "train")
    with pytest.raises(DataError, match="contains no rows"):
        rows_file(pandas.DataFrame({"a": []}), "train")


def test_paths_are_no_rows(tmp_path):
    assert not any(map(is_in_memory, (None, "rows.jsonl", tmp_path, ["a.jsonl", tmp_path])))
    assert all(map(is_in_memory, ([], [{}], ({},), {"a": 1}, 5)))


def test_the_file_is_written_once_and_restored_when_damaged(tmp_path):
    made = rows_file(ROWS, "test")
    path = made.write(tmp_path)
    assert path.name == "test.jsonl" and path.read_bytes() == made.content
    before = path.stat().st_mtime_ns
    assert made.write(tmp_path) == path and path.stat().st_mtime_ns == before
    path.write_bytes(b"{}\n")
    made.write(tmp_path)
    assert path.read_bytes() == made.content
    assert rows_file(ROWS[:-1], "test").write(tmp_path) != path


def test_nested_columns_are_read_from_objects_as_from_files(tmp_path):
    path = rows_file(ROWS, "train").write(tmp_path)
    config = load_config(
        None,
        [f"data.train={path}", "data.answer_type=number", "data.validation_size=0"],
        keys={"data": {"columns": {"question": "question", "answer": "answer", "rationale": "why.text"}}},
    )
    sample = load_data(config).splits["train"][3]
    assert (sample.answer, sample.rationales, sample.source) == ("4", ("3 and one",), "train.jsonl:4")
