"""The pages: what they must show, that nothing in them is fetched, and that no datum becomes markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluated import scored
from jinja2 import UndefinedError

from pst_dist.arms import ARMS
from pst_dist.errors import InputError, StaleError
from pst_dist.publish import html, plots
from pst_dist.publish.render import render
from pst_dist.publish.run_page import compare_report, report
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import (
    Manifest,
    append_line,
    canonical_json,
    describe_files,
    read_json,
    read_lines,
    write_json,
    write_manifest,
)

EVIL = "<script>alert(1)</script> & \"quoted\" 'text'"


class Reader(HTMLParser):
    """Collects tags, attributes and text; complains about a tag that is closed but was never opened."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def checked(path: Path) -> Reader:
    """Parse a page and hold it to what every page promises."""
    html = path.read_text(encoding="utf-8")
    reader = Reader(html)
    assert "script" not in reader.tags and "link" not in reader.tags and "iframe" not in reader.tags
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert "url(" not in html and "@import" not in html
    for data in re.findall(r"base64,([^\"]+)", html):
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    return reader


def finished(path: Path, arm: str, right: str, *, tokens: int = 4, question: str = EVIL) -> Path:
    """A run directory as training and evaluation leave it."""
    scored(path, arm, right, tokens=tokens, questions={0: question})
    results = path / "eval" / "test" / "results.json"
    extra = {
        "chance": 0.5,
        "majority": 0.6,
        "contains_answer": 0.9,
        "rows_per_second": 41.0,
        "device": "cpu (x86_64)",
        "parameters": 12345,
        "student": {"digest": "d" * 64, "step": 20},
        "shards": "e" * 64,
        "training": {"steps": 20, "seconds": 33.0, "tokens": 4567},
    }
    write_json(results, {**read_json(results), **extra})
    files = describe_files(results.parent, ["results.json", "samples.jsonl"])
    write_manifest(results.parent, Manifest("evaluation", arm, files))
    aligned = arm == "pst"
    for step in range(5, 25, 5):
        row = {"step": step, "answer_nll": 3 / step, "gradient_share_answer": 0.7, "loss": 1.0}
        if aligned:
            row |= {"rationale_nll": 4 / step, "alignment": 0.9, "cosine": step / 40}
            row |= {"gradient_share_rationale": 0.2, "gradient_share_alignment": 0.1}
        append_line(path / "metrics.jsonl", row)
        append_line(path / "metrics.jsonl", {"step": step, "validation": {"answer_nll": 3.2 / step, "accuracy": 0.5}})
    training = {
        "steps": 20,
        "seconds": 33.0,
        "tokens": 4567,
        "best_step": 15,
        "best_value": 0.2,
        "metric": "answer_nll",
    }
    write_json(path / "train.json", training)
    write_text(path / "command.txt", f"pst run 'my {EVIL}.yaml'\n")
    write_text(path / "config.resolved.yaml", f"arm: {arm}\nnote: https://example.org {EVIL}\n")
    write_json(path / "environment.json", {"python": "3.12", "torch": "2.8"})
    return path


def rewrite_samples(run: Path, changes: dict) -> None:
    """Change every scored row, and have the manifest agree."""
    path = run / "eval" / "test"
    rows = [{**row, **changes} for row in read_lines(path / "samples.jsonl")]
    write_text(path / "samples.jsonl", "".join(canonical_json(row) + "\n" for row in rows))
    write_manifest(path, Manifest("evaluation", "x", describe_files(path, ["results.json", "samples.jsonl"])))


def test_a_runs_page_shows_plots_scores_answers_and_record_and_fetches_nothing(tmp_path):
    run = finished(tmp_path / "run", "pst", "1101")
    assert report(run) == run / "report.html"
    reader = checked(run / "report.html")
    drawn = {entry.name for entry in (run / "plots").iterdir()}
    names = ("loss", "cosine", "gradient_shares", "validation", "validation_accuracy", "lengths")
    assert drawn == {f"{name}.png" for name in names}
    assert len(reader.links) == 6
    for words in ("75.00 %", "21.65 points", "4.0, 4, 4", "12.5, 14.0", "33 s", "4,567 tokens", "d" * 64, "e" * 64):
        assert words in reader.text, words
    assert EVIL in reader.text and "python: 3.12" in reader.text and "arm: pst" in reader.text


def test_a_run_that_was_not_evaluated_is_shown_as_far_as_it_got(tmp_path):
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "answer_nll": 2.0})
    reader = checked(report(tmp_path))
    assert "Not evaluated yet" in reader.text and len(reader.links) == 1


def test_a_lost_curve_does_not_hide_the_scores(tmp_path):
    run = finished(tmp_path / "run", "pst", "1101")
    (run / "metrics.jsonl").unlink()
    reader = checked(report(run))
    assert "75.00 %" in reader.text and reader.links == []


def test_scores_of_an_older_student_are_not_told_as_this_ones(tmp_path):
    run = finished(tmp_path / "run", "pst", "1101")
    other = finished(tmp_path / "other", "answer_only", "1101")
    write_json(run / "best" / "config.json", {})
    write_manifest(run / "best", Manifest("student", "f", describe_files(run / "best", ["config.json"])))
    reader = checked(report(run))
    assert "Not evaluated yet" in reader.text and "75.00 %" not in reader.text
    with pytest.raises(StaleError, match="older student; run `pst evaluate` again"):
        compare_report([run, other], tmp_path / "compare.html")


