"""Tests that can fail: each mutation breaks one line of the loss path in a copy of the package, and a test must notice.

The kernels themselves are broken in the same way in `interpreted/test_kernel_mutations.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD, OPS = "tests/kernels/test_head.py", "tests/kernels/test_ops.py"
MUTATIONS = {
    "token weights forgotten": ("kernels/head.py", "loss = (nll * weights).sum()", "loss = nll.sum()", HEAD),
    "upstream gradient forgotten": (
        "kernels/reference.py",
        "rows_gradient_ND.to(dtype) * rows_upstream",
        "rows_gradient_ND.to(dtype)",
        HEAD,
    ),
    "head's gradient of the first chunk only": (
        "kernels/ops.py",
        "        if moves:\n",
        "        if moves and start == 0:\n",
        HEAD,
    ),
    "bias left out": (
        "kernels/ops.py",
        "torch.addmm(bias_V, hidden, weight_VD.T, out=logits)",
        "torch.mm(hidden, weight_VD.T, out=logits)",
        HEAD,
    ),
    "target not subtracted": (
        "kernels/reference.py",
        "targets_C[:, None], -weights[:, None]",
        "targets_C[:, None], -0 * weights[:, None]",
        HEAD,
    ),
    "span gradient not divided": (
        "kernels/reference.py",
        "spans_gradient_AD.to(dtype) / lengths_A.clamp(min=1)[:, None]",
        "spans_gradient_AD.to(dtype)",
        HEAD,
    ),
    "span read from its sequence's start": (
        "kernels/reference.py",
        "first[owner] + starts_A[owner]",
        "first[owner]",
        HEAD,
    ),
    "buffer handed over although a second pass follows": (
        "kernels/head.py",
        "return ask is None or ask()",
        "return False",
        HEAD,
    ),
    "norm's share of the gradient forgotten": ("kernels/reference.py", "(pull - along * unit_student)", "(pull)", HEAD),
    "overlapping spans accepted": ("kernels/spans.py", "if (taken != NOWHERE).any():", "if False:", HEAD),
    "logits added up in their own dtype": (
        "kernels/reference.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
        HEAD,
    ),
    "a fake of another shape": (
        "kernels/ops.py",
        "return like_BTD.new_empty(like_BTD.shape)",
        "return like_BTD.new_empty(like_BTD.shape[1:])",
        OPS,
    ),
    "paraphrases taken for negatives": (
        "kernels/reference.py",
        "scores_CG.masked_fill_(others,",
        "scores_CG.masked_fill_(others & False,",
        "tests/training/test_loss.py",
    ),
    "own key masked with its group": (
        "kernels/reference.py",
        "others.scatter_(1, own_C[:, None], False)",
        "others",
        "tests/training/test_loss.py",
    ),
    "temperature forgotten": (
        "kernels/contrastive.py",
        "valid_G)\n    if torch.is_grad",
        "valid_G)\n    temperature = 1.0\n    if torch.is_grad",
        "tests/training/test_loss.py",
    ),
    "capped logits trained uncapped": (
        "training/module.py",
        "        return same\n",
        "        return True\n",
        "tests/training/test_module.py",
    ),
    "answers weighted as rationales": (
        "training/module.py",
        "torch.where(batch.is_answer, scales[0], scales[1])",
        "torch.where(batch.is_answer, scales[1], scales[0])",
        "tests/training/test_module.py",
    ),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, list]:
    """[exit code of pytest, its output] of every mutation, each in a fork of one process that has torch loaded."""
    folder = tmp_path_factory.mktemp("mutations")
    for part in ("pst_dist", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "mutations.json").write_text(json.dumps(MUTATIONS))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("mutate.py")), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "verdicts.json").read_text())


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_noticed(verdicts, name):
    code, output = verdicts[name]
    # 1: a test failed. Anything else (2 interrupted, 4 usage, 5 nothing collected) would prove nothing.
    assert code == 1, output


def test_an_unbroken_copy_passes(verdicts):
    """Else the mutations would be noticed for some other reason."""
    code, output = verdicts["unbroken"]
    assert code == 0, output
