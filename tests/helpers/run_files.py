"""What a run wrote: its logged steps, and the whole state of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pst_dist.storage.manifest import read_lines


def curve(run: Path) -> list[dict]:
    """The logged optimizer steps."""
    return [row for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def losses(run: Path) -> list[float]:
    """The loss of each logged optimizer step."""
    return [row["loss"] for row in curve(run)]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The whole state of a checkpoint by name, put together from its files without the code under test."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in (run / "checkpoints" / f"checkpoint-{step}").glob("state-*.safetensors"):
        with safe_open(str(path), framework="pt") as stream:
            starts = json.loads(stream.metadata()["pst"])["starts"]
        for key, value in load_file(path).items():
            pieces.setdefault(key, []).append((starts[key.partition("/")[2]], value))
    whole = {}
    for key, parts in pieces.items():
        ordered = sorted(parts, key=lambda part: part[0])
        ends = [0] + [start + len(value) for start, value in ordered]
        assert [start for start, _ in ordered] == ends[:-1], f"{key} has gaps or is written twice"
        whole[key] = torch.cat([value for _, value in ordered])
    return whole
