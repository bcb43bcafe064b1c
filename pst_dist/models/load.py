"""Loads a causal or encoder-decoder model and its tokenizer from a hub id, a folder or a GGUF file.

Three rules apply to everything that is loaded here. Code in a model's folder is never run. Every weight of the model
must come from the files; a missing one would silently stay random. Every error of a library becomes one line that names
the model and what to do.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pst_dist.errors import ConfigError, EnvironmentFault, InputError, PstError
from pst_dist.logs import without_chatter
from pst_dist.models import adapters
from pst_dist.models.adapters import merge_adapter
from pst_dist.models.locate import WEIGHT_SUFFIXES, ModelPlace, cannot_load
from pst_dist.storage.manifest import digest_of, sha256_file

log = logging.getLogger(__name__)

WEIGHTS, TOKENIZER = "config.json and weights", "tokenizer.json"
UNUSED = ("pooler.",)
"""Name prefixes of weights that are never used here: sentence vectors and warm starts do not need BERT's pooler, which
many published encoders lack."""
_NAMED = 3
_PATCH = threading.Lock()


@contextlib.contextmanager
def loading_errors(what: str, place: ModelPlace, wanted: str) -> Iterator[None]:
    """Turn any error that a library raises in the body into an InputError or EnvironmentFault; ours pass through."""
    try:
        with without_chatter():
            yield
    except PstError:
        raise
    # Libraries raise almost anything here: OSError for files, ImportError for quantised weights, a bare Exception for
    # a tokenizer.json of a newer format, dataclass errors for a config field of the wrong type.
    except Exception as error:
        raise cannot_load(what, place.name, wanted, error) from error


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


def check_headers(model: Any, place: ModelPlace, what: str = "the student") -> None:
    """Raise InputError when the headers of a folder's safetensors files show that its weights do not fit the model.

    Some architectures rename weights while loading. So a weight counts as missing only if every name in the files is
    also one of the model's, and shapes are compared only for equal names; loading finds the remaining faults.
    """
    from safetensors import safe_open

    files = sorted(Path(place.target).glob("*.safetensors")) if place.gguf is None else []
    stored: dict[str, list[int]] = {}
    with loading_errors(what, place, WEIGHTS):
        for file in files:
            with safe_open(file, "pt") as header:
                stored |= {name: list(header.get_slice(name).get_shape()) for name in header.keys()}
    stored.pop("head.weight", None)
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    direct = bool(stored) and stored.keys() <= wanted.keys()
    missing = wanted.keys() - stored.keys() - _tied(model) if direct else set()
    shapes = [(name, stored[name], wanted[name]) for name in stored.keys() & wanted.keys()]
    mismatched = [found for found in shapes if found[1] != found[2]]
    info = {"missing_keys": missing, "unexpected_keys": (), "mismatched_keys": mismatched}
    refuse_unmatched(info, what, place.name, warn=False)


def positions_of(shape: Any) -> int | None:
    """Number of positions in a model's config; None when its positions are relative, as in T5."""
    # A model combined from two has them in each half.
    half = getattr(shape, "decoder", shape)
    positions = getattr(half, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _tied(model: Any) -> set[str]:
    """Names of weights that are tied to another weight and may be absent from the files."""
    return set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())


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


