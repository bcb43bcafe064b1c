"""A Hugging Face model in llama.cpp's terms: its architecture, hyperparameters and tensors.

llama.cpp computes each architecture in one way and ignores settings that it does not know, so everything that would
change the result and that it cannot express is refused here by name. Sources: llama.cpp's convert_hf_to_gguf.py and
`gguf.constants`; the tensors' names come from the package gguf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pst_dist.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

FAMILIES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model type -> llama.cpp's architecture."""
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
"""GPT-2 keeps these matrices as [in, out]."""
_IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_ROPE = ("default", "linear", "llama3")


def architecture_of(model: Any) -> str:
    """llama.cpp's name for the model's architecture.

    Raises ConfigError for a family or a setting that it does not compute as transformers does.
    """
    config = model.config
    if config.is_encoder_decoder:
        raise _refused(f"{config.model_type} is an encoder-decoder, which llama.cpp's server does not serve")
    if config.model_type not in FAMILIES:
        raise _refused(f"the family {config.model_type} is not one of {', '.join(FAMILIES)}")
    wanted: dict[str, tuple[Any, ...]]
    if config.model_type == "gpt2":
        wanted = {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        }
    else:
        wanted = {"hidden_act": ("silu",)}
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
        if set(kinds) != {"full_attention"} or (window is not None and window < config.max_position_embeddings):
            raise _refused("it attends to a sliding window, which llama.cpp does not apply to this family")
        _rope_factors(model)
    for key, values in wanted.items():
        if getattr(config, key) not in values:
            raise _refused(f"its {key} is {getattr(config, key)!r}, and llama.cpp computes {values[0]!r}")
    return FAMILIES[config.model_type]


def add_settings(writer: GGUFWriter, model: Any) -> None:
    """Write the hyperparameters of a model that `architecture_of` accepts."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(head)


def tensors_of(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, float32 array) of every weight; raises ConfigError for a weight that has no place there."""
    import gguf

    config = model.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[config.model_type])
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, weight in model.state_dict().items():
        if name.endswith(_IGNORED) or (tied and name == "lm_head.weight"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise _refused(f"its weight {name} has no place there")
        yield target, _laid_out(name, weight, config)
    factors = None if config.model_type == "gpt2" else _rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _laid_out(name: str, weight: Tensor, config: Any) -> np.ndarray:
    """One weight in llama.cpp's layout."""
    value = weight.detach().float().cpu().numpy()
    if config.model_type == "gpt2" and name.endswith(_TRANSPOSED):
        value = value.T
    if FAMILIES[config.model_type] == "llama" and ".self_attn." in name and ("q_proj." in name or "k_proj." in name):
        # Llama's rotary embedding pairs neighbours in llama.cpp and halves in transformers.
        heads = config.num_attention_heads if "q_proj." in name else config.num_key_value_heads
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)


def _rope_factors(model: Any) -> np.ndarray | None:
    """What llama.cpp divides each rotary frequency by, [head / 2]; None when they are the plain powers of theta.

    Raises ConfigError for a kind of scaling that depends on the length of the text or scales the attention.
    """
    config = model.config
    kind = config.rope_parameters.get("rope_type", "default")
    rotary = model.model.rotary_emb
    if kind not in _ROPE or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise _refused(f"its rotary embedding is scaled by {kind!r}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("its rotary embedding covers a part of each head")
    found = rotary.inv_freq.double().cpu().numpy()
    plain = config.rope_parameters["rope_theta"] ** (-np.arange(len(found)) / len(found))
    if np.allclose(found, plain, rtol=1e-5, atol=0):
        return None
    if FAMILIES[config.model_type] != "llama":
        raise _refused(f"its rotary embedding is scaled by {kind!r}, which is written for the family llama only")
    return (plain / found).astype(np.float32)


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"this student cannot be written to GGUF: {why}", "serve the export with transformers (`transformers serve`)"
    )
