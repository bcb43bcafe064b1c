"""Compile every Triton kernel for GPUs that need not be here, and say what the compiler made of it.

    python benchmarks/kernel_compile.py [--architectures 80 90 100] [--jobs 2] [--output kernel_compile.json]

Each case of the registries runs its launcher on CPU tensors; Triton's own launch path is followed up to the finished
binary, and stops there. Registers and stack are cuobjdump's, instructions are counted in nvdisasm's listing. Prints a
table, names what breaks a rule (`faults`), writes everything as JSON, and exits with 1 if a rule is broken. Needs
Linux and Triton, no GPU; must not run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

REGISTRIES = ["kernel_cases", "contrastive_cases"]
"""Modules of this directory with CASES (list of `kernel_cases.Case`) and TRAITS (`kernel_cases.Traits` by kernel)."""

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that one block may have; compiling does not check it."""
THREADS_PER_SM = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
BLOCKS_PER_SM = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
REGISTERS_PER_SM = 65536

COUNTED = {
    "loads": r"\bLDG\.",
    "wide_loads": r"\bLDG\.E\S*\.128",
    "copies": r"\bLDGSTS",
    "wide_copies": r"\bLDGSTS\.E\S*\.128",
    "stores": r"\bSTG\.",
    "wide_stores": r"\bSTG\.E\S*\.128",
    "local_loads": r"\bLDL\b",
    "local_stores": r"\bSTL\b",
    # Not counted: on 10.0 a block notes in shared bits (ATOMS.OR, ATOMS.AND) which tensor memory it holds.
    "atomics": r"\b(?:ATOM|ATOMG|RED|REDG)\b|\bATOMS\b(?!\.(?:OR|AND) )",
    "hmma": r"\bHMMA\b",
    "hgmma": r"\bHGMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
}


def compile_cases(architecture: int, part: int, parts: int) -> tuple[list[dict[str, Any]], set[tuple[str, int]]]:
    """(records of every launch, launch-table entries used) of each `parts`-th case, from `part` on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from pst_dist.kernels import launch_table

    class Absent:
        """A driver of a GPU that is not there: enough to compile for it."""

        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

    records: list[dict[str, Any]] = []
    used: set[tuple[str, Any]] = set()
    launch, entry = JITFunction.run, launch_table._entry

    def compile_only(self, *args, grid, warmup, **options):
        binary = launch(self, *args, grid=grid, warmup=True, **options)
        shown = {key: value for key, value in options.items() if not isinstance(value, bool) or value}
        records.append({"kernel": self.__name__, "case": case.name, "aligned": case.aligned, "options": shown})
        records[-1] |= {"architecture": architecture, "warps": binary.metadata.num_warps, **inspect(binary)}
        records[-1]["occupancy"] = occupancy(architecture, records[-1]["registers"], binary.metadata.num_warps)

    def noted(kernel: str, width: int, _: int):
        found = entry(kernel, width, architecture)
        used.add((kernel, launch_table.TABLE[kernel].index(found)))
        return found

    driver.set_active(Absent())
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch_table, "_entry", noted),
    ):
        for case in [case for module in REGISTRIES for case in importlib.import_module(module).CASES][part::parts]:
            case.call()
    return records, used


def entries_for(architecture: int) -> set[tuple[str, int]]:
    """(kernel, index) of the launch table's entries that some width finds on an architecture."""
    from pst_dist.kernels import launch_table

    return {
        (kernel, choices.index(launch_table._entry(kernel, choice.up_to, architecture)))
        for kernel, choices in launch_table.TABLE.items()
        for choice in choices
    }


