"""A checkpoint of any engine on any number of ranks goes on in any other: to the bit on the same, to 1e-5 elsewhere.

Each launch of ranks serves many cases: 2 ranks train every ZeRO stage whole and take up each other's checkpoints and
those of one process, 3 ranks take up those of 2, and one process those of 3.
"""

from pathlib import Path

import pytest
import torch
from ranks import launch, stop_at
from run_files import curve, state
from small_run import small_config

from pst_dist.storage.manifest import read_json
from pst_dist.training.trainer import train

pytestmark = [pytest.mark.distributed, pytest.mark.encoder, pytest.mark.slow, pytest.mark.timeout(1500)]
STAGES = ("zero0", "zero1", "zero2", "zero3")
HALVES = {"train__save_steps": 4, "train__eval_steps": 4, "student__fresh__hidden_size": 36}
"""36 hidden units and 3 ranks: no matrix divides evenly, so fragments begin and end inside rows."""
SAME = (*STAGES, "zero3_offload", "bf16-zero2", "bf16-zero3", "bf16-zero0")
"""Cases that go on with the engine and the ranks that they began with."""
OTHER = [*(("single", stage) for stage in STAGES), ("zero0", "zero1"), ("zero1", "zero3"), ("zero3", "zero2")]
"""Cases that go on with another engine on 2 ranks."""
THREE = [("zero2", "zero1"), ("zero1", "zero3"), ("zero3", "zero0")]
"""Cases of 2 ranks that go on with 3."""


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")

    def case(name: str, engine: str, resume: tuple[str, int] | None = None) -> dict:
        precision, _, stage = engine.rpartition("-")
        config = small_config(
            small_data, folder / name, train__deepspeed=stage, train__bf16=precision == "bf16", **HALVES
        )
        raw = config.model_dump(mode="json")
        return raw | ({"resume": [str(folder / resume[0]), resume[1]]} if resume else {})

    train(small_config(small_data, folder / "single", **HALVES))
    cases = [case(engine, engine) for engine in SAME]
    cases += [case(f"{engine}-again", engine, (engine, 4)) for engine in SAME]
    cases += [case(f"{one}-{two}", two, (one, 4)) for one, two in OTHER]
    launch(cases, folder)
    launch([case(f"{one}-{two}-on-3", two, (one, 4)) for one, two in THREE], folder, ranks=3)
    stop_at(folder / "single-zero3", 4, folder / "back")
    train(small_config(small_data, folder / "back", **HALVES))
    return folder


@pytest.mark.parametrize("engine", SAME)
def test_the_same_engine_goes_on_to_the_same_bits(runs, engine):
    whole, again = runs / engine, runs / f"{engine}-again"
    assert [row["loss"] for row in curve(again)] == [row["loss"] for row in curve(whole)]
    assert read_json(again / "train.json")["steps"] == 8
    one, two = state(whole, 8), state(again, 8)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("one", "two"), OTHER)
def test_another_engine_follows_the_undisturbed_curve(runs, one, two):
    check_against_single(runs, runs / f"{one}-{two}")


@pytest.mark.parametrize(("one", "two"), THREE)
def test_another_number_of_ranks_follows_the_undisturbed_curve(runs, one, two):
    check_against_single(runs, runs / f"{one}-{two}-on-3")


def test_one_process_takes_up_what_ranks_have_saved(runs):
    check_against_single(runs, runs / "back")


def check_against_single(runs: Path, run: Path) -> None:
    plain = curve(runs / "single")
    assert [row["step"] for row in curve(run)] == list(range(1, 9))
    assert [row["loss"] for row in curve(run)] == pytest.approx([row["loss"] for row in plain], abs=1e-5)
    one, two = state(runs / "single", 8), state(run, 8)
    assert one.keys() == two.keys() and len(one) > 10
    for key in one:
        assert one[key].shape == two[key].shape
        assert torch.allclose(one[key], two[key], atol=2e-4), f"{key} {(one[key] - two[key]).abs().max()}"


def test_every_rank_writes_its_own_part(runs):
    sizes = {}
    for engine in STAGES:
        files = sorted((runs / engine / "checkpoints" / "checkpoint-8").glob("state-*"))
        assert [path.name for path in files] == ["state-00000.safetensors", "state-00001.safetensors"]
        sizes[engine] = [path.stat().st_size for path in files]
        assert max(sizes[engine]) < 0.8 * sum(sizes[engine]), "one rank writes nearly everything"
