"""The command line as a user meets it: help in a blink, bad input as one line with its exit code, nothing left."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import small_config
from tiny import ROWS, Tiny

from pst_dist.cli import verbs
from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.run_dir import recorded
from pst_dist.errors import LockedError
from pst_dist.storage.locks import directory_lock

GOOD = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "rationale": f"{n} and one"} for n in range(12)]


def rows_file(folder: Path, rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_config(path: Path, output: Path) -> list[str]:
    """Words that point the demo's settings at a small file of rows."""
    return [
        "demo",
        "task=null",
        f"data.train={path}",
        "data.test=null",
        "data.validation_size=2",
        f"output_dir={output}",
    ]


def run(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    code = run_verb([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_needs_neither_torch_nor_a_second():
    script = (
        "import sys, pst_dist.cli.main\n"
        "try: pst_dist.cli.main.run_verb(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'datasets', 'webdataset'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ("check", "preview", "shard", "embed", "train", "evaluate", "export", "answer", "report", "compare"):
        assert f"    {verb} " in done.stdout
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        (None, 2, "error[INPUT]"),
        ([], 2, "error["),
        (['{"question": "a", '], 2, "rows.jsonl:1"),
        ([*GOOD, {"question": "q", "rationale": "r"}], 2, "rows.jsonl:13"),
        ([*GOOD, {"question": "q", "answer": [], "rationale": "r"}], 2, "rows.jsonl:13"),
        ([{"foo": "a", "bar": "b"}] * 3, 2, "error["),
    ],
    ids=["missing", "empty", "bad json", "no answer", "wrong type", "unknown columns"],
)
def test_bad_rows_are_one_line_and_leave_no_shards(tmp_path, capsys, rows, code, words):
    path = tmp_path / "rows.jsonl" if rows is None else rows_file(tmp_path, rows)
    got, _, err = run(capsys, "shard", *rows_config(path, tmp_path / "run"))
    last = err.strip().splitlines()[-1]
    assert got == code and last.startswith("pst: error[") and words in last, err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "data" / "shards").exists()


def test_an_answer_that_fits_no_number_names_its_row(tmp_path, capsys):
    path = rows_file(tmp_path, [*GOOD, {"question": "q", "answer": "many", "rationale": "r"}])
    got, _, err = run(capsys, "shard", *rows_config(path, tmp_path / "run"), "data.answer_type=number")
    assert got == 2 and "rows.jsonl:13" in err


def test_a_row_without_rationale_is_named_by_the_arm_that_needs_it(tmp_path, capsys):
    path = rows_file(tmp_path, [{"question": row["question"], "answer": row["answer"]} for row in GOOD])
    words = rows_config(path, tmp_path / "run")
    code, _, err = run(capsys, "run", *words, "arms=[]", "arm=pst", "data.test_size=1")
    assert code == 2 and "rationale" in err.splitlines()[-1], err


def test_other_rows_in_the_same_directory_are_refused_until_told(tmp_path, capsys):
    path = rows_file(tmp_path, GOOD)
    words = rows_config(path, tmp_path / "run")
    assert run(capsys, "shard", *words)[0] == 0
    manifest = tmp_path / "run" / "data" / "shards" / "manifest.json"
    before = manifest.read_bytes()
    assert run(capsys, "shard", *words)[0] == 0
    assert manifest.read_bytes() == before
    rows_file(tmp_path, GOOD[:-1])
    code, _, err = run(capsys, "shard", *words)
    assert code == 3 and "--rebuild" in err and manifest.read_bytes() == before
    assert run(capsys, "shard", *words, "--rebuild")[0] == 0
    assert manifest.read_bytes() != before


def test_unknown_keys_and_options_are_refused(capsys):
    code, _, err = run(capsys, "config", "demo", "train.lerning_rate=1")
    assert code == 2 and "did you mean 'train.learning_rate'" in err
    code, _, err = run(capsys, "config", "demo", "--train.learning_rate", "1e-5", "--nonsense")
    assert code == 2 and "--nonsense" in err


def test_overrides_can_be_written_as_options(capsys):
    code, out, _ = run(capsys, "config", "demo", "--train.learning_rate", "1e-5", "--seed=7")
    assert code == 0 and "learning_rate: 1.0e-05" in out and "seed: 7" in out


def test_the_schema_is_json_with_help(capsys):
    code, out, _ = run(capsys, "config", "--schema")
    assert code == 0 and json.loads(out)["properties"]["arm"]["description"]


def test_check_lists_bad_rows_and_proposes_columns(tmp_path, capsys):
    rows = [{"problem": row["question"], "gold": row["answer"], "cot": row["rationale"]} for row in GOOD]
    path = rows_file(tmp_path, [*rows, "{"])
    code, out, _ = run(capsys, "check", path, "--rejects", tmp_path / "rejects.jsonl")
    assert code == 2
    assert "rows.jsonl:13" in out and "question: problem" in out and "answer: gold" in out
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 1


def test_check_lists_bad_rows_of_a_tiny_file_too(tmp_path, capsys):
    path = rows_file(tmp_path, [GOOD[0], {"question": "b"}])
    code, out, _ = run(capsys, "check", path, "--rejects", tmp_path / "rejects.jsonl")
    assert code == 2 and "rows.jsonl:2" in out and "1 kept" in out


def test_rows_given_for_a_config_are_recognised(tmp_path, capsys):
    code, _, err = run(capsys, "run", rows_file(tmp_path, GOOD))
    assert code == 2 and "these are rows, not a config" in err and "pst check" in err


def test_a_setting_given_for_a_config_is_recognised(tmp_path, capsys):
    for verb in ("run", "check", "plan"):
        code, _, err = run(capsys, verb, f"data.train={rows_file(tmp_path, GOOD)}")
        assert code == 2 and "is a setting, not a config; name the config first" in err


def test_a_machine_without_torch_can_check_and_shard_and_is_told_what_training_needs(tmp_path):
    path = rows_file(tmp_path, GOOD)
    words = rows_config(path, tmp_path / "run")
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'tokenizers', 'deepspeed'): sys.modules[name] = None\n"
        "from pst_dist.cli.main import run_verb\n"
        "sys.exit(run_verb(sys.argv[1:]))"
    )
    codes = {}
    for verb in ("check", "shard", "train"):
        done = subprocess.run(
            [sys.executable, "-c", script, verb, *words], capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        codes[verb] = done.returncode
    assert codes == {"check": 0, "shard": 0, "train": 4}, done.stderr
    assert "error[ENVIRONMENT] the package torch is not installed; pip install 'pst-dist[train]'" in done.stderr


def test_answering_without_a_student_says_what_to_run(tmp_path, capsys):
    code, _, err = run(capsys, "answer", tmp_path, "hello")
    assert code == 2 and "pst train" in err


def test_a_directory_of_several_arms_asks_for_one(tmp_path, capsys):
    for arm in ("pst", "prefix"):
        (tmp_path / arm / "best").mkdir(parents=True)
    code, _, err = run(capsys, "answer", tmp_path, "hello")
    assert code == 2 and "name one: prefix, pst" in err


@pytest.mark.encoder
def test_training_refuses_embeddings_of_other_shards_or_another_encoder(small_data, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(data, tmp_path / "run")))
    code, _, err = run(capsys, "train", path, "embed.encoder=some/other-encoder")
    assert code == 3 and "error[STALE]" in err and "some/other-encoder" in err
    code, _, err = run(capsys, "train", path, "embed.max_seq_length=8")
    assert code == 3 and "made with max_seq_length=256, but the config has 8" in err
    assert run(capsys, "shard", path, "data.max_rows=20", "--rebuild")[0] == 0
    code, _, err = run(capsys, "train", path)
    assert code == 3 and "pst embed" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.encoder