def test_a_directory_without_a_training_is_refused_and_left_as_it_was(tmp_path):
    with pytest.raises(InputError, match="run `pst train` first"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def compared(tmp_path) -> Reader:
    runs = [
        finished(tmp_path / "pst", "pst", "1111111110"),
        finished(tmp_path / "answer_only", "answer_only", "1111000000"),
        finished(tmp_path / "pre_thinking", "pre_thinking", "1111111001", tokens=52),
    ]
    target = tmp_path / "pages" / "compare.html"
    assert compare_report(runs, target) == target
    return checked(target)


def test_the_comparison_holds_every_arm_with_error_interval_and_token_ratio(compared):
    for words in ("90.00", "9.49", "+50.00", "0.062", "13.0x", "baseline", "answer_only", "Guessing gives 50.0 %"):
        assert words in compared.text, words
    assert len(compared.links) == 2
    assert "pst compare" in compared.text and "config.resolved.yaml" in compared.text


def test_sample_answers_start_with_rows_on_which_the_arms_disagree(compared):
    table = compared.text[compared.text.index("Sample answers") :]
    # Rows 0 to 3 are right everywhere; 4 to 9 are not.
    assert "6 rows on which the arms disagree, then 4 others" in table
    assert table.index("question 4") < table.index("question 9") < table.index("question 1")


def test_a_missing_plot_library_is_one_line_that_names_the_extra(monkeypatch):
    import sys

    from pst_dist.errors import EnvironmentFault

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'pst-dist\[report\]'"):
        plots.loss_plot([{"step": 1, "answer_nll": 1.0}])


def test_series_take_only_rows_that_hold_a_number():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": None}, {"step": 3, "validation": {"loss": 5.0}}]
    assert plots.series(rows, "loss") == ([1], [2.0])
    assert plots.validation_series(rows, "loss") == ([3], [5.0])


def test_a_dot_at_the_top_of_a_picture_is_whole():
    from matplotlib.figure import Figure

    from pst_dist.publish.plots import from_zero

    axis = Figure().subplots()
    axis.plot([20], [3.2], "o")
    axis.plot([20], [3.4], "o")
    from_zero(axis)
    low, high = axis.get_ylim()
    assert low == 0 and high > 3.4 + 0.03 * high


def test_pictures_are_shown_at_half_their_pixels():
    png = plots.loss_plot([{"step": 1, "answer_nll": 1.0}, {"step": 2, "answer_nll": 0.5}])
    width = int.from_bytes(png[16:20], "big")
    assert html.Figure(png, "caption").width == width // 2


HOSTILE = f"{EVIL} {{{{ 7 * 7 }}}} {{% raise %}} {{# gone #}} a\0b"
SHOWN = HOSTILE.replace("\0", "\ufffd")


def test_hostile_questions_answers_and_names_become_text_on_both_pages(tmp_path):
    runs = [
        finished(tmp_path / f"{EVIL.replace('/', '|')} {{{{ 7 * 7 }}}} \udcff {arm}", arm, "10", question=HOSTILE)
        for arm in ("pst", "answer_only")
    ]
    for run in runs:
        rewrite_samples(run, {"gold": f"gold {HOSTILE}", "prediction": f"said {HOSTILE}"})
    for page in (report(runs[0]), compare_report(runs, tmp_path / "compare.html")):
        reader = checked(page)
        for words in (SHOWN, f"gold {SHOWN}", f"said {SHOWN}"):
            assert words in reader.text, words
        assert "49" not in reader.text
        assert page.read_text().count("<script") == 0
    reader = checked(runs[0] / "report.html")
    name = runs[0].name.replace("\udcff", "\ufffd")
    assert reader.text.count(f"Run {name}") == 2, "once in the title, once in the heading, escaped once"


def test_an_answer_that_could_not_be_parsed_is_told_with_the_start_of_its_text(tmp_path):
    run = finished(tmp_path / "run", "pst", "10")
    rewrite_samples(run, {"prediction": None, "answer_text": " <b>maybe</b>\n", "correct": False})
    assert "unparsed: '<b>maybe</b>'" in checked(report(run)).text


def test_a_value_that_a_template_lacks_is_an_error_and_not_an_empty_place():
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render("run.html")


def test_two_runs_of_one_arm_share_its_colour_and_differ_in_their_dash(tmp_path):
    from pst_dist.evaluation.compare import compare

    runs = [scored(tmp_path / str(seed), "pst", "10", seed=seed) for seed in (0, 1)]
    first, second = plots.styles(compare(runs))
    assert first["color"] == second["color"] == ARMS["pst"].colour
    assert first["linestyle"] != second["linestyle"]


def test_arms_with_nearly_equal_tokens_are_drawn_side_by_side_around_their_middle():
    places = plots.apart([4.0, 100.0, 4.0, 4.1])
    assert places[1] == 100.0
    left, middle, right = places[0], places[2], places[3]
    assert left < middle < right and abs(middle - (4.0 * 4.1) ** 0.5) < 1e-9
    assert right / left < 1.2
    assert plots.apart([7.0]) == [7.0]
