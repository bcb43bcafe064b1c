"""Loads the model of an encoder, or checks from its config files that it could be loaded.

It is a SentenceTransformer, or a `CausalReader` of a causal language model. `embedding.encoder` batches texts for it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.config.schema import EmbedConfig
from pst_dist.embedding.causal import CausalReader, causal_place, check_causal, reads_causal
from pst_dist.embedding.openvino_engine import check_engine
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, PstError, first_line
from pst_dist.logs import without_chatter
from pst_dist.models.load import load_model_config
from pst_dist.models.load_errors import loading_errors
from pst_dist.models.locate import (
    SETTING_SUFFIXES,
    WEIGHT_SUFFIXES,
    ModelPlace,
    is_gguf,
    locate_encoder,
)
from pst_dist.models.weight_checks import every_weight_loaded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

log = logging.getLogger(__name__)


def check_encoder(config: EmbedConfig) -> None:
    """Raise what loading the encoder would raise, as far as its config files show; downloads a hub id.

    Raises EnvironmentFault for a device that this machine does not have, unless the encoder runs on a Ray cluster.
    """
    if config.backend == "local":
        check_device(config.device)
    check_engine(config, causal=reads_causal(config))
    if reads_causal(config):
        check_causal(config)
        return
    folder = locate_encoder(config.encoder, config.revision)
    modules = folder / "modules.json"
    place = folder
    if modules.is_file():
        with loading_errors("the sentence encoder", ModelPlace(str(folder), str(folder)), "modules.json"):
            listed: Any = json.loads(modules.read_text("utf-8"))
        first = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], dict) else {}
        if str(first.get("type", "")).endswith("StaticEmbedding"):
            raise _static_encoder(folder)
        place = folder / str(first.get("path") or "")
    load_model_config(ModelPlace(str(place), str(place), local_only=True), "the sentence encoder")


def check_device(name: str | None) -> None:
    """Raise ConfigError for a name that is no device, EnvironmentFault for a device that this machine does not have."""
    if name is None:
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"embed.device={name!r} is not a device", "use cpu, cuda, cuda:1, …, or leave it out"
        ) from error
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= count.get(device.type, 0) and device.type != "cpu":
        kind = "GPU" if device.type in ("cuda", "mps") else "such device"
        raise EnvironmentFault(
            f"embed.device={name}, but torch finds {count.get(device.type, 0) or 'no'} {kind}(s) of this type here",
            "leave it out to use the best available device",
        )


def load_encoder_model(folder: Path, config: EmbedConfig, device: str | None) -> Any:
    """A SentenceTransformer on its device with the configured maximum length, or a `CausalReader`.

    Raises EnvironmentFault, InputError or ConfigError when the config does not fit the model or it cannot be loaded.
    """
    if reads_causal(config):
        return CausalReader(config, device)
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise EnvironmentFault(f"cannot import {error.name}", "pip install 'pst-dist[embed]'") from error
    with without_chatter(), every_weight_loaded("the sentence encoder", str(folder)):
        try:
            model = SentenceTransformer(
                str(folder),
                device="cpu" if config.engine == "openvino" else device or config.device,
                local_files_only=True,
                trust_remote_code=False,
                # OpenVINO converts the float32 model.
                model_kwargs={"dtype": getattr(torch, config.dtype) if config.engine == "torch" else torch.float32},
            )
        except PstError:
            raise
        except Exception as error:  # a folder without an encoder or a missing device raises almost any kind
            reason = first_line(error)
            raise InputError(
                f"cannot be loaded as a sentence encoder ({reason[:160]})",
                "check embed.encoder and embed.device",
                path=folder,
            ) from error
    model.eval()
    first: Any = model[0]
    if type(first).__name__ == "StaticEmbedding":
        raise _static_encoder(folder)
    if getattr(first, "unpad_inputs", False) is not False:
        first.unpad_inputs = False  # batches are padded here; packing them would change the vectors
    if config.max_seq_length is not None:
        limit = model.max_seq_length
        if limit is not None and config.max_seq_length > limit:
            raise InputError(f"embed.max_seq_length is {config.max_seq_length}, but the encoder's own limit is {limit}")
        model.max_seq_length = config.max_seq_length
    engine = "" if config.engine == "torch" else f" by {config.engine}"
    log.info(
        "encoder: %s on %s%s, %s, at most %s tokens",
        *(folder.name, model.device, engine, config.dtype, model.max_seq_length),
    )
    return model


def _static_encoder(folder: Path) -> InputError:
    """The error for an encoder that averages fixed word vectors and so cannot run on padded batches."""
    return InputError(
        "is a static embedding model, which embed.encoder does not support",
        "use a transformer encoder, such as embed.encoder=minilm",
        path=folder,
    )


def encoder_files(config: EmbedConfig, folder: Path) -> list[Path]:
    """The files that an encoder consists of, in order."""
    if is_gguf(config.encoder):
        return [folder / str(causal_place(config).gguf)]
    suffixes = (*WEIGHT_SUFFIXES, *SETTING_SUFFIXES)
    return [path for path in sorted(folder.rglob("*")) if path.suffix in suffixes and path.is_file()]


def pooling_of(model: SentenceTransformer) -> str:
    """`mean`, `cls`…, read from the module that pools; the module names when none says."""
    modules: list[Any] = list(model)
    for module in modules:
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            return str(mode if isinstance(mode, str) else "+".join(mode))
        if hasattr(module, "get_pooling_mode_str"):
            return str(module.get_pooling_mode_str())
    return "+".join(type(module).__name__ for module in modules)
