"""Turns a pretrained model into a LoRA student: frozen weights, adapters beside them, trained rows for added tokens.

The adapters are peft's, put into the Hugging Face model in place: it stays the same class, its head stays a module of
its own, and decoding, hooks and ZeRO work as before. `models.adapters` writes and reads adapters as PEFT folders.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from pst_dist.arms import SEMANTIC_TOKEN, STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.config.zero import zero_stage
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.models.adapters import need_peft
from pst_dist.models.locate import ModelPlace
from pst_dist.student.holding import WHOLE, Holding, shape_of_weight
from pst_dist.student.token_rows import train_rows

_ALPHA_OVER_RANK = 2.0
ALL_LINEAR = "all-linear"


def is_adapted(model: Any) -> bool:
    """Whether a model has adapters in it, so that only they are trained and saved."""
    return hasattr(model, "peft_config")


def trained_count(model: Any) -> int:
    """Number of parameters that are trained, also where ZeRO-3 has split them."""
    return sum(getattr(one, "ds_numel", one.numel()) for one in model.parameters() if one.requires_grad)


def adapter_settings(config: Config) -> Any:
    """peft's LoraConfig for `student.lora`; raises EnvironmentFault when peft is not installed."""
    need_peft("student.lora")
    from peft import LoraConfig

    lora, student = config.student.lora, config.student
    name = str(student.model_name_or_path)
    path = Path(name).expanduser()
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else _ALPHA_OVER_RANK * lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        base_model_name_or_path=str(path.absolute()) if path.exists() else name,
        revision=student.revision,
    )


def add_adapters(model: Any, config: Config, tokenizer: Any, *, known_rows: int, holding: Holding = WHOLE) -> None:
    """Freeze the model and give it adapters, and trained rows for our tokens and all after the base's `known_rows`.

    The adapters' first matrices are drawn from the global generator. Raises what `put_adapters` and `train_rows` raise.
    """
    put_adapters(model, config)
    rows = shape_of_weight(model.get_input_embeddings().weight)[0]
    ours = {tokenizer.convert_tokens_to_ids(token) for token in (STOP_TOKEN, SEMANTIC_TOKEN)}
    head = model.get_output_embeddings()
    with holding.gathered([model.get_input_embeddings().weight, getattr(head, "base_layer", head).weight]):
        train_rows(model, sorted({*ours, *range(known_rows, rows)}))
    if config.student.lora.frozen_dtype == "bfloat16":
        for parameter in model.parameters():
            is_matrix = len(shape_of_weight(parameter)) >= 2
            if not parameter.requires_grad and is_matrix and parameter.dtype == torch.float32:
                holding.cast(parameter, torch.bfloat16)


def put_adapters(model: Any, config: Config, *, without_weights: bool = False) -> None:
    """Freeze the model and put adapters into the modules that the config names.

    Raises ConfigError for names that no module has and for embeddings that would change with the head, EnvironmentFault
    when peft is not installed.
    """
    settings = adapter_settings(config)
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    targets = config.student.lora.target_modules
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2's, which peft recognises itself
            inject_adapter_in_model(settings, model, low_cpu_mem_usage=without_weights)
    except ValueError as error:  # peft raises it for names that match nothing, and for modules that take no adapter
        raise ConfigError(
            f"student.lora.target_modules={targets}: {' '.join(str(error).split())[:200]}",
            f"name linear layers of {type(model).__name__}, or use {ALL_LINEAR}",
        ) from error
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    # `base_layer` is what an adapter keeps of the module it is put around.
    if hasattr(inputs, "base_layer") or (hasattr(head, "base_layer") and head.base_layer.weight is inputs.weight):
        raise ConfigError(
            f"student.lora.target_modules={targets} includes the embeddings"
            + ("" if hasattr(inputs, "base_layer") else ", which are also the language-model head"),
            f"leave them out, as {ALL_LINEAR} does; the added tokens' embeddings are trained anyway",
        )


def quantised_loading(config: Config, place: ModelPlace) -> dict[str, Any]:
    """transformers' arguments that load a base in 4 bits for `student.lora.quantize`; {} without it.

    Raises EnvironmentFault without bitsandbytes or an NVIDIA GPU, ConfigError for ZeRO-3 and for a GGUF file.
    """
    if config.student.lora.quantize is None:
        return {}
    key = f"student.lora.quantize={config.student.lora.quantize}"
    if place.gguf is not None or place.adapters:
        raise ConfigError(f"{key} needs the folder or hub id of a whole model", "leave it out for this base")
    if zero_stage(config.train.deepspeed) == 3:
        raise ConfigError(f"{key} does not work with ZeRO-3, which splits the weights", "use train.deepspeed=zero2")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(
            f"{key} needs the package bitsandbytes", "pip install 'pst-dist[bitsandbytes]'"
        ) from error
    if not torch.cuda.is_available():
        raise EnvironmentFault(f"{key} needs an NVIDIA GPU, and torch finds none here", "leave it out on this machine")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.student.lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.train.bf16 is True else torch.float32,
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}
