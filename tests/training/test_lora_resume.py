"""LoRA students on every engine: checkpoints go on anywhere, hold only what is trained, and refuse another base."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import zoo
from ranks import launch, stop_at
from run_files import curve, state
from safetensors.torch import load_file, save_file
from small_run import small_config

from pst_dist.errors import StaleError
from pst_dist.models.identity import base_identity
from pst_dist.training.trainer import train

pytest.importorskip("peft")
pytestmark = [pytest.mark.distributed, pytest.mark.encoder, pytest.mark.slow, pytest.mark.timeout(1500)]
STAGES = ("zero0", "zero1", "zero2", "zero3")
BASES = ("llama3", "llama2")
"""Tied and untied embeddings. Untied ones differ in what is trained, not in the engines, so they do FEW cases."""
SAME = (*STAGES, "bf16-zero2", "bf16-zero3")
OTHER = [("single", "zero2"), ("single", "zero3"), ("zero0", "zero1"), ("zero2", "zero3"), ("zero3", "zero2")]
THREE = [("zero2", "zero3"), ("zero3", "zero1")]
FEW = {"zero2", "zero3", "single-zero3", "zero3-zero2"}
LORA = {"train__save_steps": 4, "train__eval_steps": 4, "student__lora__rank": 3, "layout__max_length": 200}


def lora_config(data: Path, output: Path, base: Path, **changes):
    return small_config(data, output, **{"student__model_name_or_path": base, **LORA, **changes})


@pytest.fixture(scope="module")
def made(small_data, tmp_path_factory) -> Callable[[str], Path]:
    """All runs of a base, made when they are first asked for."""
    return functools.cache(lambda base: make_runs(small_data, tmp_path_factory.mktemp(base), base))


@pytest.fixture
def runs(made, kind) -> Path:
    return made(kind)


def make_runs(small_data: Path, folder: Path, kind: str) -> Path:
    base = zoo.make(kind, folder / "base")

    def case(name: str, engine: str, resume: tuple[str, int] | None = None) -> dict:
        precision, _, stage = engine.rpartition("-")
        config = lora_config(
            small_data, folder / name, base, train__deepspeed=stage, train__bf16=precision.startswith("bf16")
        )
        raw = config.model_dump(mode="json")
        return raw | ({"resume": [str(folder / resume[0]), resume[1]]} if resume else {})

    train(lora_config(small_data, folder / "single", base))
    whole = kind == "llama3"
    same = [engine for engine in SAME if whole or engine in FEW]
    cases = [case(engine, engine) for engine in same]
    cases += [case(f"{engine}-again", engine, (engine, 4)) for engine in same]
    cases += [case(f"{one}-{two}", two, (one, 4)) for one, two in OTHER if whole or f"{one}-{two}" in FEW]
    launch(cases, folder)
    if whole:
        launch([case(f"{one}-{two}-on-3", two, (one, 4)) for one, two in THREE], folder, ranks=3)
    for name, source in (("back", "single-zero3"), ("single-again", "single")):
        stop_at(folder / source, 4, folder / name)
        train(lora_config(small_data, folder / name, base))
    return folder


def of_both(names: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, name) of all these cases with tied embeddings, and of the FEW with untied ones."""
    return [(kind, name) for kind in BASES for name in names if kind == "llama3" or name in {*FEW, "single", "back"}]


@pytest.mark.parametrize(("kind", "engine"), of_both(["single", *SAME]))
def test_the_same_engine_goes_on_to_the_same_bits(runs, engine):
    whole, again = runs / engine, runs / f"{engine}-again"
    assert [row["loss"] for row in curve(again)] == [row["loss"] for row in curve(whole)]
    one, two = state(whole, 8), state(again, 8)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("kind", "name"),
    of_both([*STAGES, *(f"{a}-{b}" for a, b in OTHER), *(f"{a}-{b}-on-3" for a, b in THREE), "back"]),
)
def test_every_other_engine_follows_the_curve_of_one_process(runs, name):
    plain = curve(runs / "single")
    assert [row["step"] for row in curve(runs / name)] == list(range(1, 9))
    assert [row["loss"] for row in curve(runs / name)] == pytest.approx([row["loss"] for row in plain], abs=2e-5)
    assert plain[-1]["loss"] < plain[0]["loss"]
    one, two = state(runs / "single", 8), state(runs / name, 8)
    assert one.keys() == two.keys() and len(one) > 10
    for key in one:
        assert torch.allclose(one[key], two[key], atol=5e-4), f"{key} {(one[key] - two[key]).abs().max()}"


@pytest.mark.parametrize("kind", BASES)
def test_a_checkpoint_holds_adapters_rows_and_alignment_head_only(runs):
    for name in ("single", *(name for name in STAGES if (runs / name).is_dir())):
        keys = {key.partition("/")[2] for key in state(runs / name, 8)}
        assert "head.weight" in keys and any(key.endswith(".trained_rows") for key in keys)
        assert all("lora_" in key or key.endswith(".trained_rows") or key == "head.weight" for key in keys)


@pytest.mark.parametrize("kind", BASES)
def test_every_engine_keeps_the_same_adapter(runs):
    one = load_file(runs / "single" / "best" / "adapter_model.safetensors")
    for name in (name for name in STAGES if (runs / name).is_dir()):
        two = load_file(runs / name / "best" / "adapter_model.safetensors")
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[key], two[key], atol=5e-4) for key in one)


@pytest.mark.parametrize("kind", BASES)
def test_another_base_is_refused_by_its_digest(runs, small_data):
    run, base = runs / "refused", runs / "base"
    stop_at(runs / "single", 4, run)
    path = base / "model.safetensors"
    kept = path.read_bytes()
    try:
        weights = load_file(path)
        save_file({key: value * 1.01 for key, value in weights.items()}, path, metadata={"format": "pt"})
        base_identity.cache_clear()  # as a new process has it
        with pytest.raises(StaleError, match=r"student\.base="):
            train(lora_config(small_data, run, base))
    finally:
        path.write_bytes(kept)
        base_identity.cache_clear()
    settings = json.loads((run / "checkpoints" / "checkpoint-4" / "run_state.json").read_text())["settings"]
    assert len(settings["student.base"]) == 64
