"""Parsers of the files of a model: its config and its weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from pst_dist.config.schema import StudentConfig

from .registry import parser, put

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
_T5 = {"model_type": "t5", "d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 16, "vocab_size": 99}
_GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_positions": 64, "vocab_size": 99, "n_inner": None}
_BERT = {
    "model_type": "bert-generation",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
    "max_position_embeddings": 32,
}


@parser(
    "model config",
    _LLAMA,
    _T5,
    _GPT2,
    {"text_config": _LLAMA},
    {"model_type": "encoder-decoder", "encoder": _BERT, "decoder": {**_BERT, "is_decoder": True}},
    weight=2,
)
def _model(content: bytes, folder: Path) -> object:
    from pst_dist.config.schema import Config
    from pst_dist.diagnostics.cost import teacher_width
    from pst_dist.training.memory.model_size import shape_of
    from pst_dist.training.memory.training_memory import rank_memory

    put(folder, "config.json", content)
    shape = shape_of(StudentConfig(model_name_or_path=str(folder)), max_length=64)
    config = Config()
    (folder / "model.safetensors").unlink(missing_ok=True)
    teacher_width(config.model_copy(update={"embed": config.embed.model_copy(update={"encoder": str(folder)})}))
    return rank_memory(config, shape, shape.parameters, 0, 1, micro_tokens=512).total


def _safetensors(header: dict[str, Any], size: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


_WEIGHTS = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}


@parser("weights", _WEIGHTS, _safetensors(_WEIGHTS, 24))
def _weights(content: bytes, folder: Path) -> object:
    from pst_dist.training.memory.model_size import _counted

    if content[:1] == b"{":  # the header alone, so that its values are changed and its length is right
        content = struct.pack("<Q", len(content)) + content + b"\0" * 24
    path = put(folder, "model.safetensors", content)
    try:
        return _counted(folder)
    finally:
        path.unlink()
