"""The size of a student from its config alone: parameters by formula or from the headers of its weight files.

For planning on a machine without torch; `student` loads the actual model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pst_dist.config.schema import Config, FreshConfig, StudentConfig
from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.models.adapters import is_adapter
from pst_dist.models.hub import use_cache_without_hub
from pst_dist.models.locate import GGUF, PACKAGED, locate_model
from pst_dist.storage.foreign_json import MOST_WHOLE, foreign_object, section, whole_number
from pst_dist.storage.regular_files import safetensors_header
from pst_dist.student.warm_start import CAPITALS, VOCABULARY_MULTIPLE, warm_checkpoint, warm_shape

_BYTES, _SPECIAL = 256, 4
"""The byte tokenizer's alphabet; end, padding, answer stop and semantic tokens."""
_T5_BUCKETS = 32


@dataclass(frozen=True)
class LayerShape:
    """The widths inside a layer, on which its activations depend."""

    family: Literal["gpt2", "llama", "t5", "bert"]
    """GPT-2: LayerNorm, one matrix for queries, keys and values, tanh GELU. Llama: RMSNorm, rotary positions, gated
    MLP; also stands for architectures without a rule of their own. T5: RMSNorm, gated or plain MLP. BERT: LayerNorm
    after the sum, exact GELU."""
    inner: int
    """Width of the MLP."""
    queries: int
    """Heads times width of a head."""
    keys: int
    """Key-value heads times width of a head: less than `queries` with grouped-query attention."""
    heads: int
    gated: bool = False
    dropout: bool = False
    """Whether the model drops out in training, as the published GPT-2 and T5 do."""


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
    layer: LayerShape
    """What a layer is made of."""
    encoder_layers: int = 0
    """How many of the layers read the prompt alone, in an encoder-decoder."""


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
    if Path(name).expanduser().is_dir() and is_adapter(Path(name).expanduser()):
        below = locate_model(name)
        name = str(Path(below.target) / below.gguf) if below.gguf else below.target
        return shape_of(StudentConfig(model_name_or_path=name, revision=below.revision), max_length=max_length)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return shape_of_config(_hub_config(name, student.revision), None, name)
    return shape_of_config(_folder_config(folder), _counted(folder), str(folder / "config.json"))


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise InputError("no config.json found", "give the folder of a Hugging Face model", path=folder)
    return foreign_object(path, remedy="give the folder of a Hugging Face model")


def adapter_parameters(config: Config) -> int:
    """Parameters that LoRA adds to a config's student: adapters, and the rows of the added tokens' embeddings.

    Counted in the structure of the model, without its weights; this needs transformers and peft. Raises what building
    the student would raise.
    """
    from pst_dist.models.load import language_model_without_weights
    from pst_dist.student.lora import put_adapters, trained_count
    from pst_dist.student.pretrained import pretrained_shape
    from pst_dist.student.tokenizer import build_tokenizer

    student = config.student
    name = str(student.model_name_or_path)
    place = locate_model(name, student.revision)
    model = language_model_without_weights(pretrained_shape(name, student.revision), place)
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tokens, known = len(build_tokenizer(student, ())), inputs.shape[0]
    rows = 2 if tokens <= known else -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE - known
    matrices = 1 if head is inputs else 2
    put_adapters(model, config, without_weights=True)
    return trained_count(model) + matrices * rows * inputs.shape[1]


