"""Every Triton kernel against the reference, on this CPU: each file of `interpreted` in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_triton_kernels_agree_with_the_reference_in_the_interpreter(path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PST_KERNELS": "interpret", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    # Code 5 (nothing was collected) is a failure too.
    assert child.returncode == 0, f"{' '.join(command)}\n{child.stdout}\n{child.stderr}"
