"""Models that cannot be loaded as they are: one line each, before anything is made, and never random weights."""

from __future__ import annotations

import ast
import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import zoo
from safetensors.torch import load_file, save_file

import pst_dist
from pst_dist.config.loading import load_config
from pst_dist.diagnostics.preflight import preflight
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.encoder_model import check_encoder
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, PstError
from pst_dist.logs import quiet_libraries
from pst_dist.models.load import load_bare_encoder, load_language_model, load_tokenizer
from pst_dist.models.locate import locate_encoder, locate_model
from pst_dist.pipeline import run_all
from pst_dist.student.pretrained import build_model
from pst_dist.student.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return zoo.make("llama3", tmp_path_factory.mktemp("base") / "llama3")


@pytest.fixture
def copied(llama, tmp_path) -> Path:
    """A copy of the base to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "spoilt"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights(folder: Path, new: Callable[[str], str | None]) -> None:
    """Store each weight under another name; None leaves it out."""
    file = folder / "model.safetensors"
    kept = {new(name): value.contiguous() for name, value in load_file(file).items() if new(name) is not None}
    save_file(kept, file, metadata={"format": "pt"})


def config_of(folder: Path | str, output: Path, **changes: object):
    settings = {
        "data.train": "gen:last_letters?rows=20&seed=0&words=2",
        "data.test_size": 4,
        "student.model_name_or_path": str(folder),
        "layout.max_length": 96,
        "arm": "answer_only",
        "output_dir": str(output / "run"),
        "data_dir": str(output / "data"),
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"{key}={value}" for key, value in settings.items() if value is not None])


def line_of(error: PstError) -> str:
    line = str(error)
    assert "\n" not in line and "\x1b" not in line and len(line) < 700
    return line


def test_weights_under_other_names_are_refused_by_name(copied):
    rename_weights(copied, lambda name: f"_orig_mod.{name}")
    with pytest.raises(
        InputError, match=r"of its weights are missing from the files \(lm_head\.weight, model\.embed"
    ) as caught:
        load_language_model(locate_model(str(copied)))
    assert "instead the files contain _orig_mod.model.embed_tokens.weight" in line_of(caught.value)


def test_a_missing_layer_is_refused_and_counted(copied):
    rename_weights(copied, lambda name: None if "layers.1.mlp" in name else name)
    with pytest.raises(
        InputError, match=r"3 of its weights are missing from the files \(model\.layers\.1\.mlp\.down_proj"
    ):
        load_language_model(locate_model(str(copied)))


def test_a_tied_head_may_be_missing_and_an_untied_one_may_not(copied, caplog):
    assert "lm_head.weight" not in load_file(copied / "model.safetensors")
    load_language_model(locate_model(str(copied)))
    edit(copied / "config.json", tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"1 of its weights are missing from the files \(lm_head\.weight\)"):
        load_language_model(locate_model(str(copied)))


def test_weights_that_the_model_does_not_have_are_named_in_a_warning(copied, caplog):
    file = copied / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "score.weight": next(iter(weights.values())).clone()}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "pst_dist"):
        load_language_model(locate_model(str(copied)))
    assert "1 weights in its files are not used: score.weight" in caplog.text


def test_another_vocabulary_in_the_config_than_in_the_weights_is_refused(copied, tmp_path):
    edit(copied / "config.json", vocab_size=300)
    wanted = r"for example model\.embed_tokens\.weight: \[320, 32\] instead of \[300, 32\]"
    with pytest.raises(InputError, match=wanted):
        load_language_model(locate_model(str(copied)))
    with pytest.raises(InputError, match=wanted):  # and from the headers alone
        preflight(config_of(copied, tmp_path))


@pytest.mark.encoder
def test_encoders_with_weights_that_do_not_match_are_refused(tmp_path):
    folder = Path(shutil.copytree(locate_encoder("minilm"), tmp_path / "minilm"))
    rename_weights(folder, lambda name: None if name.startswith("pooler.") else name)
    place = locate_model(str(folder))
    load_bare_encoder(place)  # nothing reads the pooler
    config = config_of("minilm", tmp_path, embed__encoder=folder).embed
    assert TextEncoder(config).dimension == 384
    rename_weights(folder, lambda name: f"_orig_mod.{name}")
    with pytest.raises(InputError, match=r"of its weights are missing from the files"):
        load_bare_encoder(place)
    with pytest.raises(InputError, match=r"cannot load the sentence encoder: .* weights are missing"):
        TextEncoder(config)


@pytest.mark.encoder
def test_static_embedding_models_and_adapters_are_refused_as_encoders(tmp_path):
    folder = Path(shutil.copytree(locate_encoder("minilm"), tmp_path / "static"))
    kind = "sentence_transformers.sentence_transformer.modules.StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    with pytest.raises(InputError, match="static embedding model"):
        check_encoder(config_of("minilm", tmp_path, embed__encoder=folder).embed)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    with pytest.raises(InputError, match=r"is an adapter \(LoRA\), not a whole model"):
        check_encoder(config_of("minilm", tmp_path, embed__encoder=tmp_path / "adapter").embed)


def quantised(method: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})


def newer_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    edit(file, pre_tokenizer={"type": "SomethingNewer", "behavior": "isolated"})


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def custom_code(folder: Path) -> None:
    edit(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.M"},
    )
    (folder / "mine.py").write_text("raise SystemExit('foreign code ran')\n")


def custom_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": ["mine.Tokenizer", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=auto_map)
    (folder / "mine.py").write_text("raise SystemExit('foreign code ran')\n")


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else", "peft_type": "LORA"}')


def settings(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


SPOILT = {
    "bitsandbytes": (quantised("bitsandbytes"), ConfigError, r"quantised \(bitsandbytes\) and cannot be trained"),
    "gptq": (quantised("gptq"), ConfigError, r"quantised \(gptq\)"),
    "a quantisation nobody knows": (quantised("new"), ConfigError, r"quantised \(new\)"),
    "newer tokenizer.json": (
        newer_tokenizer,
        InputError,
        "student's tokenizer: .*newer format: pip install -U tokenizers",
    ),
    "no tokenizer": (no_tokenizer, InputError, "cannot load the student's tokenizer"),
    "a field of the wrong type": (settings(intermediate_size=128.5), InputError, "intermediate_size"),
    "heads that do not divide the width": (settings(num_attention_heads=5), InputError, "attention heads"),
    "custom code": (custom_code, InputError, r"Python code in its own folder \(auto_map\), which is never run"),
    "a custom tokenizer": (custom_tokenizer, InputError, r"Python code in its own folder \(auto_map\)"),
    "an architecture nobody knows": (settings(model_type="newer"), InputError, "newer"),
    "fewer positions than tokens": (
        settings(max_position_embeddings=24),
        ConfigError,
        "max_length is 96, this student has 24",
    ),
    "an adapter": (adapter, InputError, "is an adapter"),
    "no head": (settings(model_type="vit"), PstError, "cannot load the student"),
    "a missing layer": (
        lambda folder: rename_weights(folder, lambda name: None if "layers.1.mlp" in name else name),
        InputError,
        "3 of its weights are missing",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_base_that_cannot_be_trained_is_one_line_before_anything_is_written(copied, tmp_path, case, monkeypatch):
    spoil, kind, words = SPOILT[case]
    spoil(copied)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    config = config_of(copied, tmp_path)
    with pytest.raises(kind, match=words) as caught:
        run_all(config)
    line_of(caught.value)
    assert not Path(config.output_dir).exists() and not (tmp_path / "data").exists()


@pytest.mark.parametrize("case", ["newer tokenizer.json", "a field of the wrong type", "custom code", "gptq"])
def test_training_alone_refuses_them_in_one_line_too(copied, tmp_path, case):
    spoil, kind, words = SPOILT[case]
    spoil(copied)
    config = config_of(copied, tmp_path)
    with pytest.raises(kind, match=words) as caught:
        build_model(config, build_tokenizer(config.student, ()))
    line_of(caught.value)


def test_flash_attention_without_its_package_is_one_line_for_every_kind_of_student(llama, tmp_path):
    for folder in (llama, None):
        config = config_of("x", tmp_path, student__attn_implementation="flash_attention_2")
        student = config.student.model_copy(update={"model_name_or_path": str(folder) if folder else None})
        with pytest.raises(EnvironmentFault, match=r"cannot load the (fresh )?student: FlashAttention2") as caught:
            preflight(config.model_copy(update={"student": student}))
        line_of(caught.value)


def test_the_split_and_the_ranks_are_checked_before_anything_is_written(llama, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no test rows to score"):
        preflight(config_of(llama, tmp_path, data__test_size=0))
    preflight(config_of(llama, tmp_path, data__test_size=0, evaluate__split="validation"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EnvironmentFault, match="2 ranks, but MASTER_ADDR is not set"):
        preflight(config_of(llama, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(EnvironmentFault, match="WORLD_SIZE is 'two', not a number"):
        preflight(config_of(llama, tmp_path))


def test_a_student_that_only_ray_workers_have_is_left_to_them(llama, tmp_path):
    preflight(config_of("/somewhere/on/the/workers", tmp_path, train__backend="ray"))
    with pytest.raises(InputError, match="no such folder"):
        preflight(config_of("/somewhere/on/the/workers", tmp_path))
    with pytest.raises(ConfigError, match="max_length is 300, this student has 256 positions"):
        preflight(config_of(llama, tmp_path, train__backend="ray", layout__max_length=300))


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family_of_the_zoo_passes(name, tmp_path):
    preflight(config_of(zoo.make(name, tmp_path / name), tmp_path))


def test_a_fresh_student_passes_for_every_arm(tmp_path):
    arms = "[answer_only,pre_thinking,prefix,post_thinking,adaptive]"
    config = config_of("x", tmp_path, student__model_name_or_path="null", arm=None, arms=arms)
    preflight(config)


def test_a_warning_that_changes_what_a_model_reads_comes_through_and_noise_does_not(monkeypatch):
    quiet_libraries()
    shown = io.StringIO()
    monkeypatch.setattr(logging.getLogger("transformers").handlers[0], "stream", shown)
    library = logging.getLogger("transformers.tokenization_utils_base")
    library.warning("The tokenizer class you load from this checkpoint is not the same type as the class")
    library.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
    library.error("something that is deprecated broke")
    assert "not the same type" in shown.getvalue() and "`torch_dtype`" not in shown.getvalue()
    assert "broke" in shown.getvalue()


def test_no_call_in_the_package_may_run_foreign_code():
    """Every `from_pretrained`, `from_config` of an Auto class and SentenceTransformer says trust_remote_code=False."""
    seen = 0
    for path in Path(pst_dist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in ("from_pretrained", "from_config", "SentenceTransformer", "CrossEncoder", "pipeline"):
                continue
            if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "PeftConfig":
                continue  # reads one JSON file, and has no code to run
            seen += 1
            said = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
            assert isinstance(said, ast.Constant) and said.value is False, f"{path}:{node.lineno}: {name}"
    assert seen >= 7


def test_the_tokenizer_of_every_family_loads_without_a_question(llama):
    assert load_tokenizer(locate_model(str(llama))).eos_token == "<|eot_id|>"