def fresh_shape(fresh: FreshConfig, *, max_length: int) -> ModelShape:
    """The shape of a student with random weights, as `student.pretrained.fresh_model` creates it."""
    words = _BYTES + _SPECIAL if fresh.tokenizer == "byte" else fresh.vocab_size + 2
    width = fresh.hidden_size
    sizes: dict[str, Any]
    common = {"vocab_size": -(-words // 8) * 8, "tie_word_embeddings": fresh.tie_word_embeddings}
    if fresh.architecture == "gpt2":
        sizes = {"n_embd": width, "n_layer": fresh.num_layers, "n_positions": max_length, "n_head": fresh.num_heads}
        sizes |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0}
    elif fresh.architecture == "llama":
        heads = {"num_attention_heads": fresh.num_heads, "num_key_value_heads": fresh.num_heads}
        sizes = {"hidden_size": width, "num_hidden_layers": fresh.num_layers, "intermediate_size": 4 * width, **heads}
    else:
        gates: dict[str, Any] = {
            "num_heads": fresh.num_heads,
            "d_kv": width // fresh.num_heads,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
        }
        sizes = {"d_model": width, "d_ff": 4 * width, "num_layers": fresh.num_layers, **gates}
    return shape_of_config({"model_type": fresh.architecture, **common, **sizes}, None, "student.fresh")


def shape_of_config(settings: Mapping[str, Any], counted: int | None, where: str) -> ModelShape:
    """The shape that a `config.json` describes; `counted` is the number of parameters if known.

    Formulas: GPT-2, T5 and BertGeneration as transformers builds them; others as a Llama (gated MLP, grouped keys, no
    biases), which is close but not exact for its many descendants.
    """
    settings = section(settings, "text_config", where) if settings.get("text_config") else settings
    kind = settings.get("model_type")

    def size(key: str, of: Mapping[str, Any] = settings) -> int:
        return whole_number(of, key, where)

    try:
        if kind == "encoder-decoder" and (section(settings, "decoder", where).get("model_type") == "bert-generation"):
            halves = [section(settings, "encoder", where), section(settings, "decoder", where)]
        else:
            halves = [settings] if kind == "bert-generation" else []
        if halves:
            count, width = (
                sum(_bert_generation(half, where) for half in halves),
                size("hidden_size", halves[-1]),
            )
            layers = sum(size("num_hidden_layers", half) for half in halves)
            last, encoders = halves[-1], size("num_hidden_layers", halves[0]) if len(halves) > 1 else 0
            dropout = bool(last.get("hidden_dropout_prob", 0.1))
            inner, heads = size("intermediate_size", last), size("num_attention_heads", last)
            layer = LayerShape("bert", inner, width, width, heads, dropout=dropout)
            return ModelShape(counted or count, width, layers, size("vocab_size", last), True, layer, encoders)
        vocabulary = size("vocab_size")
        if kind == "gpt2":
            width, layers = size("n_embd"), size("n_layer")
            inner = _optional(settings, "n_inner", where) or 4 * width
            block = 4 * width * width + 2 * width * inner + 9 * width + inner
            count = (vocabulary + size("n_positions")) * width + layers * block + 2 * width
            dropout = any(settings.get(key, 0.1) for key in ("resid_pdrop", "attn_pdrop"))
            heads = _optional(settings, "n_head", where) or 12
            layer = LayerShape("gpt2", inner, width, width, heads, dropout=dropout)
        elif kind in ("t5", "mt5"):
            return _t5_shape(settings, vocabulary, counted, where)
        else:
            width, layers = (
                size("hidden_size"),
                size("num_hidden_layers"),
            )
            heads = size("num_attention_heads")
            pairs = _optional(settings, "num_key_value_heads", where) or heads
            each = _optional(settings, "head_dim", where) or width // heads
            attention = 2 * width * heads * each + 2 * width * pairs * each
            inner = size("intermediate_size")
            block = attention + 3 * width * inner + 2 * width
            layer = LayerShape("llama", inner, heads * each, pairs * each, heads, gated=True)
            count = vocabulary * width + layers * block + width
    except KeyError as error:
        what = f"cannot compute the size of a {str(kind)[:60]!r} without {error.args[0]}"
        raise InputError(what, path=where) from error
    if not settings.get("tie_word_embeddings", kind == "gpt2"):
        count += vocabulary * width
    exact = counted is not None or kind in ("gpt2", "llama")
    return ModelShape(counted or count, width, layers, vocabulary, exact, layer)


def warm_start_shape(bert: dict[str, Any], warm: str) -> ModelShape:
    """The shape of a student that `student.warm_start` builds from a BERT encoder with this `config.json`."""
    new = len(CAPITALS) + 2  # the answer stop and the semantic token
    vocabulary = (
        -(-(whole_number(bert, "vocab_size", "student.warm_start") + new) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    )
    settings = {**bert, "model_type": "bert-generation", "vocab_size": vocabulary}
    if warm == "causal":
        return shape_of_config({**settings, "is_decoder": True}, None, "student.warm_start")
    decoder = {**settings, "is_decoder": True, "add_cross_attention": True}
    halves = {"model_type": "encoder-decoder", "encoder": settings, "decoder": decoder}
    return shape_of_config(halves, None, "student.warm_start")


def _bert_generation(settings: Mapping[str, Any], where: str) -> int:
    """Parameters of a BertGeneration encoder, or of a decoder including its head's bias."""

    def size(key: str) -> int:
        return whole_number(settings, key, where)

    width, inner = size("hidden_size"), size("intermediate_size")
    attention = 4 * (width * width + width) + 2 * width
    layer = attention * (2 if settings.get("add_cross_attention") else 1) + 2 * width * inner + inner + 3 * width
    words = size("vocab_size")
    embeddings = (words + size("max_position_embeddings")) * width + 2 * width
    return embeddings + size("num_hidden_layers") * layer + (words if settings.get("is_decoder") else 0)


def _t5_shape(settings: Mapping[str, Any], vocabulary: int, counted: int | None, where: str) -> ModelShape:
    def size(key: str) -> int:
        return whole_number(settings, key, where)

    width, layers = size("d_model"), size("num_layers")
    decoders = _optional(settings, "num_decoder_layers", where) or layers
    heads = size("num_heads")
    matrices = 3 if str(settings.get("feed_forward_proj", "relu")).startswith("gated") else 2
    attention = 4 * width * heads * size("d_kv")
    forward = matrices * width * size("d_ff")
    encoder = layers * (attention + forward + 2 * width)
    decoder = decoders * (2 * attention + forward + 3 * width)
    buckets = _optional(settings, "relative_attention_num_buckets", where) or _T5_BUCKETS
    ends = 2 * (heads * buckets + width)
    count = vocabulary * width + encoder + decoder + ends
    inner, queries = size("d_ff"), heads * size("d_kv")
    layer = LayerShape("t5", inner, queries, queries, heads, matrices == 3, bool(settings.get("dropout_rate", 0.1)))
    return ModelShape(counted or count, width, layers + decoders, vocabulary, True, layer, layers)


def _optional(settings: Mapping[str, Any], key: str, where: str) -> int | None:
    """A whole number that may be missing or null."""
    return None if settings.get(key) is None else whole_number(settings, key, where)


def _counted(folder: Path) -> int | None:
    """Parameters in a folder's safetensors files, from their headers; None without such files."""
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name != "alignment_head.safetensors"]
    total = 0
    for file in files:
        header, _ = safetensors_header(file)
        total += sum(_elements(entry, file) for name, entry in header.items() if name != "__metadata__")
    return total or None


def _elements(entry: Any, file: Path) -> int:
    """Elements of one tensor in a safetensors header; raises InputError for an entry that is none."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    sizes = shape if isinstance(shape, list) and len(shape) <= 16 else [None]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MOST_WHOLE for size in sizes):
        raise InputError("not safetensors: a tensor in its header has no shape", "copy the file again", path=file)
    return math.prod(sizes)


def _hub_config(name: str, revision: str | None) -> dict[str, Any]:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise EnvironmentFault(
            f"cannot look {name} up without huggingface_hub", "pip install 'pst-dist[train]', or give a folder"
        ) from error
    use_cache_without_hub()
    try:
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            "config.json is not in the cache and cannot be downloaded",
            "check its name, the network and HF_TOKEN, or give a folder",
            path=name,
        ) from error
    return foreign_object(path)