def inspect(binary: Any) -> dict[str, int]:
    """Registers, stack, shared memory and counted instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run(
                [str(tools() / tool), *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c", "-ndf"]))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump said {usage!r}"
    counts = {name: len(re.findall(pattern, listing)) for name, pattern in COUNTED.items()}
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": binary.metadata.shared, **counts}


def tools() -> Path:
    """Where Triton keeps NVIDIA's tools."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def occupancy(architecture: int, registers: int, warps: int) -> float:
    """Share of an SM's threads that fit, by registers and by the number of blocks."""
    per_warp = -(-registers // 8) * 8 * 32
    most = THREADS_PER_SM[architecture] // 32
    blocks = min(REGISTERS_PER_SM // per_warp // warps, BLOCKS_PER_SM[architecture], most // warps)
    return blocks * warps / most


def faults(record: dict[str, Any], traits: Any) -> list[str]:
    """The rules that a compiled kernel breaks, in words."""
    found = []
    if record["stack"] or record["local_loads"] or record["local_stores"]:
        found.append(f"spills: {record['stack']} bytes of stack")
    if record["shared"] > SHARED_LIMIT[record["architecture"]]:
        found.append(f"{record['shared']} bytes of shared memory, {SHARED_LIMIT[record['architecture']]} exist")
    if record["atomics"]:
        found.append(f"{record['atomics']} atomics")
    if traits.streams and record["occupancy"] < 0.5:
        found.append(f"{record['registers']} registers let {record['occupancy']:.0%} of the threads fit")
    if traits.wide_loads and record["aligned"] and not record["wide_loads"] + record["wide_copies"]:
        found.append("no 128-bit loads")
    writes = record["kernel"] != "softmax_rows" or "HAS_WEIGHTS" in record["options"]
    if traits.wide_stores and record["aligned"] and writes and not record["wide_stores"]:
        found.append("no 128-bit stores")
    # 9.0 runs the older instructions, too, at half of its speed.
    fast = record["hgmma"] if record["architecture"] == 90 else record["hmma"] + record["tcgen05"]
    if traits.multiplies and not fast:
        found.append("no tensor-core instructions")
    return found


def all_traits() -> dict[str, Any]:
    """Traits of every kernel of the registries."""
    return {
        kernel: traits for module in REGISTRIES for kernel, traits in importlib.import_module(module).TRAITS.items()
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as text, one line each."""
    lines = ["sm  kernel                  regs warps occ%  stack LDL/STL  shared LDG.128/LDG STG.128/STG ATOM MMA case"]
    for r in records:
        loads = f"{r['wide_loads'] + r['wide_copies']}/{r['loads'] + r['copies']}"
        stores, local = f"{r['wide_stores']}/{r['stores']}", f"{r['local_loads']}/{r['local_stores']}"
        size = f"{r['registers']:>4} {r['warps']:>5} {r['occupancy']:>4.0%} {r['stack']:>6} {local:>7} {r['shared']:>7}"
        mma = r["hmma"] + r["hgmma"] + r["tcgen05"]
        counts = f"{loads:>11} {stores:>11} {r['atomics']:>4} {mma:>3}"
        lines.append(f"{r['architecture']:<3} {r['kernel']:<23} {size} {counts} {r['case']}")
    return "\n".join(lines)


def main() -> int:
    """Compile, print, write; 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--jobs", type=int, default=min(3, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=Path("kernel_compile.json"))
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("with TRITON_INTERPRET=1 Triton compiles nothing")
    import torch
    import triton

    parts = [(architecture, part, args.jobs) for architecture in args.architectures for part in range(args.jobs)]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        results = pool.starmap(compile_cases, parts, chunksize=1)
    records = [record for found, _ in results for record in found]
    unused = {str(architecture): entries_for(architecture) for architecture in args.architectures}
    for (architecture, *_), (_, used) in zip(parts, results, strict=True):
        unused[str(architecture)] -= used
    traits = all_traits()
    for record in records:
        record["faults"] = faults(record, traits[record["kernel"]])
    records.sort(key=lambda record: (record["architecture"], record["kernel"], record["case"]))
    print(table(records))
    broken = [f"sm_{r['architecture']} {r['kernel']} ({r['case']}): {fault}" for r in records for fault in r["faults"]]
    broken += [
        f"sm_{sm}: no case compiles launch_table entry {name}" for sm, left in unused.items() for name in sorted(left)
    ]
    print("\n".join(broken) or f"{len(records)} kernels compiled; every rule holds")
    left_over = {sm: sorted(map(list, left)) for sm, left in unused.items()}
    report = {"triton": triton.__version__, "torch": torch.__version__, "records": records, "unused": left_over}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
