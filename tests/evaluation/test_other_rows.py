"""Scores of rows that are not those of the run: where they go, by which rules, and what they are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluated import make_run

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config
from pst_dist.config.locate import RESOLVED
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, DataError, InputError
from pst_dist.evaluation.compare import compare
from pst_dist.evaluation.evaluate import evaluate, evaluations_of
from pst_dist.evaluation.other_rows import evaluate_rows
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import read_json, read_lines

# The student has learnt "2 + 3?", "Say 140" and two more; `Say 140.` is the same question with other punctuation.
OTHER = (
    {"question": "Say 140.", "answer": 140},
    {"question": "Say 140, please", "answer": "140"},
    {"question": "2 + 3?", "answer": 6},
)


def rows_file(folder: Path, rows=OTHER, name: str = "other.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recorded_run(folder: Path, arm: str = "pst", **evaluation) -> Config:
    config = make_run(folder, arm, explain_rows=1, **evaluation)
    write_text(folder / RESOLVED, dump_config(config))
    return config


def with_rows(config: Config, path: Path | str, **keys) -> Config:
    task = keys.pop("task", config.task)
    data = config.data.model_copy(update={"test": str(path), **keys})
    return config.model_copy(update={"data": data, "task": task})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Config:
    config = recorded_run(tmp_path_factory.mktemp("run"))
    evaluate(config)
    return config


def test_other_rows_have_a_folder_of_their_own_and_the_test_score_stays(run, tmp_path):
    root = Path(run.output_dir)
    before = (root / "eval" / "test" / "manifest.json").read_bytes()
    results = evaluate_rows(with_rows(run, rows_file(tmp_path)))
    folder = root / "eval" / results["split"]
    assert results["split"].startswith("other-") and folder.is_dir()
    assert (root / "eval" / "test" / "manifest.json").read_bytes() == before
    rows = read_lines(folder / "samples.jsonl")
    assert [(row["question"], row["gold"], row["in_training"]) for row in rows] == [
        ("Say 140.", "140", True),
        ("Say 140, please", "140", False),
        ("2 + 3?", "6", True),
    ]
    assert rows[2]["prediction"] == "5" and not rows[2]["correct"], "the student's own answer, not the file's"
    assert rows[0]["rationale"] is not None
    source = results["source"]
    assert source["rows"] == [str(tmp_path / "other.jsonl")] and len(source["digest"]) == 64
    assert (source["rows_read"], source["bad_rows"], source["in_training"]) == (3, 0, 2)
    assert source["unseen"]["rows"] == 1 and source["unseen"]["accuracy"] == float(rows[1]["correct"])
    assert read_json(folder / "results.json") == json.loads(json.dumps(results))


def test_the_same_command_does_nothing_new_and_changed_rows_are_noticed(run, tmp_path):
    config = with_rows(run, rows_file(tmp_path))
    first = evaluate_rows(config)
    manifest = Path(run.output_dir) / "eval" / first["split"] / "manifest.json"
    stamp = manifest.stat().st_mtime_ns
    assert evaluate_rows(config) == json.loads(json.dumps(first)) and manifest.stat().st_mtime_ns == stamp
    rows_file(tmp_path, (*OTHER[:2], {"question": "2 + 3?", "answer": 5}))
    changed = evaluate_rows(config)
    assert changed["split"] != first["split"] and changed["correct"] == first["correct"] + 1
    assert manifest.stat().st_mtime_ns == stamp, "the score of the earlier rows stays"
    evaluate_rows(config, rebuild=True)


def test_rows_of_another_task_are_scored_by_its_rules(run, tmp_path):
    path = rows_file(
        tmp_path, ({"question": "Say 140", "answer": "140.0 %"}, {"question": "9 - 9 in all?", "answer": "0"})
    )
    proportion = evaluate_rows(with_rows(run, path, task="proportion"))
    assert proportion["task"] == "proportion" and proportion["correct"] == 1
    golds = [row["gold"] for row in read_lines(Path(run.output_dir) / "eval" / proportion["split"] / "samples.jsonl")]
    assert golds == ["1.4", "0"]
    text = evaluate_rows(with_rows(run, path, task=None, answer_type="text"))
    assert text["task"] == "text" and text["correct"] == 1 and text["split"] != proportion["split"]
    with pytest.raises(ConfigError, match=r"coin_flip has bool answers, but data\.answer_type is number; leave one"):
        evaluate_rows(with_rows(run, path, task="coin_flip", answer_type="number"))


def test_bad_rows_are_refused_by_name_or_counted(run, tmp_path):
    path = rows_file(tmp_path, (*OTHER, {"question": "How many?", "answer": "several"}))
    with pytest.raises(DataError, match=r"other\.jsonl:4: answer 'several' is not a number.*1 of 4 rows are bad"):
        evaluate_rows(with_rows(run, path))
    results = evaluate_rows(with_rows(run, path, max_bad=1))
    assert results["rows"] == 3 and results["source"]["bad_rows"] == 1
    with pytest.raises(DataError, match=r"no column 'answer'"):
        evaluate_rows(with_rows(run, rows_file(tmp_path, ({"question": "x"},), "bare.jsonl")))
    with pytest.raises(InputError, match="no such file"):
        evaluate_rows(with_rows(run, tmp_path / "absent.jsonl"))
    with pytest.raises(ConfigError, match=r"evaluate\.split=validation has no effect when data\.test"):
        evaluate_rows(
            with_rows(run, path).model_copy(
                update={"evaluate": run.evaluate.model_copy(update={"split": "validation"})}
            )
        )


def test_only_the_student_was_copied_here(tmp_path, caplog):
    config = recorded_run(tmp_path / "run")
    for path in sorted((tmp_path / "run" / "data" / "shards").iterdir()):
        path.unlink()
    results = evaluate_rows(with_rows(config, rows_file(tmp_path)))
    assert results["rows"] == 3 and results["source"]["in_training"] is None
    assert "cannot count the questions that are also in the training rows" in caplog.text


def test_an_adaptive_student_keeps_the_threshold_of_its_own_rows(tmp_path):
    config = recorded_run(tmp_path / "run", "adaptive")
    other = with_rows(config, rows_file(tmp_path))
    with pytest.raises(InputError, match=r"no threshold has been chosen.*run `pst evaluate` on the run's own rows"):
        evaluate_rows(other)
    evaluate(config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"think_below": 0.25})}))
    assert evaluate_rows(other)["adaptive"]["think_below"] == 0.25


def test_the_command_line_scores_other_rows_and_compares_them(tmp_path, capsys):
    roots = [Path(recorded_run(tmp_path / arm, arm).output_dir) for arm in ("pst", "answer_only")]
    path = rows_file(tmp_path)
    folders = []
    for root in roots:
        assert run_verb(["evaluate", str(root), f"data.test={path}"]) == 0
        said = capsys.readouterr().out
        folder, _, rest = said.partition(": accuracy ")
        assert "on 3 other rows" in rest and "2 questions also in the training rows" in rest
        folders.append(Path(folder))
    assert [folder.parent.parent for folder in folders] == roots and not (roots[0] / "eval" / "test").exists()
    assert run_verb(["compare", *map(str, folders)]) == 0
    assert "single_eq: 3 other-" in capsys.readouterr().out
    changed = rows_file(tmp_path, OTHER[:2], "fewer.jsonl")
    assert run_verb(["evaluate", str(roots[0]), f"data.test={changed}"]) == 0
    fewer = next(roots[0].glob("eval/fewer-*"))
    with pytest.raises(InputError, match=r"scored on different rows.*5 of 5 differ"):
        compare([folders[1], fewer])
    with pytest.raises(InputError, match=r"is not a folder of scores, but the others are; name RUN/eval/NAME"):
        compare([folders[0], roots[1]])
    same = run_verb(["evaluate", str(roots[0]), f"data.test={path}", "task=null", "data.answer_type=number"])
    assert same == 0
    as_number = next(f for f in roots[0].glob("eval/other-*") if f != folders[0])
    with pytest.raises(InputError, match=r"was scored as task number, and .* as single_eq"):
        compare([folders[1], as_number])


def test_report_and_later_readers_show_the_scores_after_the_own_ones(run, tmp_path):
    other = evaluate_rows(with_rows(run, rows_file(tmp_path)))
    splits = [results["split"] for results in evaluations_of(Path(run.output_dir), None)]
    assert splits[0] == "test" and other["split"] in splits[1:]


def test_rows_of_a_generator_and_of_several_files_have_plain_names(run, tmp_path):
    generated = evaluate_rows(with_rows(run, "gen:arithmetic?rows=3&seed=9", task="arithmetic"))
    assert generated["split"].startswith("gen-arithmetic-") and generated["rows"] == 3
    both = [str(rows_file(tmp_path, name="a b.jsonl")), str(rows_file(tmp_path, OTHER[:1], "c.jsonl"))]
    config = run.model_copy(update={"data": run.data.model_copy(update={"test": both})})
    assert evaluate_rows(config)["split"].startswith("a-b-and-1-more-")
