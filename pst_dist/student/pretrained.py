"""Builds the student's Hugging Face model: from random weights, a hub id or folder, or an encoder's weights.

`training.module` trains the model; `student.warm_start` turns an encoder into a model that writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pst_dist.config.schema import Config, FreshConfig, StudentConfig
from pst_dist.errors import ConfigError
from pst_dist.models.identity import base_identity
from pst_dist.models.load import (
    language_model_without_weights,
    layers_of,
    load_language_model,
    load_model_config,
    positions_of,
)
from pst_dist.models.load_errors import WEIGHTS, loading_errors
from pst_dist.models.locate import ModelPlace, locate_model
from pst_dist.models.weight_checks import check_headers
from pst_dist.student.holding import WHOLE, Holding, shape_of_weight
from pst_dist.student.lora import add_adapters, put_adapters, quantised_loading
from pst_dist.student.new_tokens import start_new_tokens, token_start
from pst_dist.student.warm_start import check_warm_start, warm_checkpoint, warm_model, warm_shape


def build_model(config: Config, tokenizer: Any, holding: Holding = WHOLE) -> Any:
    """The student's Hugging Face model with its weights: from a hub id or folder, an encoder, or random ones.

    `holding` says how the ranks hold the weights; with one that divides them, this is collective. Raises InputError or
    EnvironmentFault when it cannot be loaded, ConfigError for one that cannot write.
    """
    settings, known_rows = config.student, 0
    if settings.model_name_or_path is None:
        model = holding.fresh(
            lambda: fresh_model(
                settings.fresh,
                tokenizer,
                max_length=config.layout.max_length,
                attn_implementation=settings.attn_implementation,
            )
        )
    elif warm_shape(settings) is not None:
        model = holding.whole(lambda: warm_model(settings, tokenizer, max_length=config.layout.max_length))
    else:
        model = _pretrained_model(config, settings.model_name_or_path, holding)
        known_rows = shape_of_weight(model.get_input_embeddings().weight)[0]
        if len(tokenizer) > known_rows:
            # A multiple of 64 keeps the head's matrix products on the fast path of tensor cores.
            holding.resize(model, len(tokenizer), 64)
    _check_architecture(model)
    start_new_tokens(model, tokenizer, token_start(config, tokenizer), holding)
    if settings.lora.rank:
        add_adapters(model, config, tokenizer, known_rows=known_rows, holding=holding)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def base_of(settings: StudentConfig) -> dict[str, Any] | None:
    """The identity of the weights that a student starts from (see `base_identity`); None for a fresh one."""
    place = base_place(settings)
    return None if place is None else base_identity(place)


def base_place(settings: StudentConfig) -> ModelPlace | None:
    """Where the weights are that a student starts from; None for a fresh one."""
    if settings.model_name_or_path is None:
        return None
    name = warm_checkpoint(settings) if warm_shape(settings) is not None else settings.model_name_or_path
    return locate_model(name, settings.revision)


def fresh_model(fresh: FreshConfig, tokenizer: Any, *, max_length: int, attn_implementation: str | None = None) -> Any:
    """A randomly initialised model of the given shape; positions for max_length tokens and an answer beyond."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    vocabulary = -(-len(tokenizer) // 8) * 8
    ends: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if fresh.architecture != "t5":
        ends["tie_word_embeddings"] = fresh.tie_word_embeddings
    if attn_implementation is not None:
        ends["attn_implementation"] = attn_implementation
    if fresh.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=max_length,
                n_embd=fresh.hidden_size,
                n_layer=fresh.num_layers,
                n_head=fresh.num_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ends,
            )
        )
    if fresh.architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=fresh.hidden_size,
                intermediate_size=4 * fresh.hidden_size,
                num_hidden_layers=fresh.num_layers,
                num_attention_heads=fresh.num_heads,
                max_position_embeddings=max_length,
                **ends,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=fresh.hidden_size,
            d_kv=fresh.hidden_size // fresh.num_heads,
            d_ff=4 * fresh.hidden_size,
            num_layers=fresh.num_layers,
            num_heads=fresh.num_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **(ends | {"decoder_start_token_id": tokenizer.pad_token_id}),
        )
    )