def test_preview_shows_the_loss_of_each_segment(tmp_path, capsys):
    path = rows_file(tmp_path, GOOD)
    code, out, _ = run(capsys, "preview", *rows_config(path, tmp_path / "run"), "-n", "1")
    assert code == 0
    for word in ("(answer)", "(align)", "(rationale)", "pre_thinking", "<|semantic|>"):
        assert word in out


@pytest.mark.parametrize("word", ["rows.tsv", "rows.ndjson", "gen:last_letters?rows=20&seed=0"])
def test_check_takes_whatever_data_train_takes(tmp_path, capsys, word):
    if not word.startswith("gen:"):
        mark = "\t" if word.endswith(".tsv") else None
        head = "question\tanswer\trationale\n" if mark else ""
        lines = [mark.join(row.values()) if mark else json.dumps(row) for row in GOOD]
        word = tmp_path / word
        word.write_text(head + "\n".join(lines) + "\n")
    code, out, err = run(capsys, "check", word, "--rejects", tmp_path / "rejects.jsonl")
    assert code == 0 and out.strip().endswith("ok"), err
    assert not (tmp_path / "rejects.jsonl").exists(), "an empty one would be caught by the next *.jsonl"


def test_check_never_replaces_the_rows_by_the_bad_rows(tmp_path, capsys):
    path = rows_file(tmp_path, [*GOOD, "{"])
    before = path.read_bytes()
    code, _, err = run(capsys, "check", path, "--rejects", path)
    assert code == 2 and "--rejects" in err and path.read_bytes() == before


def test_check_proposes_the_answer_type_that_json_numbers_need(tmp_path, capsys):
    path = rows_file(tmp_path, [{**row, "answer": int(row["answer"])} for row in GOOD])
    code, out, _ = run(capsys, "check", path, "--rejects", tmp_path / "rejects.jsonl")
    assert code == 2 and "  answer_type: number" in out and "data.answer_type=number" in out.splitlines()[-1]
    assert run(capsys, "check", path, "data.answer_type=number")[0] == 0


