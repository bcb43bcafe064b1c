"""Checks packages, GPUs, cores and memory of this node; most checks are pure functions of the collected facts.

Supported versions come from our own package's requirements. torch is imported in a child process, which may fail or
hang without affecting this one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pst_dist.config.schema import Config
from pst_dist.diagnostics.machine.facts import Machine, version_of
from pst_dist.diagnostics.machine.findings import Finding, ok, problem, size, warning
from pst_dist.embedding.causal import reads_causal

TORCH_SECONDS = 60.0
_DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
"""CUDA major release -> the oldest driver branch that supports it (CUDA's compatibility guide)."""
_WANTS = {
    "torch": "train",
    "transformers": "train",
    "deepspeed": "train",
    "ray": "ray",
    "sentence-transformers": "embed",
}


def release(version: str) -> Version:
    """A version without its pre-release and local parts: `2.6.0a0+nv24.11` -> 2.6.0.

    NVIDIA's containers label their torch 2.6 like that. Raises packaging's InvalidVersion for an invalid version.
    """
    return Version(Version(version).base_version)


def floors() -> dict[str, tuple[SpecifierSet, str]]:
    """Package -> (supported versions, the extra that installs it or "" for the core), from our own metadata."""
    try:
        metadata = importlib.metadata.metadata("pst-dist")
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    found: dict[str, tuple[SpecifierSet, str]] = {}
    for extra in ("", *(name for name in metadata.get_all("Provides-Extra") or [] if name not in ("all", "dev"))):
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found.setdefault(requirement.name, (requirement.specifier, extra))
    return found


def _unsupported(version: str, supported: SpecifierSet) -> str | None:
    """What is wrong with an installed version; None when it is supported."""
    found = release(version)
    if supported.contains(found):
        return None
    oldest = [one.version for one in supported if one.operator in (">=", "~=", "==")]
    if oldest and found < Version(oldest[0].removesuffix(".*")):
        return f"{version} is too old, {oldest[0]} is the oldest supported version"
    return f"{version} is not supported: need {supported}"


def packages(config: Config | None) -> list[Finding]:
    """Check the versions of Python and every package; packages that the config does not use may be absent."""
    findings: list[Finding] = []
    lowest = floors()
    if not lowest:
        findings.append(warning("pst_dist", "is not installed as a package: versions cannot be checked"))
    needed = _needed(config)
    present = []
    for name, (supported, extra) in sorted(lowest.items()):
        version = version_of(name)
        install = f"pip install 'pst-dist{f'[{extra}]' if extra else ''}'"
        if version is None:
            if name in needed or not extra:
                findings.append(problem(name, "is not installed", install))
            elif name in _WANTS and config is None:
                findings.append(warning(name, f"is not installed: no {_WANTS[name]} on this machine", install))
        elif wrong := _unsupported(version, supported):
            findings.append(problem(name, wrong, install))
        else:
            present.append(f"{name} {version}")
    findings.extend(_triton())
    shown = [text for text in present if text.split()[0] in (*_WANTS, "webdataset")]
    return [ok("packages", f"python {sys.version.split()[0]}, {', '.join(shown) or 'core only'}"), *findings]


def _needed(config: Config | None) -> set[str]:
    if config is None:
        return set()
    needed = {"torch", "transformers", "tokenizers"}
    needed |= {"deepspeed"} if config.train.deepspeed else set()
    needed |= {"peft"} if config.student.lora.rank else set()
    needed |= {"ray"} if "ray" in (config.embed.backend, config.train.backend, config.evaluate.backend) else set()
    needed |= set() if config.embed.backend == "ray" or reads_causal(config.embed) else {"sentence-transformers"}
    # Other trackers are extras, and training continues without them.
    return needed | ({"tensorboard"} & set(config.train.report_to))


def _triton() -> Iterator[Finding]:
    """Check Triton's version: with another version than torch's, torch.compile and our kernels may not compile."""
    installed = version_of("triton")
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("torch") or []]
    except importlib.metadata.PackageNotFoundError:
        return
    for wanted in requirements:
        if wanted.name not in ("triton", "pytorch-triton") or (wanted.marker and not wanted.marker.evaluate()):
            continue
        pinned = next((one.version for one in wanted.specifier if one.operator == "=="), None)
        if installed and pinned and release(installed) != release(pinned):
            yield problem("triton", f"{installed}, but torch was built for {pinned}", f"pip install triton=={pinned}")


