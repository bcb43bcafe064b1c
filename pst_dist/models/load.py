"""Loads a causal or encoder-decoder model and its tokenizer from a hub id, a folder or a GGUF file.

Three rules apply to everything that is loaded here. Code in a model's folder is never run. Every weight must come from
the files (`models.weight_checks`). Every error of a library becomes one line (`models.load_errors`).
"""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path
from typing import Any

from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.models.adapters import merge_adapter
from pst_dist.models.hub import use_cache_without_hub
from pst_dist.models.load_errors import TOKENIZER, WEIGHTS, loading_errors
from pst_dist.models.locate import ModelPlace
from pst_dist.models.weight_checks import UNUSED, refuse_quantised, refuse_unmatched, tied_weights


def load_model_config(place: ModelPlace, what: str = "the student") -> Any:
    """The Hugging Face config of a model; reads no weights. Raises InputError or EnvironmentFault."""
    with loading_errors(what, place, WEIGHTS):
        return _config(place)


def load_tokenizer(place: ModelPlace, what: str = "the student's tokenizer") -> Any:
    """The tokenizer of a model. Raises InputError or EnvironmentFault."""
    from transformers import AutoTokenizer

    for adapter in reversed(place.adapters):  # PEFT writes the tokenizer too where tokens were added
        if (Path(adapter) / "tokenizer_config.json").is_file():
            place = ModelPlace(adapter, adapter, local_only=True)
            break
    _need_gguf(place)
    with loading_errors(what, place, TOKENIZER):
        if place.gguf is not None:
            return copy.deepcopy(_gguf_tokenizer(place))
        return AutoTokenizer.from_pretrained(place.target, trust_remote_code=False, **_options(place))


def load_language_model(
    place: ModelPlace,
    what: str = "the student",
    *,
    attn_implementation: str | None = None,
    quantised: dict[str, Any] | None = None,
) -> Any:
    """The causal or encoder-decoder model in float32 on the CPU, with every weight from its files.

    `quantised` are transformers' arguments for loading the frozen weights of QLoRA in 4 bits instead. Raises InputError
    or EnvironmentFault when it cannot be loaded or the files lack a weight, and ConfigError for weights that are
    quantised in their files, which cannot be trained.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    shape = load_model_config(place, what)
    refuse_quantised(shape, place)
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    family: Any = AutoModelForSeq2SeqLM if shape.is_encoder_decoder else AutoModelForCausalLM
    with loading_errors(what, place, WEIGHTS):
        if place.gguf is not None:
            return _with_adapters(_from_gguf(family, shape, place, what, **extra), place, what)
        model, info = family.from_pretrained(
            place.target,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name and shape
            **_options(place),
            **extra,
            **(quantised or {}),
        )
        refuse_unmatched(info, what, place.name)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                "contains a whole model and an adapter, and transformers loads both",
                "fetch it and give the folder of one of them",
                path=place.name,
            )
    return _with_adapters(model, place, what)


def _with_adapters(model: Any, place: ModelPlace, what: str) -> Any:
    for adapter in place.adapters:
        with loading_errors(f"{what}'s adapter", ModelPlace(adapter, adapter), "a LoRA adapter written by PEFT"):
            model = merge_adapter(model, Path(adapter)).eval()
    return model


def language_model_without_weights(shape: Any, place: ModelPlace, *, attn_implementation: str | None = None) -> Any:
    """The structure of the model on torch's meta device: no weights, no memory.

    Raises the InputError, EnvironmentFault or ConfigError that `load_language_model` would raise.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    refuse_quantised(shape, place)
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    family: Any = AutoModelForSeq2SeqLM if shape.is_encoder_decoder else AutoModelForCausalLM
    with loading_errors("the student", place, WEIGHTS), torch.device("meta"):
        return family.from_config(copy.deepcopy(shape), trust_remote_code=False, **extra)


