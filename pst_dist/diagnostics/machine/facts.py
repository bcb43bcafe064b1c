"""Facts about this node, collected without heavy imports, and differences between the facts of several nodes.

Only differences are judged here; `software` and the other modules judge what a fact means for a run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pst_dist._version import __version__
from pst_dist.data.processes import usable_cores
from pst_dist.diagnostics.machine.findings import Finding, ok, problem, warning
from pst_dist.errors import InputError
from pst_dist.storage.foreign_json import foreign_object

PACKAGES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "sentence-transformers", "ray", "triton", "datasets"),
    *("webdataset", "numpy", "pydantic", "safetensors"),
)
_NCCL = ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
_SMI_SECONDS = 10.0
_SMI_FIELDS = (
    *("index", "name", "memory.total", "memory.used", "compute_cap", "driver_version", "mig.mode.current"),
    "ecc.errors.uncorrected.volatile.total",
)
_MUST_AGREE = ("pst_dist", "code", "python", "torch", "torch_cuda", "deepspeed", "nccl", "ray")
"""Facts that break or silently change a run if they differ between ranks; other differences are only reported."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it."""

    index: int
    name: str
    memory_mib: int
    used_mib: int
    capability: str
    """Compute capability: `8.0`."""
    mig: bool
    uncorrected: int
    """Uncorrected ECC memory errors since the last reset; 0 without ECC."""


@dataclass(frozen=True)
class Machine:
    """Facts about a node."""

    host: str
    python: str
    pst_dist: str
    code: str
    """sha256 over the package's files, because two checkouts of the same version may differ."""
    packages: dict[str, str]
    """Versions of the installed packages; missing packages are omitted."""
    torch_cuda: str | None
    """CUDA release that torch was built for; None for a CPU build or without torch."""
    nccl: str | None
    gpus: tuple[Gpu, ...]
    driver: str | None
    gpu_trouble: str
    """Why the GPUs could not be queried; empty if they could, or if there is no sign of a GPU."""
    cores: int
    """Cores that this process may use, considering a container's limit."""
    memory: int
    """Bytes, considering a container's limit."""
    memory_free: int
    shared_memory: int | None
    """Bytes of /dev/shm; None if it does not exist."""
    open_files: int
    open_files_most: int
    """The hard limit, to which a user may raise open_files."""

    def to_json(self) -> dict[str, Any]:
        """For `pst doctor --report`."""
        return {"kind": "pst doctor", **asdict(self)}


