"""How the benchmarks measure: paired rounds, quantiles, peak memory, and the ceilings of the machine they run on.

A figure without the machine's own ceiling says little, and two figures from different minutes of a busy machine say
less; so contenders take turns within a round, ratios are taken per round, and the ceilings come from the same run.
"""

from __future__ import annotations

import gc
import importlib.metadata
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pst_dist.config.run_dir import environment

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that passed, or that this process computed: the latter says more on a busy machine, with one thread."""


def paired_rounds(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; within a round all run, in an order that rotates and turns round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number // 2 % len(names)
        order = names[first:] + names[:first]
        gc.collect()
        for name in order if number % 2 == 0 else reversed(order):
            begin = clock()
            contenders[name]()
            seconds[name].append(clock() - begin)
    return seconds


def compared(seconds: Mapping[str, list[float]], ours: str, label: str = "over_ours") -> dict[str, dict[str, Any]]:
    """For each contender its median, and the median and range of its time over ours in a round, named `label`."""
    table = {}
    for name, values in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(values, seconds[ours], strict=True)]
        table[name] = {
            "seconds_median": round(statistics.median(values), 4),
            label: round(statistics.median(ratios), 3),
            f"{label}_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return table


def resident_megabytes() -> tuple[float, float]:
    """(resident now, most since `forget_peak`) of this process in MiB, as the Linux kernel counts its pages."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def forget_peak() -> None:
    """Let the kernel count this process's peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process_of_its_own(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns when a fork of this process runs it; {"failed": reason} when it does not return.

    Fork before this process has computed anything: threads of a math library do not survive a fork.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        return {"failed": f"its process ended with {child.exitcode}, -9 is for want of memory"}
    finally:
        child.join()


def _send_result(sender: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments)
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {error}"}
    sender.send(result)


def processor_ceilings() -> dict[str, float]:
    """What this processor does at most with the threads torch has: a copy in GB/s (read + written), a GEMM."""
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    left, right = torch.randn(1536, 768), torch.randn(768, 8192)
    copies, products = [], []
    for _ in range(7):
        begin = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        left @ right
        products.append(time.perf_counter() - begin)
    return {
        "copy_GB_per_s": round(2 * source.nbytes / statistics.median(copies) / 1e9, 1),
        "gemm_float32_GFLOP_per_s": round(2 * 1536 * 768 * 8192 / statistics.median(products) / 1e9, 1),
    }


def machine(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Device, threads, load and versions, for the record of a result."""
    versions = environment()
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_5_15": [round(value, 2) for value in os.getloadavg()],
        "versions": versions,
    }


def processor_name() -> str:
    """The processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"