def positions_of(shape: Any) -> int | None:
    """Number of positions in a model's config; None when its positions are relative, as in T5."""
    # An encoder-decoder that is made of two models has one config for each.
    half = getattr(shape, "decoder", shape)
    positions = getattr(half, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def layers_of(shape: Any) -> int | None:
    """Number of layers by a model's config (of an encoder-decoder: of its decoder); None when it uses other names."""
    half = getattr(shape, "decoder", None) or shape.get_text_config()
    names = ("num_decoder_layers", "decoder_layers") if shape.is_encoder_decoder else ()
    for name in (*names, "num_hidden_layers"):
        layers = getattr(half, name, None)
        if isinstance(layers, int):
            return layers
    return None


def load_bare_encoder(place: ModelPlace, what: str = "the student") -> Any:
    """An encoder without a head, in float32 on the CPU. Raises InputError or EnvironmentFault."""
    import torch
    from transformers import AutoModel

    with loading_errors(what, place, WEIGHTS):
        model, info = AutoModel.from_pretrained(
            place.target,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_options(place),
        )
        # A checkpoint with a head has weights that the bare encoder does not use, which is fine.
        refuse_unmatched(info, what, place.name, unused=UNUSED, warn=False)
    return model


def _options(place: ModelPlace) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a place; the first call for a hub id looks whether the hub answers."""
    if place.gguf is None and not place.local_only and not Path(place.target).is_dir():
        use_cache_without_hub()
    options: dict[str, Any] = {"revision": place.revision} if place.revision else {}
    if place.gguf is not None:
        options["gguf_file"] = place.gguf
    if place.local_only:
        options["local_files_only"] = True
    return options


# Parsing a GGUF file with a real vocabulary takes seconds, and a run needs config and tokenizer several times.
@functools.lru_cache(maxsize=8)
def _gguf_config(place: ModelPlace) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(place.target, trust_remote_code=False, **_options(place))


@functools.lru_cache(maxsize=8)
def _gguf_tokenizer(place: ModelPlace) -> Any:
    from transformers import AutoTokenizer

    options = {"config": _gguf_config(place), **_options(place)}
    return AutoTokenizer.from_pretrained(place.target, trust_remote_code=False, **options)


def _config(place: ModelPlace) -> Any:
    from transformers import AutoConfig

    _need_gguf(place)
    _refuse_adapter(place)
    if place.gguf is not None:
        return _gguf_config(place)
    return AutoConfig.from_pretrained(place.target, trust_remote_code=False, **_options(place))


def _refuse_adapter(place: ModelPlace) -> None:
    folder = Path(place.target)
    if not (folder / "adapter_config.json").is_file():
        return
    if not any(folder.glob("model*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            "is an adapter (LoRA), not a whole model",
            "merge it into its base (peft: merge_and_unload, then save_pretrained) and use that folder",
            path=place.name,
        )


def _need_gguf(place: ModelPlace) -> None:
    if place.gguf is None:
        return
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(
            "reading a GGUF file needs the package gguf", "pip install gguf", path=place.name
        ) from error


def _from_gguf(family: Any, shape: Any, place: ModelPlace, what: str, **extra: Any) -> Any:
    """The model of a GGUF file, with its weights converted to float32.

    `from_pretrained(gguf_file=...)` does the same, but needs accelerate, marks the model as quantised so that it cannot
    be saved, and does not report missing weights.
    """
    import torch

    # Older releases of transformers have this module, but not as an attribute.
    gguf_utils: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    config = copy.deepcopy(shape)
    config.dtype, config.architectures = torch.float32, None
    config._name_or_path = ""  # a path of this machine
    vars(config).pop("_model_name_or_path", None)  # a note from the file's author
    with torch.random.fork_rng(devices=[]):  # these random weights are replaced, and must not shift later draws
        model = family.from_config(config, trust_remote_code=False, **extra)
    file, bar = str(Path(place.target) / str(place.gguf)), gguf_utils.tqdm
    gguf_utils.tqdm = lambda items, **_: items  # its progress bar cannot be switched off
    try:
        tensors = gguf_utils.load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    finally:
        gguf_utils.tqdm = bar
    tensors = {name: value.to(torch.float32) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    info = {"missing_keys": set(missing) - tied_weights(model), "unexpected_keys": unexpected, "mismatched_keys": []}
    refuse_unmatched(info, what, place.name)
    model.tie_weights()
    return model.eval()