def hardware(
    machine: Machine, config: Config | None, *, ranks: int | None, environment: Mapping[str, str]
) -> list[Finding]:
    """Check GPUs, cores, memory, /dev/shm and the open-file limit of a node that is to run `ranks` ranks."""
    return [
        *_gpus(machine, config, ranks, environment),
        *_cores(machine, ranks, environment),
        *_memory(machine, config),
    ]


def _gpus(
    machine: Machine, config: Config | None, ranks: int | None, environment: Mapping[str, str]
) -> Iterator[Finding]:
    torch, cuda = machine.packages.get("torch"), machine.torch_cuda
    if machine.gpu_trouble:
        yield problem("GPUs", machine.gpu_trouble, "repair the driver, or hide the GPUs with CUDA_VISIBLE_DEVICES=")
    on_cpu = environment.get("DS_ACCELERATOR") == "cpu"
    if not machine.gpus:
        if ranks is not None and not on_cpu:
            yield problem(
                "GPUs",
                f"gpus={ranks}, but this node has none",
                "leave gpus= out, or set DS_ACCELERATOR=cpu to check for this many ranks on the CPU",
            )
        elif not machine.gpu_trouble:
            yield ok("GPUs", "none: training and encoding run on the CPU")
        if torch and cuda and not machine.gpu_trouble:
            yield warning(
                "torch",
                f"{torch} is built for CUDA {cuda}, but there is no GPU: it wastes gigabytes of disk",
                "install the CPU build; launchers/setup.sh does on a machine without a GPU",
            )
        return
    kinds = {(gpu.name, gpu.memory_mib) for gpu in machine.gpus}
    first = machine.gpus[0]
    yield ok(
        "GPUs",
        f"{len(machine.gpus)} x {first.name}, {first.memory_mib} MiB, capability {first.capability}, "
        f"driver {machine.driver}" + (", MIG on" if any(gpu.mig for gpu in machine.gpus) else ""),
    )
    if len(kinds) > 1:
        yield warning(
            "GPUs",
            "are not all of one kind: the slowest sets the speed, the smallest the memory",
            "select equal ones with CUDA_VISIBLE_DEVICES",
        )
    if torch and cuda is None:
        yield problem("torch", f"{torch} is a CPU build: the GPUs would not be used", "install torch's CUDA build")
    elif cuda and machine.driver and (least := _DRIVER_OF_CUDA.get(release(cuda).major)):
        if release(machine.driver).major < least:
            yield problem(
                "driver",
                f"{machine.driver} does not support CUDA {cuda}, for which torch is built",
                f"install driver {least} or newer, or an older torch",
            )
    for gpu in machine.gpus:
        if gpu.uncorrected:
            yield problem(
                "GPUs",
                f"GPU {gpu.index} has had {gpu.uncorrected} memory errors that ECC could not correct",
                "have it inspected; exclude it with CUDA_VISIBLE_DEVICES until then",
            )
        if gpu.used_mib > 0.2 * gpu.memory_mib:
            yield warning(
                "GPUs", f"GPU {gpu.index}: {gpu.used_mib} of {gpu.memory_mib} MiB are in use", "see nvidia-smi"
            )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and len([name for name in visible.split(",") if name.strip()]) < len(machine.gpus):
        yield warning("GPUs", f"CUDA_VISIBLE_DEVICES={visible!r} hides some of {len(machine.gpus)}")
    if on_cpu:
        yield warning("GPUs", "DS_ACCELERATOR=cpu: training would not use the GPUs", "unset DS_ACCELERATOR")
    if ranks and ranks > len(machine.gpus):
        yield problem("GPUs", f"gpus={ranks}, but this node has {len(machine.gpus)}")
    if config is not None and config.train.bf16 is True and release(first.capability).major < 8:
        yield warning(
            "GPUs", f"capability {first.capability} has no native bfloat16, so it is slow", "set train.bf16=false"
        )