def test_preview_wants_at_least_one_row(capsys):
    for count in ("0", "-3", "x"):
        with pytest.raises(SystemExit) as end:
            run_verb(["preview", "demo", "-n", count])
        assert end.value.code == 2 and "is not a positive whole number" in capsys.readouterr().err


def test_refused_input_leaves_no_directory_at_all(tmp_path, capsys):
    path = rows_file(tmp_path, [*GOOD, "{"])
    for verb in ("shard", "embed", "train", "run"):
        assert run(capsys, verb, *rows_config(path, tmp_path / "run"), "arms=[]")[0] == 2
        assert not (tmp_path / "run").exists(), verb


def test_a_run_without_rows_to_score_is_refused_before_training(tmp_path, capsys):
    path = rows_file(tmp_path, GOOD)
    code, _, err = run(capsys, "run", *rows_config(path, tmp_path / "run"), "arms=[]", "arm=answer_only")
    assert code == 2 and "no test rows" in err and "evaluate.split=validation" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_refused_command_leaves_the_record_of_the_run_as_it_was(small_data, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(small_data, tmp_path / "run", train__max_steps=2, arm="answer_only")))
    assert run(capsys, "train", path)[0] == 0
    names = ("config.resolved.yaml", "command.txt", "environment.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    for verb in ("train", "run"):
        code, _, err = run(capsys, verb, tmp_path / "run", "train.learning_rate=0.5")
        assert code == 3 and "error[STALE]" in err
        assert [(tmp_path / "run" / name).read_bytes() for name in names] == before
    with directory_lock(tmp_path / "run"):
        assert run(capsys, "train", tmp_path / "run", "train.max_steps=9")[0] == 5
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before
    assert run(capsys, "train", tmp_path / "run")[0] == 0


def test_a_student_that_cannot_be_read_is_one_line(small_data, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(small_data, tmp_path / "run", train__max_steps=2, arm="answer_only")))
    assert run(capsys, "train", path)[0] == 0
    student = tmp_path / "student"
    shutil.copytree(tmp_path / "run" / "best", student)
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    named = [path, f"student.model_name_or_path={student}", f"output_dir={tmp_path / 'other'}"]
    code, _, err = run(capsys, "train", *named)
    assert code == 2 and err.splitlines()[-1].startswith(f"pst: error[INPUT] {student}: cannot load the student"), err
    (student / "config.json").unlink()
    for verb in ("preview", "train"):
        code, _, err = run(capsys, verb, *named)
        assert code == 2 and "cannot load the student" in err.splitlines()[-1], err
    assert not (tmp_path / "other").exists()
    code, _, err = run(
        capsys, "train", path, "student.model_name_or_path=gone/away", f"output_dir={tmp_path / 'other'}"
    )
    assert code == 4 and "network" in err


@pytest.mark.parametrize("spec", ["", "folder"])
def test_a_path_that_is_no_file_says_what_to_write(tmp_path, capsys, spec):
    rows_file(tmp_path, GOOD)
    words = rows_config(tmp_path if spec else "''", tmp_path / "run")
    code, _, err = run(capsys, "shard", *words)
    assert code == 2 and (f"'{tmp_path}/*.jsonl'" if spec else "is empty") in err


def test_a_refused_start_leaves_the_record_of_the_one_that_runs(tmp_path, monkeypatch):
    """The other one may have recorded itself and made nothing yet: its record and its lock are not ours to remove."""
    monkeypatch.chdir(tmp_path)
    first = load_config(None, ["output_dir=run", "seed=1"])
    with recorded(first):
        with pytest.raises(LockedError, match="in use by process"), recorded(load_config(None, ["output_dir=run"])):
            pass
        assert "seed: 1" in (tmp_path / "run" / "config.resolved.yaml").read_text()
        with pytest.raises(LockedError), recorded(first):
            pass
    assert (tmp_path / "run" / "config.resolved.yaml").is_file()


def test_a_disk_that_refuses_a_librarys_file_is_one_line_too(tmp_path, monkeypatch, capsys):
    def full(arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "events"))

    monkeypatch.setattr(verbs.report, "function", full)
    assert run_verb(["report", str(tmp_path)]) == 4
    assert f"pst: error[ENVIRONMENT] {tmp_path}/events: cannot write: No space left" in capsys.readouterr().err


def test_a_student_that_writes_no_rationale_says_so(tmp_path, capsys):
    Tiny("answer_only").fit().save(tmp_path / "best")
    code, out, _ = run(capsys, "answer", tmp_path, ROWS[1].question, "--explain")
    assert (code, out) == (0, f"{ROWS[1].answer}\nbecause: (this student was not trained to explain)\n")
