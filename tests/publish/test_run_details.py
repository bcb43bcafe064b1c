"""What a run's page says besides its scores: worst answers, what was left out, lengths and speed, and `report.md`."""

from __future__ import annotations

import json

import pytest
from evaluated import scored

from pst_dist.errors import InputError
from pst_dist.evaluation.scores import per_correct
from pst_dist.publish import cost_plots, markdown
from pst_dist.publish.compare_page import compare_report
from pst_dist.publish.html import Cell, Table
from pst_dist.publish.run_details import left_out, worst_rows
from pst_dist.publish.run_page import report
from pst_dist.storage.manifest import Manifest, describe_files, write_json, write_manifest


def row(name: str, *, correct: bool = False, prediction: str | None = "4", **more) -> dict:
    base = {
        "id": name,
        "question": name,
        "gold": "5",
        "prediction": prediction,
        "answer_text": " 4",
        "correct": correct,
    }
    return base | {"answer_tokens": 3, "complete": True} | more


def test_the_worst_answers_are_wrong_and_come_in_the_order_of_their_faults():
    rows = [
        row("right", correct=True, similarity=-1.0),
        row("like the teacher's", similarity=0.9, rationale="r", teacher_rationale="t"),
        row("unlike it", similarity=-0.2, rationale="other", teacher_rationale="t"),
        row("without rationale"),
        row("cut", complete=False, similarity=0.95),
        row("unparsed", prediction=None, similarity=0.99),
    ]
    table = worst_rows(rows)
    assert [cells[0] for cells in table.rows] == [
        *("unparsed", "cut", "unlike it", "like the teacher's", "without rationale"),
    ]
    assert table.rows[2][4:] == ["other", "t"] and table.head[-1] == "teacher's rationale"
    assert worst_rows(rows[:1]) is None


def test_everything_that_was_left_out_is_counted_by_stage(tmp_path):
    run = tmp_path / "run"
    (run / "data" / "shards").mkdir(parents=True)
    (run / "data" / "embeddings").mkdir()
    (run / "config.resolved.yaml").write_text(f"output_dir: {run}\n")
    report_of_rows = {"bad_rows": 2, "duplicates_dropped": 0, "leaks_dropped": 7}
    for kind, extra in (("shards", {"report": report_of_rows}), ("embeddings", {"truncated": 1234})):
        folder = run / "data" / kind
        write_json(folder / "x.json", {})
        write_manifest(folder, Manifest(kind, "f", describe_files(folder, ["x.json"]), extra))
    metrics = [
        {"step": 3, "bad_step": "the loss is not finite", "outcome": "skipped", "samples": []},
        {"step": 9, "bad_step": "again", "outcome": "rolled back to the weights of step 4", "samples": []},
    ]
    results = {"split": "test", "rows": 300, "incomplete": 4, "unparsed": 0, "milliseconds_to_answer": {"rows": 20}}
    table = left_out(run, metrics, [results])
    assert [(cells[0], cells[2].text) for cells in table.rows] == [
        ("rows", "2"),
        ("rows", "7"),
        ("embeddings", "1,234"),
        ("training", "1"),
        ("training", "1"),
        ("evaluation, test", "4"),
        ("evaluation, test", "280"),
    ]
    nothing = left_out(tmp_path / "none", [], [])
    assert nothing.rows == [["all", "nothing", Cell("0", "right")]]


def test_a_run_gets_its_tables_as_markdown_beside_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    run = scored(tmp_path / "run", "pst", "1001")
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": k, "loss": 2.0 / k, "answer_nll": 1.0 / k, "tokens_per_second": 900.0, "padding": 0.1})
            + "\n"
            for k in (1, 2, 3)
        )
    )
    (run / "best").mkdir()
    write_json(run / "best" / "config.json", {})
    student = Manifest("student", "f", describe_files(run / "best", ["config.json"]), {"arm": "pst"})
    write_manifest(run / "best", student)
    results = json.loads((run / "eval" / "test" / "results.json").read_text())
    more = {"student": {"digest": student.digest}, "shards": "s", "device": "cpu", "parameters": 9}
    more |= {"rows_per_second": 1.0, "contains_answer": 0.5}
    write_json(run / "eval" / "test" / "results.json", results | more)
    folder = run / "eval" / "test"
    write_manifest(folder, Manifest("evaluation", "pst", describe_files(folder, ["results.json", "samples.jsonl"])))
    page = report(run).read_text()
    text = (run / "report.md").read_text()
    for words in ("Worst answers", "Skipped, dropped or cut", "tokens, milliseconds per correct answer", "6.0, 25.0"):
        assert words in page and words in text, words
    assert "| question 1 | 5 | 4 | 3 |" in text and "![Tokens of training sequences per second" in text
    assert (run / "plots" / "throughput.png").is_file() and (run / "plots" / "lengths.png").is_file()
    assert "rows whose latency was not measured" not in page, "latency_rows is 5 of 4 rows"
    (run / "report.md").write_text("my notes")
    with pytest.raises(InputError, match="exists and was not written by pst"):
        report(run)


def test_a_comparison_gets_its_tables_as_markdown(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [scored(tmp_path / "a", "answer_only", "0101"), scored(tmp_path / "b", "pst", "1101")]
    compare_report(runs, tmp_path / "page.html")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("<!-- generator: pst_dist -->\n# svamp: 2 arms") and "pst answers 75.0 %" in text
    assert "tokens per correct answer" in text and "| answer\\_only |" in text


def test_markdown_shows_any_text_as_text():
    assert markdown.escaped("<b>|x|</b>\n*y* & `z`") == "\\<b\\>\\|x\\|\\</b\\> \\*y\\* &amp; \\`z\\`"
    assert markdown.fenced("a ``` b").startswith("````text\n")
    table = markdown.table(Table(["a", Cell("n", "right")], [["x", Cell("1", "right")], [Cell("y", "yes"), "2"]]))
    assert table == "| a | n |\n| --- | ---: |\n| x | 1 |\n| **y** | 2 |"
    assert markdown.table(Table([], [["name", Cell("a|b`c", "mono")]])).endswith("| name | `a/bc` |")


def test_costs_per_correct_answer_and_plots_without_data():
    results = {"accuracy": 0.5, "tokens_to_answer": {"mean": 3.0}, "milliseconds_to_answer": {"median": 10.0}}
    assert per_correct(results) == ("6.0", "20.0")
    assert per_correct(results | {"accuracy": 0.0}) == ("none correct", "none correct")
    assert per_correct(results | {"milliseconds_to_answer": None}) == ("6.0", "")
    assert cost_plots.throughput_plot([{"step": 1, "tokens_per_second": 3.0}]) is None
    assert cost_plots.lengths_plot([]) is None
