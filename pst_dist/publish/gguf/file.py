"""Writes one GGUF file: metadata, tokenizer, chat template and weights.

Metadata follows the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.publish.gguf.architecture import add_settings, architecture_of, tensors_of
from pst_dist.publish.gguf.types import file_type, stored, stored_type
from pst_dist.publish.gguf.vocabulary import Vocabulary


@dataclass(frozen=True)
class About:
    """The descriptive part of a file's metadata; None is left out."""

    name: str
    description: str
    tags: tuple[str, ...]
    base_model: str | None = None
    """Hub id of the model that the student started from."""
    licence: str | None = None
    """Identifier of a licence, as on the hub."""


def write_gguf(
    file: Path, model: Any, vocabulary: Vocabulary, about: About, *, kind: str, template: str | None
) -> dict[str, int]:
    """Write the model as `kind` (see `types.TYPES`) and return how many tensors are stored in each of ggml's types.

    The caller gives a private path. Raises ConfigError for a model that llama.cpp does not compute in the same way, and
    EnvironmentFault when a package is missing.
    """
    import gguf

    writer = gguf.GGUFWriter(str(file), architecture_of(model))
    _add_about(writer, about, model, kind)
    add_settings(writer, model)
    _add_vocabulary(writer, vocabulary, template)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    layers, counts = model.config.num_hidden_layers, Counter[str]()
    for name, value in tensors_of(model):
        chosen = stored_type(kind, name, value.shape, layers=layers, tied=tied)
        counts[chosen] += 1
        writer.add_tensor(name, stored(value, chosen), raw_dtype=gguf.GGMLQuantizationType[chosen])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return dict(counts)


def _add_about(writer: Any, about: About, model: Any, kind: str) -> None:
    writer.add_type("model")
    writer.add_name(about.name)
    writer.add_description(about.description)
    writer.add_tags(list(about.tags))
    writer.add_file_type(file_type(kind))
    writer.add_quantization_version(2)
    writer.add_size_label(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g}M")
    if about.licence is not None:
        writer.add_license(about.licence)
    if about.base_model is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about.base_model.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{about.base_model}")


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, template: str | None) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos)
    # llama.cpp ends a generation at its end of text and at its end of turn: the answer stop is the latter.
    writer.add_eot_token_id(vocabulary.stop)
    writer.add_bos_token_id(vocabulary.eos if vocabulary.bos is None else vocabulary.bos)  # else llama.cpp assumes 11
    if vocabulary.padding is not None:
        writer.add_pad_token_id(vocabulary.padding)
    writer.add_add_bos_token(vocabulary.bos is not None)
    writer.add_add_eos_token(False)
    if template is not None:
        writer.add_chat_template(template)