def _cores(machine: Machine, ranks: int | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    threads = environment.get("OMP_NUM_THREADS", "")
    yield ok("cores", f"{machine.cores}, OMP_NUM_THREADS {threads or 'not set'}")
    if threads and not threads.isdecimal():
        yield problem("cores", f"OMP_NUM_THREADS={threads!r} is not a number", "export OMP_NUM_THREADS=1")
    elif ranks and ranks > 1 and not machine.gpus:
        if ranks > machine.cores:
            yield problem("cores", f"{ranks} CPU ranks on {machine.cores} cores", "start fewer ranks")
        elif ranks * int(threads or machine.cores) > machine.cores:
            yield warning(
                "cores",
                f"{ranks} ranks of {threads or machine.cores} threads on {machine.cores} cores: they "
                "compete for the cores",
                f"export OMP_NUM_THREADS={max(1, machine.cores // ranks)}",
            )


def _memory(machine: Machine, config: Config | None) -> Iterator[Finding]:
    yield ok("memory", f"{size(machine.memory)}, {size(machine.memory_free)} free")
    if machine.shared_memory is None or machine.shared_memory < 2**30:
        have = "none" if machine.shared_memory is None else size(machine.shared_memory)
        yield warning(
            "/dev/shm",
            f"{have}: NCCL, Ray and data workers keep their buffers there",
            "in a container, use --shm-size=8g or a memory volume at /dev/shm",
        )
    wants_many = config is not None and "ray" in (config.embed.backend, config.train.backend, config.evaluate.backend)
    least = 4096 if wants_many else 1024
    if machine.open_files < least:
        can = (
            f"ulimit -n {min(65536, machine.open_files_most)}" if machine.open_files_most != machine.open_files else ""
        )
        yield warning(
            "open files",
            f"the limit is {machine.open_files}, recommended are {least}" + (" for Ray" * wants_many),
            can or "raise the hard limit in limits.conf",
        )


_TORCH_SCRIPT = """\
import json, torch
found = torch.cuda.is_available()
print(json.dumps({"version": torch.__version__, "cuda": found, "devices": torch.cuda.device_count() if found else 0,
                  "nccl": ".".join(map(str, torch.cuda.nccl.version())) if found else None,
                  "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available()}))
"""


def torch_works(machine: Machine) -> list[Finding]:
    """Check in a child process that torch can be imported and sees the GPUs that nvidia-smi sees."""
    if "torch" not in machine.packages:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_SCRIPT], capture_output=True, text=True, timeout=TORCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [
            problem(
                "torch",
                f"importing it and finding GPUs took over {TORCH_SECONDS:.0f} s",
                "try `python -c 'import torch'`: the driver may hang, or Python may be on a slow network disk",
            )
        ]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [
            problem(
                "torch",
                f"{machine.packages['torch']} cannot be imported ({last[:160]})",
                "reinstall it: pip install --force-reinstall torch",
            )
        ]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if machine.gpus and machine.torch_cuda and not found["cuda"]:
        lines = [line for line in done.stderr.splitlines() if "CUDA" in line]
        return [
            problem(
                "torch",
                f"sees none of the {len(machine.gpus)} GPUs" + (f" ({lines[0].strip()[:160]})" if lines else ""),
                "check that the driver supports its CUDA release, and check CUDA_VISIBLE_DEVICES",
            )
        ]
    if not found["gloo"]:
        return [warning("torch", "was built without gloo: no CPU ranks")]
    sees = f", sees {found['devices']} GPU(s), NCCL {found['nccl']}" if found["cuda"] else ""
    return [ok("torch", f"{found['version']} can be imported{sees}")]


def deepspeed_json(config: Config) -> list[Finding]:
    """Check the user's own DeepSpeed JSON, read as training reads it; raises what that raises."""
    if config.train.deepspeed is None or not config.train.deepspeed.endswith(".json") or not version_of("deepspeed"):
        return []
    from pst_dist.training.engines.deepspeed_config import deepspeed_settings

    stage = deepspeed_settings(config.train, 1)["zero_optimization"]["stage"]
    return [ok("deepspeed", f"{config.train.deepspeed}: stage {stage}, all keys known")]


def compiler_locks() -> list[Finding]:
    """Find stale lock files of C++ extension builds: torch waits forever for such a file to disappear."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    findings = []
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        if not _held_open(lock):
            findings.append(
                problem(
                    "extensions",
                    f"{lock}: stale lock of a killed build, for which every later build waits "
                    "forever (no visible process has it open)",
                    f"rm {lock}",
                )
            )
    return findings


def _held_open(path: Path) -> bool:
    """Whether a process that this user may inspect has the file open; a running build keeps its lock open."""
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # another user's process, or it has ended
            if any(file.path == wanted for file in process.open_files()):
                return True
    return False
