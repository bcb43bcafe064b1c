"""Every Triton kernel, in every configuration of the launch table, is compiled for GPUs that need not be here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_compile.py"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448}

HERE = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"

pytestmark = [
    pytest.mark.slow,
    # Another compiler hands out registers in another way: 3.9 was seen to spill 8 bytes of two float32 kernels on 10.0.
    pytest.mark.skipif(not HERE.startswith("3.7."), reason=f"asserts what Triton 3.7 makes of them, here is {HERE}"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script wrote, by a process that does not interpret."""
    output = tmp_path_factory.mktemp("compile") / "report.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--jobs", "2"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert output.exists(), f"{child.stdout}\n{child.stderr}"
    return json.loads(output.read_text()) | {"code": child.returncode, "said": child.stdout}


def streaming(report: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("chunk_sums", "span_means", "hidden_gradient_rows", "softmax_rows")
    return [record for record in report["records"] if record["kernel"] in names]


def test_every_entry_of_the_launch_table_was_compiled_for_every_architecture(report) -> None:
    assert report["unused"] == {str(architecture): [] for architecture in ARCHITECTURES}
    for architecture in ARCHITECTURES:
        kernels = {record["kernel"] for record in report["records"] if record["architecture"] == architecture}
        assert kernels >= {"chunk_sums", "span_means", "hidden_gradient_rows", "softmax_rows", "row_distances"}


def test_nothing_spills(report) -> None:
    spills = [r for r in report["records"] if r["stack"] or r["local_loads"] or r["local_stores"]]
    assert not spills, spills


def test_shared_memory_fits(report) -> None:
    assert all(r["shared"] <= SHARED_LIMIT[r["architecture"]] for r in report["records"])


def test_there_are_no_atomics_so_two_runs_agree_in_every_bit(report) -> None:
    assert not [r for r in report["records"] if r["atomics"]]


def test_streaming_kernels_load_and_store_128_bits_at_a_time(report) -> None:
    for record in streaming(report):
        if record["aligned"]:
            assert record["wide_loads"], record
        writes = record["kernel"] == "hidden_gradient_rows" or record["options"].get("HAS_WEIGHTS")
        if record["aligned"] and writes:
            assert record["wide_stores"], record


def test_streaming_kernels_leave_room_for_half_of_the_threads(report) -> None:
    for record in streaming(report):
        # An SM has 65536 registers and 64 warps of 32 threads; registers are given out 8 to a thread.
        per_block = -(-record["registers"] // 8) * 8 * 32 * record["warps"]
        assert 65536 // per_block * record["warps"] >= 32, record


def test_the_script_says_that_every_rule_holds(report) -> None:
    assert report["code"] == 0 and "every rule holds" in report["said"], report["said"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"stack": 8}, "spills: 8 bytes of stack"),
        ({"local_stores": 1}, "spills: 0 bytes of stack"),
        ({"shared": 166913}, "166913 bytes of shared memory, 166912 exist"),
        ({"atomics": 2}, "2 atomics"),
        ({"registers": 72, "occupancy": 0.4375}, "72 registers let 44% of the threads fit"),
        ({"wide_loads": 0}, "no 128-bit loads"),
        ({"wide_stores": 0}, "no 128-bit stores"),
    ],
)
def test_a_kernel_that_breaks_a_rule_is_named(report, change, words, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import kernel_compile

    record = next(r for r in report["records"] if r["case"] == "hidden_gradient D=768" and r["architecture"] == 80)
    traits = kernel_compile.all_traits()["hidden_gradient_rows"]
    assert kernel_compile.faults(record, traits) == []
    assert kernel_compile.faults(record | change, traits) == [words]
