"""Makes chosen steps of a training fail on one rank: teacher vectors of NaN, an infinite gradient, wrong targets.

For these steps each rank writes `injected-<rank>.json`: whether the step was taken, and whether any of this rank's
weights, moments or working copies changed in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pst_dist.training import loop
from pst_dist.training.engines.engine import Engine


def content(engine: Engine) -> str:
    """sha256 of what this rank keeps: float32 weights, moments, the optimizer's steps and the copies it computes on."""
    fragments, steps = engine.state()
    digest = hashlib.sha256(str(steps).encode())
    tensors = [fragment.slots[slot] for fragment in fragments for slot in sorted(fragment.slots)]
    tensors += [getattr(parameter, "ds_tensor", parameter) for parameter in engine.student.parameters()]
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def injected(folder: Path, faults: dict[int, str], rank: int) -> Iterator[None]:
    """Let steps, counted from 1, go wrong on one rank by `nan` (vectors), `inf` (gradient) or `spike` (targets)."""
    real = loop.take_step
    seen: list[dict[str, Any]] = []

    def take(engine: Engine, state: Any, batches: Any, *others: Any, **options: Any) -> Any:
        fault = faults.get(state.step + 1) if engine.ranks.rank == rank else None
        handle = None
        if fault == "nan":
            first = batches[0]
            batches = [replace(first, teacher_emb=first.teacher_emb * float("nan")), *batches[1:]]
        if fault == "spike":
            batches = [_with_wrong_targets(batch) for batch in batches]
        if fault == "inf":
            weight = next(value for name, value in engine.student.named_parameters() if "ln_1.weight" in name)
            handle = weight.register_hook(lambda gradient: gradient * float("inf"))
        before = content(engine) if state.step + 1 in faults else ""
        taken = real(engine, state, batches, *others, **options)
        if handle is not None:
            handle.remove()
        if state.step + 1 in faults:
            found = {"step": state.step + 1, "taken": not isinstance(taken, loop.BadStep)}
            seen.append(found | {"moved": content(engine) != before})
            (folder / f"injected-{engine.ranks.rank}.json").write_text(json.dumps(seen))
        return taken

    loop.take_step = take
    try:
        yield
    finally:
        loop.take_step = real


def _with_wrong_targets(batch: Any) -> Any:
    targets = torch.full_like(batch.supervised.targets, 1)
    return replace(batch, supervised=replace(batch.supervised, targets=targets))
