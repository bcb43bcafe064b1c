"""LoRA adapters as PEFT folders: found with their base model, merged into it, and written.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Pickled weights (`adapter_model.bin`) are never
read. As with whole models, every weight of the adapter must be in its file, and every weight in its file must be used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.storage.foreign_json import foreign_object
from pst_dist.storage.manifest import write_json

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX, _NAME = "base_model.model.", "default"
_ROWS = ".token_adapter.trainable_tokens_delta"
"""End of the key under which peft keeps trained rows of an embedding (`trainable_token_indices`)."""
_REMEDY = "give the folder that PEFT wrote (save_pretrained), or a whole model"


def need_peft(what: str) -> None:
    """Raise EnvironmentFault, saying `what` needs it, when peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(f"{what} needs the package peft", "pip install 'pst-dist[lora]'") from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter; raises InputError when it contains a whole model too.

    transformers would load both and put the one into the other, or ignore one, depending on what is installed.
    """
    if not (folder / CONFIG).is_file():
        return False
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"contains a whole model and an adapter ({CONFIG})", "move one of them to another folder", path=folder
        )
    return True


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """(name, revision) of the model that an adapter belongs to: a hub id, a short name, or a path.

    A relative path counts from the working directory, or else from the adapter's folder. Raises InputError for a folder
    that is not a complete LoRA adapter, and for one without a base.
    """
    settings = foreign_object(folder / CONFIG, remedy=_REMEDY)
    kind, base, revision = (settings.get(key) for key in ("peft_type", "base_model_name_or_path", "revision"))
    if kind != "LORA":
        raise InputError(f"is an adapter of type {str(kind)[:40]!r}, which cannot be merged", "use LoRA", path=folder)
    if not (folder / WEIGHTS).is_file():
        pickled = f"; {PICKLED} is a pickle, which could run code" if (folder / PICKLED).exists() else ""
        raise InputError(f"is an adapter without {WEIGHTS}{pickled}", _REMEDY, path=folder)
    if not isinstance(base, str) or not base:
        raise InputError(
            "is an adapter that names no base model", f"set base_model_name_or_path in {CONFIG}", path=folder
        )
    path = Path(base).expanduser()
    if not path.is_absolute() and not path.exists() and (folder / path).exists():
        path = folder / path
    if not path.exists() and (path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1):
        raise InputError(
            f"is an adapter whose base model {base} does not exist",
            f"correct base_model_name_or_path in {CONFIG}",
            path=folder,
        )
    return str(path) if path.exists() else base, revision if isinstance(revision, str) else None


def merge_adapter(model: Any, folder: Path) -> Any:
    """The model with an adapter added to its weights; its embeddings grow if the adapter has rows for more tokens.

    Raises EnvironmentFault without peft and InputError when file and model do not fit. Call it inside
    `load_errors.loading_errors`, which turns errors of peft into ours.
    """
    need_peft("a LoRA adapter")
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    settings = PeftConfig.from_pretrained(str(folder))
    assert isinstance(settings, LoraConfig)
    stored = load_file(folder / WEIGHTS)
    rows = {key: stored.pop(key) for key in list(stored) if key.endswith(_ROWS)}
    _put_rows(model, rows, settings.trainable_token_indices, folder)
    settings.trainable_token_indices, settings.inference_mode = None, True
    if not stored:
        return model
    _grow(model, max((value.shape[0] for key, value in stored.items() if _is_embedding(model, key)), default=0))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with warnings.catch_warnings():  # peft asks transformers 5 for an attribute by its former name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        wrapped = PeftModel(model, settings)
    own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # An adapter saved after a resize contains the whole embeddings as well.
    wanted = {*own, *(key for key in stored if _is_embedding(model, key))}
    missing, unknown = sorted(wanted - stored.keys()), sorted(stored.keys() - wanted)
    for names, words in ((missing, "are missing from it"), (unknown, "fit nothing in its base model")):
        if names:
            raise InputError(
                f"is not the whole adapter of this base: {len(names)} weights {words}, such as {names[0]}",
                _REMEDY,
                path=folder / WEIGHTS,
            )
    set_peft_model_state_dict(wrapped, stored)
    merged = wrapped.merge_and_unload(safe_merge=True)
    merged.tie_weights()
    for name, parameter in merged.named_parameters():  # peft has frozen all of them
        parameter.requires_grad_(name in learns)
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def _put_rows(model: Any, rows: Mapping[str, Any], indices: Any, folder: Path) -> None:
    """Copy an adapter's trained rows into the embeddings that they belong to."""
    import torch

    named = indices if isinstance(indices, Mapping) else {"": indices or []}
    for key, values in rows.items():
        path = key.removeprefix(_PREFIX).removesuffix(_ROWS)
        ids = next((ids for name, ids in named.items() if path == name or path.endswith(f".{name}") or not name), None)
        if ids is None or len(ids) != len(values):
            raise InputError(f"{CONFIG} and {WEIGHTS} disagree about the rows of {path}", _REMEDY, path=folder)
        _grow(model, max(ids) + 1)
        with torch.no_grad():
            model.get_submodule(path).weight[torch.tensor(ids)] = values.float()


def _grow(model: Any, rows: int) -> None:
    """Give the embeddings at least this many rows. New ones are to be overwritten; a new bias is zero."""
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias[before:] = 0


def _is_embedding(model: Any, key: str) -> bool:
    """Whether a key of the file is the whole matrix of the input or output embeddings."""
    path, _, last = key.removeprefix(_PREFIX).replace(".base_layer.", ".").rpartition(".")
    if last != "weight" or "lora_" in path:
        return False
    ours = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(name == path and any(module is one for one in ours) for name, module in model.named_modules())


def rows_inside_adapters(keys: Iterable[str]) -> str | None:
    """A module for which an adapter's file has both LoRA matrices and trained rows; None when there is none."""
    keys = set(keys)
    paths = (key.removesuffix(_ROWS) for key in keys if key.endswith(_ROWS))
    return next((path.removeprefix(_PREFIX) for path in paths if f"{path}.lora_A.weight" in keys), None)


def write_adapter(
    folder: Path, model: Any, weights: Mapping[str, Any], rows: Mapping[str, tuple[str, list[int]]]
) -> None:
    """Write the adapters in `model` as a PEFT folder.

    `weights` are the trained parameters by their name in the model. `rows` are the parameters among them that are rows
    of an embedding: name -> (path of its module, ids). Everything else must be adapters.
    """
    import copy

    from safetensors.torch import save_file

    state = {}
    for name, value in weights.items():
        key = f"{rows[name][0]}{_ROWS}" if name in rows else ".".join(name.rsplit(f".{_NAME}.", 1))
        state[_PREFIX + key] = value.contiguous()
    settings = copy.deepcopy(model.peft_config[_NAME])
    settings.trainable_token_indices = {path: ids for path, ids in rows.values()}
    settings.inference_mode = True
    settings.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    if not isinstance(settings.target_modules, str):  # a set, whose order differs from process to process
        settings.target_modules = sorted(settings.target_modules)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    text = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.to_dict().items()}
    write_json(folder / CONFIG, text)
