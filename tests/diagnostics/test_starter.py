"""`pst check rows.jsonl --write my.yaml`: the config that is written reads the rows right and can be run."""

from __future__ import annotations

import json

import pytest
import yaml

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.data.sources import load_data
from pst_dist.diagnostics.dry_run import dry_run


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, rows):
    with open(name, "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def sums(first=0, count=40):
    numbers = range(first, first + count)
    return [{"problem": f"{n} plus 1?", "final_answer": n + 1, "explanation": f"One more than {n}."} for n in numbers]


def test_the_written_config_reads_the_rows_and_can_be_run(capsys):
    write("rows.jsonl", sums())
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: pst run my.yaml"
    config = load_config("my.yaml")
    assert (config.output_dir, config.arms) == ("runs/my", ["pst", "answer_only"])
    assert config.data.columns == {"question": "problem", "answer": "final_answer", "rationale": "explanation"}
    assert config.data.answer_type == "number"
    splits = load_data(config).splits
    assert sum(map(len, splits.values())) == 40 and len(splits["test"]) > 0 and len(splits["validation"]) > 0
    by_question = {sample.question: sample for rows in splits.values() for sample in rows}
    assert by_question["7 plus 1?"].answer == "8" and by_question["7 plus 1?"].rationales == ("One more than 7.",)
    small = {"student": {"fresh": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}}, "train": {"max_steps": 1}}
    assert dry_run(load_config("my.yaml", [f"{k}={json.dumps(v)}" for k, v in small.items()])).exit_code == 0


def test_rows_without_rationales_train_answers_only():
    write("rows.jsonl", [{"question": f"{n} plus 1?", "answer": n + 1} for n in range(40)])
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 0
    assert load_config("my.yaml").arm == "answer_only"
    with open("my.yaml") as stream:
        assert "`pst teach` asks a teacher for rationales" in stream.read()


def test_a_rationale_column_that_is_always_empty_is_none():
    write("rows.jsonl", [{**row, "explanation": ""} for row in sums()])
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 0
    assert load_config("my.yaml").arm == "answer_only"


def test_options_and_their_letters_make_it_a_choice():
    rows = [{"question": f"Which is {n}?", "choices": [str(n), "none"], "answer": "A"} for n in range(40)]
    write("rows.jsonl", rows)
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 0
    config = load_config("my.yaml")
    assert config.data.answer_type == "choice"
    assert load_data(config).splits["train"][0].question.endswith("(B) none.")


def test_several_files_and_keys_of_the_command_line_are_written():
    write("one.jsonl", sums())
    write("two.jsonl", sums(40))
    words = ["data.test_size=10", "train.max_steps=7", "data.max_bad=1"]
    assert run_verb(["check", "one.jsonl", "two.jsonl", *words, "--write", "my.yaml"]) == 0
    config = load_config("my.yaml")
    assert config.data.train == ["one.jsonl", "two.jsonl"]
    assert (config.data.test_size, config.train.max_steps, config.data.max_bad) == (10, 7, 1)
    assert config.data.columns["rationale"] == "explanation"


def test_a_chosen_map_is_kept():
    write("rows.jsonl", sums())
    words = ["data.columns={question: problem, answer: final_answer}", "data.answer_type=number", "arm=answer_only"]
    assert run_verb(["check", "rows.jsonl", *words, "--write", "my.yaml"]) == 0
    with open("my.yaml") as stream:
        written = yaml.safe_load(stream)
    assert written["data"]["columns"] == {"question": "problem", "answer": "final_answer"}
    assert written["arm"] == "answer_only"