def refuse_quantised(shape: Any, place: ModelPlace) -> None:
    """Raise ConfigError for a base model with quantised weights, which cannot be trained."""
    quantised = getattr(shape, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    raise ConfigError(
        f"the weights are quantised ({getattr(method, 'value', method) or 'method not named'}) and cannot be trained",
        "use the full-precision model that they were made from, or a .gguf file, which is converted to float32",
        path=place.name,
    )


def refuse_unmatched(
    info: dict[str, Any], what: str, path: str, *, unused: tuple[str, ...] = (), warn: bool = True
) -> None:
    """Raise InputError when weights of the model are missing from its files or have another shape there.

    `info` is the loading information of `from_pretrained(..., output_loading_info=True)`, which excludes tied weights
    and buffers. Weights whose names start with one of `unused` may be missing. A warning names weights in the files
    that the model does not have.
    """
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
    unexpected = sorted(info["unexpected_keys"])
    if missing:
        found = f"; instead the files contain {_named(unexpected)}" if unexpected else ""
        raise InputError(
            f"cannot load {what}: {len(missing)} of its weights are missing from the files ({_named(missing)}){found}",
            "save the model again with save_pretrained, without a wrapper around it",
            path=path,
        )
    mismatched = sorted((key, tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"])
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise InputError(
            f"cannot load {what}: the shapes of {len(mismatched)} weights in the files do not match config.json, "
            f"for example {key}: {list(stored)} instead of {list(wanted)}",
            "correct config.json to match the weights",
            path=path,
        )
    if unexpected and warn:
        log.warning("%s: %d weights in its files are not used: %s", path, len(unexpected), _named(unexpected))


@contextlib.contextmanager
def every_weight_loaded(what: str, path: str, *, unused: tuple[str, ...] = UNUSED) -> Iterator[None]:
    """Inside the body, refuse any transformers model whose files lack weights, wherever `from_pretrained` is called.

    For libraries such as sentence-transformers, which call it themselves and do not pass on its loading information.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def checked(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        kwargs["ignore_mismatched_sizes"] = True
        model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        refuse_unmatched(info, what, path, unused=unused, warn=False)
        return (model, info) if output_loading_info else model

    with _PATCH:
        PreTrainedModel.from_pretrained = classmethod(checked)  # type: ignore[method-assign, assignment, arg-type]
        try:
            yield
        finally:
            PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


@functools.lru_cache(maxsize=8)
def base_identity(place: ModelPlace) -> dict[str, Any]:
    """Identifies the weights that a student started from: digests for local files, the commit for a hub id.

    `sha256` is that of a GGUF file, or a digest over the names and digests of a folder's weight files; `quantised` is
    the GGUF's most frequent low-bit type, such as Q4_1. Unknown values are None. With adapters, `sha256` covers them
    and the base.
    """
    return identity_of(place, {path: sha256_file(path) for path in files_of_identity(place)})


def files_of_identity(place: ModelPlace) -> list[Path]:
    """The files whose digests `identity_of` needs: weights in local folders, and adapters."""
    if place.adapters:
        own = [Path(place.adapters[-1]) / name for name in (adapters.CONFIG, adapters.WEIGHTS)]
        return [*files_of_identity(replace(place, adapters=place.adapters[:-1])), *own]
    if place.gguf is not None:
        return [Path(place.target) / place.gguf]
    folder = Path(place.target).expanduser()
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES) if folder.is_dir() else []


def identity_of(place: ModelPlace, sha256: Mapping[Path, str]) -> dict[str, Any]:
    """`base_identity`, given the digests of `files_of_identity`, which several ranks may have computed."""
    if place.adapters:
        below = identity_of(replace(place, adapters=place.adapters[:-1]), sha256)
        own = {name: sha256[Path(place.adapters[-1]) / name] for name in (adapters.CONFIG, adapters.WEIGHTS)}
        return below | {"sha256": digest_of({"base": below, "adapter": own})}
    identity: dict[str, Any] = {"sha256": None, "revision": None, "quantised": None}
    files = files_of_identity(place)
    if place.gguf is not None:
        return identity | {"sha256": sha256[files[0]], "quantised": _quantised_type(files[0])}
    if Path(place.target).expanduser().is_dir():
        return identity | {"sha256": digest_of({path.name: sha256[path] for path in files}) if files else None}
    return identity | {"revision": getattr(load_model_config(place), "_commit_hash", None) or place.revision}


def _named(keys: list[str]) -> str:
    further = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + further


def _options(place: ModelPlace) -> dict[str, Any]:
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

    # As an attribute of transformers only newer releases have it. Its progress bar is replaced below.
    gguf_utils: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    config = copy.deepcopy(shape)
    config.dtype, config.architectures = torch.float32, None
    config._name_or_path = ""  # a path of this machine
    vars(config).pop("_model_name_or_path", None)  # a note from the file's author
    with torch.random.fork_rng(devices=[]):  # these random draws are replaced and must not shift later ones
        model = family.from_config(config, trust_remote_code=False, **extra)
    file, bar = str(Path(place.target) / str(place.gguf)), gguf_utils.tqdm
    gguf_utils.tqdm = lambda items, **_: items  # its progress bar cannot be switched off
    try:
        tensors = gguf_utils.load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    finally:
        gguf_utils.tqdm = bar
    tensors = {name: value.to(torch.float32) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    info = {"missing_keys": set(missing) - _tied(model), "unexpected_keys": unexpected, "mismatched_keys": []}
    refuse_unmatched(info, what, place.name)
    model.tie_weights()
    return model.eval()


def _quantised_type(file: Path) -> str | None:
    from collections import Counter

    from gguf import GGUFReader

    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(str(file)).tensors)
    low = [kind for kind, _ in kinds.most_common() if kind not in ("F32", "F16", "BF16", "F64")]
    return low[0] if low else None
