"""The lm-evaluation-harness on an export, with the task that we ship: the accuracy of `pst evaluate`, row by row."""

import ast
import json
import subprocess
import sys

import chats
import pytest
from talking import TALKS, messages
from tiny import ROWS, Tiny, fitted

from pst_dist.cli.main import run_verb
from pst_dist.config.schema import Config
from pst_dist.data.tasks import TASKS, get_task
from pst_dist.evaluation.evaluate import evaluate
from pst_dist.pipeline import make_shards
from pst_dist.publish.export import export
from pst_dist.publish.lm_eval import utils_source, write_lm_eval_task
from pst_dist.storage.manifest import read_json

STRANGE = ("How many is 8 + 1?", "Say 140 {{x}} or {% if %}", ' "17" is\n it?  ', "2 + 3?")
NUMBERS = [(row.question, row.answer) for row in ROWS] + [(text, "5") for text in STRANGE]
TEXTS = [("Spell it: ab", "ab"), ("Spell it: k", "k"), ("Spell it: zz", "zz")]
CHOICES = [("Which? (A) an ant (B) a bee", "B"), ("Which? (A) no (B) yes (C) C", "A"), ("Pick (E)", "E")]
SAYS = [("Is snow white?", "yes"), ("Is coal white? no, is it?", "no"), ("Do you know?", "yes")]
CASES = {
    "number-gpt2": ("svamp", "gpt2", "pst", {}, NUMBERS),
    "number-semantic-before-t5": ("gsm8k", "t5", "pst", {"semantic_position": "before"}, NUMBERS),
    "choice-t5": ("aqua", "t5", "post_thinking", {}, CHOICES),
    "choice-semantic-before-gpt2": ("commonsense_qa", "gpt2", "pst", {"semantic_position": "before"}, CHOICES),
    "yes-no-pre-thinking-llama": ("strategy_qa", "llama", "pre_thinking", {}, SAYS),
    "text-t5": ("last_letter_concatenation", "t5", "answer_only", {"prompt": "{question}"}, TEXTS),
    "text-prefix-gpt2": ("last_letter_concatenation", "gpt2", "prefix", {}, TEXTS),
}


def rows_of(pairs):
    """Training rows that the student learns; for the harness they are the test rows, with some that it gets wrong."""
    from pst_dist.data.sample import ReasoningSample

    return tuple(
        ReasoningSample(id=f"r-{k}", question=question, answer=answer, rationales=("so it is",), answer_type="text")
        for k, (question, answer) in enumerate(pairs)
    )


def finished_run(folder, case):
    """A run directory with a student that has learnt half of its test rows, evaluated and exported."""
    task, architecture, arm, layout, pairs = CASES[case]
    lines = [{"question": q, "answer": a, "rationale": "so it is"} for q, a in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.jsonl").write_text(json.dumps({**lines[0], "question": "Of no account"}) + "\n")
    tiny = Tiny(arm, architecture, layout=layout, rows=rows_of(pairs[: len(pairs) // 2 + 1])).fit()
    config = Config.model_validate(
        {
            **tiny.config.model_dump(),
            "task": task,
            "output_dir": str(folder / "run"),
            "data": {
                "train": str(folder / "train.jsonl"),
                "test": str(folder / "rows.jsonl"),
                "validation_size": 0,
            },
            "evaluate": {"max_new_tokens": 24, "latency_rows": 0, "explain_rows": 0},
        }
    )
    make_shards(config)
    tiny.save(folder / "run" / "best")
    evaluate(config)
    export(config)
    return config


AS_THE_HARNESS = """
import importlib.util, sys
sys.modules["pst_dist"] = None
spec = importlib.util.spec_from_file_location("/where/it/lies/utils", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)  # not in sys.modules before
print(module.TASK)
"""


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_rules_are_ours_and_need_nothing_of_this_package(task, tmp_path):
    fmt = fitted("post_thinking").format
    source = utils_source(get_task(task), fmt)
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not any(name.startswith("pst_dist") for name in imported), imported
    path = tmp_path / "utils.py"
    path.write_text(source)
    done = subprocess.run([sys.executable, "-c", AS_THE_HARNESS, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(get_task(task)), done.stderr


def test_pst_export_writes_the_task_beside_the_export_and_says_the_command(tmp_path, capsys):
    config = finished_run(tmp_path, "text-prefix-gpt2")
    (tmp_path / "c.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    before = sorted((tmp_path / "run" / "export").rglob("*"))
    assert run_verb(["export", str(tmp_path / "c.yaml"), "--lm-eval"]) == 0
    said = capsys.readouterr().out
    assert f"lm_eval --model hf --model_args pretrained={tmp_path / 'run' / 'export'} --include_path" in said
    assert sorted(path.name for path in (tmp_path / "run" / "lm_eval").iterdir()) == [
        "pst_last_letter_concatenation.yaml",
        "rows.jsonl",
        "utils.py",
    ]
    assert sorted((tmp_path / "run" / "export").rglob("*")) == before, "test rows are not part of what is published"
    rows = [json.loads(line) for line in (tmp_path / "run" / "lm_eval" / "rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"predict: {question} ###" for question, _ in TEXTS]


def test_conversations_are_asked_as_turns(talking_run):
    folder = write_lm_eval_task(talking_run)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    (template,) = {chats.TEMPLATES["qwen"]}
    told = [row["prompt"] for row in rows]
    import jinja2

    render = jinja2.Environment().from_string(template).render
    assert told == [render(messages=messages(sample), add_generation_prompt=True) for sample in TALKS]
    assert [row["gold"] for row in rows] == ["140", "41", "141", "14"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_harness_gives_our_accuracy_row_by_row(case, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: pip install 'pst-dist[lm-eval]'")
    config = finished_run(tmp_path, case)
    folder, name = write_lm_eval_task(config), f"pst_{config.task}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf"]
    command += ["--model_args", f"pretrained={tmp_path / 'run' / 'export'}", "--include_path", str(folder)]
    command += ["--tasks", name, "--batch_size", "1", "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
    theirs = {row["doc"]["id"]: row for row in map(json.loads, samples.read_text().splitlines())}
    scored = (tmp_path / "run" / "eval" / "test" / "samples.jsonl").read_text().splitlines()
    ours = {row["id"]: row for row in map(json.loads, scored)}
    assert theirs.keys() == ours.keys() and len(ours) == len(CASES[case][4])
    assert {key: bool(row["acc"]) for key, row in theirs.items()} == {key: row["correct"] for key, row in ours.items()}
    accuracy = read_json(tmp_path / "run" / "eval" / "test" / "results.json")["accuracy"]
    assert read_json(results)["results"][name]["acc,none"] == pytest.approx(accuracy)
    assert 0 < accuracy, "it has learnt some of them"
