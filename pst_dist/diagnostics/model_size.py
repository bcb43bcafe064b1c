"""The size of a student from its config alone: parameters by formula or from the headers of its weight files.

For planning on a machine without torch; `student` loads the actual model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.config.schema import FreshConfig, StudentConfig
from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.models.locate import GGUF, PACKAGED, locate_model
from pst_dist.storage.regular_files import read_regular_text, safetensors_header
from pst_dist.student.warm_start import CAPITALS, VOCABULARY_MULTIPLE, warm_checkpoint, warm_shape

_BYTES, _SPECIAL = 256, 4
"""The byte tokenizer's alphabet; end, padding, answer stop and semantic tokens."""
_T5_BUCKETS = 32


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory and time depend on."""

    parameters: int
    """Number of parameters, tied matrices counted once, without the alignment head."""
    hidden_size: int
    layers: int
    """Decoder and encoder layers together."""
    vocabulary: int
    """Rows of the language-model head."""
    exact: bool
    """Whether the count comes from weight files or from a formula for exactly this architecture."""


def shape_of(student: StudentConfig, *, max_length: int) -> ModelShape:
    """The shape of a config's student. Raises InputError or EnvironmentFault when its config cannot be read."""
    if student.model_name_or_path is None:
        return fresh_shape(student.fresh, max_length=max_length)
    warm = warm_shape(student)
    if warm is not None:
        name = warm_checkpoint(student)
        folder = Path(name).expanduser()
        return warm_start_shape(
            _folder_config(folder) if folder.is_dir() else _hub_config(name, student.revision), warm
        )
    name = student.model_name_or_path
    if name in PACKAGED or name.lower().endswith(GGUF):
        from pst_dist.models.load import load_model_config

        return shape_of_config(load_model_config(locate_model(name)).to_dict(), None, name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return shape_of_config(_hub_config(name, student.revision), None, name)
    return shape_of_config(_folder_config(folder), _counted(folder), str(folder / "config.json"))


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise InputError("no config.json found", "give the folder of a Hugging Face model", path=folder)
    try:
        return json.loads(read_regular_text(path, remedy="give the folder of a Hugging Face model"))
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", path=path, line=error.lineno) from error


def fresh_shape(fresh: FreshConfig, *, max_length: int) -> ModelShape:
    """The shape of a student with random weights, as `student.pretrained.fresh_model` creates it."""
    words = _BYTES + _SPECIAL if fresh.tokenizer == "byte" else fresh.vocab_size + 2
    width = fresh.hidden_size
    sizes: dict[str, Any]
    common = {"vocab_size": -(-words // 8) * 8, "tie_word_embeddings": fresh.tie_word_embeddings}
    if fresh.architecture == "gpt2":
        sizes = {"n_embd": width, "n_layer": fresh.num_layers, "n_positions": max_length}
    elif fresh.architecture == "llama":
        heads = {"num_attention_heads": fresh.num_heads, "num_key_value_heads": fresh.num_heads}
        sizes = {"hidden_size": width, "num_hidden_layers": fresh.num_layers, "intermediate_size": 4 * width, **heads}
    else:
        gates: dict[str, Any] = {
            "num_heads": fresh.num_heads,
            "d_kv": width // fresh.num_heads,
            "feed_forward_proj": "gated-gelu",
        }
        sizes = {"d_model": width, "d_ff": 4 * width, "num_layers": fresh.num_layers, **gates}
    return shape_of_config({"model_type": fresh.architecture, **common, **sizes}, None, "student.fresh")


def shape_of_config(settings: dict[str, Any], counted: int | None, where: str) -> ModelShape:
    """The shape that a `config.json` describes; `counted` is the number of parameters if known.

    Formulas: GPT-2, T5 and BertGeneration as transformers builds them; others as a Llama (gated MLP, grouped keys, no
    biases), which is close but not exact for its many descendants.
    """
    settings = settings.get("text_config") or settings
    kind = settings.get("model_type")
    try:
        if kind == "encoder-decoder" and settings["decoder"].get("model_type") == "bert-generation":
            halves = [settings["encoder"], settings["decoder"]]
        else:
            halves = [settings] if kind == "bert-generation" else []
        if halves:
            count, width = sum(map(_bert_generation, halves)), int(halves[-1]["hidden_size"])
            layers = sum(int(half["num_hidden_layers"]) for half in halves)
            return ModelShape(counted or count, width, layers, int(halves[-1]["vocab_size"]), True)
        vocabulary = int(settings["vocab_size"])
        if kind == "gpt2":
            width, layers = int(settings["n_embd"]), int(settings["n_layer"])
            inner = settings.get("n_inner") or 4 * width
            block = 4 * width * width + 2 * width * inner + 9 * width + inner
            count = (vocabulary + int(settings["n_positions"])) * width + layers * block + 2 * width
        elif kind in ("t5", "mt5"):
            return _t5_shape(settings, vocabulary, counted)
        else:
            width, layers = int(settings["hidden_size"]), int(settings["num_hidden_layers"])
            heads = int(settings["num_attention_heads"])
            pairs = int(settings.get("num_key_value_heads") or heads)
            each = int(settings.get("head_dim") or width // heads)
            attention = 2 * width * heads * each + 2 * width * pairs * each
            block = attention + 3 * width * int(settings["intermediate_size"]) + 2 * width
            count = vocabulary * width + layers * block + width
    except KeyError as error:
        raise InputError(f"cannot compute the size of a {kind!r} without {error.args[0]}", path=where) from error
    if not settings.get("tie_word_embeddings", kind == "gpt2"):
        count += vocabulary * width
    exact = counted is not None or kind in ("gpt2", "llama")
    return ModelShape(counted or count, width, layers, vocabulary, exact)


def warm_start_shape(bert: dict[str, Any], warm: str) -> ModelShape:
    """The shape of a student that `student.warm_start` builds from a BERT encoder with this `config.json`."""
    new = len(CAPITALS) + 2  # the answer stop and the semantic token
    vocabulary = -(-(int(bert["vocab_size"]) + new) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    settings = {**bert, "model_type": "bert-generation", "vocab_size": vocabulary}
    if warm == "causal":
        return shape_of_config({**settings, "is_decoder": True}, None, "student.warm_start")
    decoder = {**settings, "is_decoder": True, "add_cross_attention": True}
    halves = {"model_type": "encoder-decoder", "encoder": settings, "decoder": decoder}
    return shape_of_config(halves, None, "student.warm_start")


def _bert_generation(settings: dict[str, Any]) -> int:
    """Parameters of a BertGeneration encoder, or of a decoder including its head's bias."""
    width, inner = int(settings["hidden_size"]), int(settings["intermediate_size"])
    attention = 4 * (width * width + width) + 2 * width
    layer = attention * (2 if settings.get("add_cross_attention") else 1) + 2 * width * inner + inner + 3 * width
    words = int(settings["vocab_size"])
    embeddings = (words + int(settings["max_position_embeddings"])) * width + 2 * width
    return embeddings + int(settings["num_hidden_layers"]) * layer + (words if settings.get("is_decoder") else 0)


def _t5_shape(settings: dict[str, Any], vocabulary: int, counted: int | None) -> ModelShape:
    width, layers = int(settings["d_model"]), int(settings["num_layers"])
    decoders = int(settings.get("num_decoder_layers") or layers)
    heads = int(settings["num_heads"])
    matrices = 3 if str(settings.get("feed_forward_proj", "relu")).startswith("gated") else 2
    attention = 4 * width * heads * int(settings["d_kv"])
    forward = matrices * width * int(settings["d_ff"])
    encoder = layers * (attention + forward + 2 * width)
    decoder = decoders * (2 * attention + forward + 3 * width)
    ends = 2 * (heads * int(settings.get("relative_attention_num_buckets", _T5_BUCKETS)) + width)
    count = vocabulary * width + encoder + decoder + ends
    return ModelShape(counted or count, width, layers + decoders, vocabulary, True)


def _counted(folder: Path) -> int | None:
    """Parameters in a folder's safetensors files, from their headers; None without such files."""
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name != "alignment_head.safetensors"]
    total = 0
    for file in files:
        header, _ = safetensors_header(file)
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None


def _hub_config(name: str, revision: str | None) -> dict[str, Any]:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise EnvironmentFault(
            f"cannot look {name} up without huggingface_hub", "pip install 'pst-dist[train]', or give a folder"
        ) from error
    try:
        return json.loads(Path(hf_hub_download(name, "config.json", revision=revision)).read_text())
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            "config.json is not in the cache and cannot be downloaded",
            "check its name, the network and HF_TOKEN, or give a folder",
            path=name,
        ) from error