def test_rows_that_need_a_decision_are_listed_and_the_config_is_there_to_edit(capsys):
    rows = [{"question": f"Which is {n}?", "choices": [str(n), "x", "y"], "answer": 1} for n in range(40)]
    write("rows.jsonl", rows)
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 2
    assert "answer_from_0 or answer_from_1" in capsys.readouterr().out
    assert load_config("my.yaml").data.answer_type == "choice"


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"wer": "Who?", "was": "me"}], ["--write", "my.yaml"], "no column 'question'"),
        (sums(), ["--write", "my.txt"], "a config is a YAML file"),
        (sums(), ["--write", "there.yaml"], "exists and will not be overwritten"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(rows, words, message, tmp_path, capsys):
    (tmp_path / "there.yaml").write_text("arm: pst\n")
    write("rows.jsonl", rows)
    assert run_verb(["check", "rows.jsonl", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "my.yaml").exists() and (tmp_path / "there.yaml").read_text() == "arm: pst\n"


TABLES = [
    {"question": f"How many in {n}?", "table": f"in {n} | {n}", "answer": n, "explanation": "r"} for n in range(9)
]


@pytest.mark.parametrize("words", [[], ["data.max_bad=100%"]])
def test_a_column_that_a_guess_must_not_leave_out_is_not_left_out_by_the_written_config(words, tmp_path, capsys):
    write("rows.jsonl", TABLES)
    assert run_verb(["check", "rows.jsonl", *words, "--write", "my.yaml"]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl:1: column 'table' would not be read, but the question may depend on it" in said
    assert not (tmp_path / "my.yaml").exists()
    (_, word, _) = said.rpartition("add ")[2].split("'", 2)  # followed literally
    assert run_verb(["check", "rows.jsonl", word, "data.duplicates=keep", "--write", "my.yaml"]) == 0
    samples = [sample for rows in load_data(load_config("my.yaml")).splits.values() for sample in rows]
    assert {sample.question for sample in samples} == {f"in {n} | {n}\n\nHow many in {n}?" for n in range(9)}


def test_the_proposed_columns_have_the_column_that_the_row_was_refused_for(capsys):
    write("rows.jsonl", [*TABLES, {**TABLES[0], "table": None, "question": "Who?"}])
    assert run_verb(["check", "rows.jsonl"]) == 2
    assert '    question: "{table?}\\n\\n{question}"' in capsys.readouterr().out.splitlines()


def test_a_column_that_no_text_can_hold_may_be_left_out_on_purpose(capsys):
    write("rows.jsonl", [{**row, "table": None, "context": [["T", ["A line."]]]} for row in TABLES])
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 2
    said = capsys.readouterr().err
    assert "column 'context' would not be read" in said and "to the command to leave it out" in said


def test_columns_that_may_be_rationales_are_named_in_the_config(tmp_path):
    write("rows.jsonl", [{**row, "explanation": None, "r1_solution_1": "So it is one more."} for row in sums()])
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 0
    assert "# Columns of text that are not read: r1_solution_1\n" in (tmp_path / "my.yaml").read_text()


def test_a_config_that_cannot_be_used_is_not_left_in_the_way_of_the_next_one(tmp_path, capsys):
    write("rows.jsonl", sums(count=1))
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 2
    assert "leaves none of the 1 questions for training" in capsys.readouterr().err
    assert not (tmp_path / "my.yaml").exists()


def test_the_next_command_can_be_pasted_also_if_the_name_has_spaces(capsys):
    write("rows.jsonl", sums())
    assert run_verb(["check", "rows.jsonl", "--write", "my rows.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: pst run 'my rows.yaml'"


def test_a_config_is_not_written_from_a_config(capsys):
    assert run_verb(["check", "demo", "--write", "my.yaml"]) == 2
    assert "makes a config from rows, and this is a config" in capsys.readouterr().err


def test_a_scale_of_the_answer_is_not_left_out(capsys):
    """TAT-QA's rows: 1.99 with a scale of million is 1,990,000; in a written config no guess would refuse it again."""
    rows = [{"question": f"How much in {n}?", "answer": n / 1000, "scale": "million"} for n in range(1, 41)]
    write("rows.jsonl", rows)
    assert run_verb(["check", "rows.jsonl", "--write", "my.yaml"]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl:1: column 'scale' would not be read, but it scales the answer ('million')" in said
    assert "set data.columns.answer='{answer} {scale?}'" in said
    words = ["data.columns.answer={answer} {scale?}", "data.answer_type=number"]
    assert run_verb(["check", "rows.jsonl", *words, "--write", "my.yaml"]) == 0
    splits = load_data(load_config("my.yaml")).splits.values()
    assert {sample.answer for rows in splits for sample in rows if sample.question == "How much in 7?"} == {"7000"}
