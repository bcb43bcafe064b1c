"""The pages about the Python API are run as they are printed."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pst_dist.storage.manifest import read_json

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_snippets_of_the_api_page_run_in_order(tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "api.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 10
    names: dict = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/api.md, snippet {number}", "exec"), names)
    assert names["losses"].iloc[-1] < names["losses"].iloc[0]
    assert logging.getLogger("pst_dist").level == logging.WARNING


@pytest.mark.encoder
def test_the_walk_through_runs_as_a_script(tmp_path):
    """In a process of its own: it configures no logging, and must still say what it does."""
    pytest.importorskip("pandas")
    done = subprocess.run(
        [sys.executable, str(DOCS / "walkthrough.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(DOCS.parent)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("stage shard:", "embed 300/300 texts", "step 100/100", "stage export pst:", "resumed step 100"):
        assert line in done.stderr, line
    assert "did you mean 'train.learning_rate'?" in done.stdout
    results = read_json(tmp_path / "runs" / "walkthrough" / "pst" / "eval" / "test" / "results.json")
    assert results["accuracy"] > 0.9, "the page shows a student that has learnt its task"


def test_the_walk_through_is_cells_that_a_notebook_can_be_made_of():
    text = (DOCS / "walkthrough.py").read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n")
    cells = re.split(r"^# %%.*\n", text, flags=re.M)[1:]
    kinds = re.findall(r"^# %%(.*)\n", text, flags=re.M)
    for kind, cell in zip(kinds, cells, strict=True):
        if kind == " [markdown]":
            assert all(line.startswith("#") for line in cell.strip().splitlines())
        else:
            compile(cell, "cell", "exec")