def is_encoder_decoder(settings: StudentConfig) -> bool:
    """Whether a config's student has an encoder of its own; reads a named model's config, no weights."""
    if settings.model_name_or_path is None:
        return settings.fresh.architecture == "t5"
    shape = warm_shape(settings)
    if shape is not None:
        return shape == "encoder_decoder"
    return bool(pretrained_shape(settings.model_name_or_path, settings.revision).is_encoder_decoder)


def pretrained_shape(name: str, revision: str | None) -> Any:
    """The Hugging Face config of a model by name; raises InputError or EnvironmentFault.

    Raises ConfigError for an encoder: AutoModelForCausalLM would take it, and let every token see those after it.
    """
    shape = load_model_config(locate_model(name, revision))
    if shape.model_type == "bert" and not shape.is_decoder:
        raise ConfigError(
            "an encoder reads but does not write",
            "set student.warm_start to causal or encoder_decoder: the student then starts from its weights",
            path=name,
        )
    return shape


def _pretrained_model(config: Config, name: str, holding: Holding) -> Any:
    settings = config.student
    shape = pretrained_shape(name, settings.revision)
    _check_positions(shape, config.layout.max_length)
    place = locate_model(name, settings.revision)

    def load() -> Any:
        return load_language_model(
            place, attn_implementation=settings.attn_implementation, quantised=quantised_loading(config, place)
        )

    if place.gguf is not None or place.adapters:
        return holding.whole(load)
    if holding.divides:  # where one rank alone reads the files, only that rank could refuse them
        check_headers(language_model_without_weights(shape, place), place)
    return holding.read(load)


class StudentShape(NamedTuple):
    """What is known of a student without its weights."""

    is_encoder_decoder: bool
    layers: int | None
    """Layers of the model, or of its decoder; None where the config of the checkpoint does not tell."""


def build_without_weights(config: Config, tokenizer: Any) -> StudentShape:
    """Build the student without memory for its weights, and tell its shape.

    Raises what `build_model` would raise, as far as config, tokenizer and the headers of the weight files tell.
    """
    settings, max_length = config.student, config.layout.max_length
    token_start(config, tokenizer)
    layers: int | None = None
    if warm_shape(settings) is not None:
        check_warm_start(settings, max_length=max_length)
    elif settings.model_name_or_path is None:
        with loading_errors("the fresh student", ModelPlace("student.fresh", "student.fresh"), WEIGHTS):
            with torch.device("meta"):
                fresh_model(
                    settings.fresh,
                    tokenizer,
                    max_length=max_length,
                    attn_implementation=settings.attn_implementation,
                )
        layers = settings.fresh.num_layers
    else:
        shape = pretrained_shape(settings.model_name_or_path, settings.revision)
        _check_positions(shape, max_length)
        place = locate_model(settings.model_name_or_path, settings.revision)
        model = language_model_without_weights(shape, place, attn_implementation=settings.attn_implementation)
        _check_architecture(model)
        check_headers(model, place)
        if settings.lora.rank:
            quantised_loading(config, place)
            put_adapters(model, config, without_weights=True)
        layers = layers_of(model.config)
    return StudentShape(is_encoder_decoder(settings), layers)


def _check_positions(shape: Any, max_length: int) -> None:
    """Raise ConfigError when a sequence may be longer than the model has positions for."""
    positions = positions_of(shape)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"layout.max_length is {max_length}, this student has {positions} positions",
            f"set layout.max_length={positions} or less",
        )


def _check_architecture(model: Any) -> None:
    """Raise ConfigError for a model without a language-model head, which could not answer."""
    if model.get_output_embeddings() is None:
        raise ConfigError(f"{type(model).__name__} has no language-model head: name a causal or seq2seq model")