def collect() -> Machine:
    """Collect the facts about this node; takes as long as nvidia-smi, at most ten seconds."""
    gpus, driver, trouble = gpus_here()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory, free = _memory()
    return Machine(
        host=socket.gethostname(),
        python=platform.python_version(),
        pst_dist=__version__,
        code=_code_digest(),
        packages={name: version for name in PACKAGES if (version := version_of(name))},
        torch_cuda=_torch_cuda(),
        nccl=next((version for name in _NCCL if (version := version_of(name))), None),
        gpus=gpus,
        driver=driver,
        gpu_trouble=trouble,
        cores=usable_cores(),
        memory=memory,
        memory_free=free,
        shared_memory=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        open_files=soft,
        open_files_most=hard,
    )


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus_here() -> tuple[tuple[Gpu, ...], str | None, str]:
    """(GPUs, driver version, why they could not be queried); the last is empty on a machine without GPUs."""
    has_files = any(Path("/dev").glob("nvidia[0-9]*"))
    if shutil.which("nvidia-smi") is None:
        return (), None, "there are GPUs in /dev, but nvidia-smi is missing" if has_files else ""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, _ = child.communicate(timeout=_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        # Do not wait: a process inside a hanging driver cannot be killed.
        os.killpg(child.pid, signal.SIGKILL)
        return (), None, f"nvidia-smi did not answer within {_SMI_SECONDS:.0f} s"
    if child.returncode:
        said = next((line.strip() for line in printed.splitlines() if line.strip()), f"exit code {child.returncode}")
        return (), None, "" if "No devices were found" in said else f"nvidia-smi: {said[:160]}"
    return *read_gpus(printed), ""


def read_gpus(printed: str) -> tuple[tuple[Gpu, ...], str | None]:
    """(GPUs, driver version) in what nvidia-smi printed, eight cells on a line; other lines are ignored."""
    rows = [[cell.strip() for cell in line.split(",")] for line in printed.splitlines() if line.count(",") == 7]
    return tuple(_gpu(row) for row in rows), rows[0][5] if rows else None


def _gpu(row: Sequence[str]) -> Gpu:
    # A field that a GPU does not have is [N/A].
    number = [int(cell) if re.fullmatch(r"[0-9]{1,15}", cell) else 0 for cell in row]
    return Gpu(number[0], row[1], number[2], number[3], row[4], row[6] == "Enabled", number[7])


def _torch_cuda() -> str | None:
    """Read from torch's version file, because importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def _code_digest() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _memory() -> tuple[int, int]:
    """(total, free) bytes of the machine, or of the container if that is less."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError):
        return total, free


def read_report(path: Path) -> dict[str, Any]:
    """A node's facts as `pst doctor --report` wrote them; raises InputError for anything else."""
    if not path.is_file():
        raise InputError("no such report", "write one on each node: pst doctor --report FILE.json", path=path)
    remedy = "write one on the node: pst doctor --report FILE.json"
    facts = foreign_object(path, remedy=remedy)
    packages, gpus = facts.get("packages"), facts.get("gpus")
    if (
        facts.get("kind") != "pst doctor"
        or not isinstance(facts.get("host"), str)
        or not isinstance(packages, dict)
        or not isinstance(gpus, list)
        or not all(isinstance(gpu, dict) and {"name", "memory_mib"} <= gpu.keys() for gpu in gpus)
    ):
        raise InputError("not a report of a node", remedy, path=path)
    return facts


def differences(reports: Sequence[dict[str, Any]]) -> list[Finding]:
    """The facts in which nodes differ: a problem if ranks must agree on it, else a warning."""
    flat = [_flattened(report) for report in reports]
    findings = []
    for fact in sorted(set().union(*flat), key=lambda name: (name not in _MUST_AGREE, name)):
        values: dict[str, list[str]] = {}
        for report, facts in zip(reports, flat, strict=True):
            values.setdefault(facts.get(fact, "none"), []).append(report["host"])
        if len(values) > 1:
            said = ", ".join(f"{value} on {_several(hosts)}" for value, hosts in sorted(values.items()))
            if fact in _MUST_AGREE:
                findings.append(problem(fact, said, "install the same version on every node"))
            else:
                findings.append(warning(fact, said))
    if len({report["host"] for report in reports}) < len(reports):
        findings.append(warning("host", "two of these reports are from the same host"))
    return findings or [ok("nodes", f"{len(reports)} nodes have the same software and GPUs")]


def _flattened(report: dict[str, Any]) -> dict[str, str]:
    """Fact -> text, for the facts that nodes of one run should share."""
    facts = {name: _shown(report.get(name)) for name in ("pst_dist", "code", "torch_cuda", "nccl", "driver", "cores")}
    facts |= {_shown(name): _shown(value) for name, value in report.get("packages", {}).items()}
    facts["python"] = ".".join(_shown(report.get("python")).split(".")[:2])
    kinds = [f"{_shown(gpu['name'])} of {_shown(gpu['memory_mib'])} MiB" for gpu in report.get("gpus", [])]
    facts["gpus"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "none"
    return facts


def _shown(value: object) -> str:
    """A fact of a report that may come from anywhere: one short line without control characters."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of many digits"
    text = str(value)[:120]
    return text if text.isprintable() else ascii(text)[1:-1]


def _several(hosts: Sequence[str]) -> str:
    return ", ".join(map(_shown, hosts[:3])) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
