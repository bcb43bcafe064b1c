"""Commands of the documentation, run here on small rows: those that only look at a run, and the others as a dry run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from test_docs import in_blocks

from pst_dist.cli.main import run_verb

ROOT = Path(__file__).resolve().parents[1]
ADDED = {"check": [], "preview": [], "plan": [], "shard": [], "run": ["--dry-run"], "submit": ["--dry-run"]}
"""Verb -> the words that keep it cheap here."""
_ELSEWHERE = ("FOLDER", "encoders/", "google/", "smollm2", "on=ray", "submit ray", "rationales.jsonl", "s3://", "…")
"""Words of commands that need a model, a data set, a bucket or a cluster that is not on every machine."""
CONFIG = """
task: last_letter_concatenation
output_dir: runs/my
data: {train: "gen:last_letters?rows=40&seed=0&words=2", test: "gen:last_letters?rows=12&seed=0&words=2",
       validation_size: 8}
student: {fresh: {hidden_size: 32, num_layers: 1, num_heads: 2}}
"""


def runnable() -> list[str]:
    """The commands that this machine can run, each once."""
    commands = sorted({command for _, command in in_blocks()})
    return [
        command
        for command in commands
        if command.split()[1] in ADDED and not any(word in command for word in _ELSEWHERE)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A directory with the files that the pages talk of."""
    here = tmp_path_factory.mktemp("docs")
    for name in ("my.yaml", "my_data.yaml", "student.yaml"):
        (here / name).write_text(CONFIG)
    rows = [{"question": f"{k} + {k}?", "answer": str(2 * k), "rationale": f"twice {k}"} for k in range(60)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"question": f"{k} + {k}?", "answer": str(2 * k), "rationale": f"twice {k}"} for k in range(60, 70)]
    (here / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (here / "launchers").mkdir()
    (here / "launchers" / "my_data.yaml").write_text((ROOT / "launchers" / "my_data.yaml").read_text())
    return here


def test_there_are_commands_of_every_kind():
    verbs = {command.split()[1] for command in runnable()}
    assert verbs == set(ADDED) and len(runnable()) >= 12


@pytest.mark.encoder
@pytest.mark.parametrize("command", runnable())
def test_a_command_of_the_pages_does_here_what_it_says(command, folder, monkeypatch, capsys, tmp_path):
    _, verb, *words = shlex.split(command)
    if "--write" in words:  # it writes a new file; the other commands need the one that is there
        shutil.copy(folder / "rows.jsonl", tmp_path)
        folder = tmp_path
    monkeypatch.chdir(folder)
    added = [word for word in ADDED[verb] if word not in words]
    assert run_verb([verb, *words, *added]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()
