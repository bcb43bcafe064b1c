"""A student as a folder: written with its answer format and alignment head, verified and loaded.

Training writes it as `best`, the export is built from it, and everything that answers questions loads it.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pst_dist.errors import InputError, IntegrityError, StaleError
from pst_dist.logs import quiet_libraries
from pst_dist.models.adapters import is_adapter, write_adapter
from pst_dist.models.identity import base_identity
from pst_dist.models.load import load_language_model, load_tokenizer
from pst_dist.models.locate import ModelPlace, locate_model
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.json_files import read_typed
from pst_dist.storage.manifest import (
    Manifest,
    write_json,
)
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.finite import refuse_non_finite
from pst_dist.student.lora import is_adapted
from pst_dist.student.token_rows import row_parameters

HEAD_FILE = "alignment_head.safetensors"


log = logging.getLogger(__name__)
FORMAT_FILE = "pst.json"


def save_student(
    model: Any,
    weights: dict[str, Tensor],
    tokenizer: Any,
    fmt: AnswerFormat,
    directory: Path,
    *,
    fingerprint: str,
    extra: dict[str, Any],
) -> Manifest:
    """Write a student as a Hugging Face folder with its answer format and alignment head, replacing an older one.

    A LoRA student becomes a PEFT folder, which holds the adapter and names the base; `extra["base"]` identifies it.
    `model` is the trained Hugging Face model. `weights` come from `Engine.full_weights`: the model's under `model.`,
    the alignment head's as `head.weight`. Call on rank zero only. Raises DivergedError when a weight is not finite.
    """
    quiet_libraries()
    refuse_non_finite(((f"weight {name}", value) for name, value in weights.items()), directory)
    with Artefact(directory, "student").publish(fingerprint, extra) as draft:
        if is_adapted(model):
            trained = {n.removeprefix("model."): value for n, value in weights.items() if n.startswith("model.")}
            write_adapter(draft.path, model, trained, row_parameters(model))
            answer_generation_config(model, tokenizer, fmt).save_pretrained(draft.path)
        else:
            plain = plain_model(model, weights)
            plain.generation_config = answer_generation_config(plain, tokenizer, fmt)
            plain.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        save_head(weights.get("head.weight"), draft.path)
        write_json(draft.path / FORMAT_FILE, fmt.to_json())
    return draft.manifest


def plain_model(model: Any, weights: dict[str, Tensor]) -> Any:
    """The Hugging Face model with the given weights, on the CPU, however the engine partitions its own."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    state = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    state |= {
        name: value.detach().cpu() for name, value in model.state_dict().items() if name in dict(model.named_buffers())
    }
    _, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    left = [name for name, value in plain.named_parameters() if value.is_meta]
    if left or unexpected:
        raise IntegrityError(f"the student lacks weights for {', '.join([*left, *unexpected][:3])}")
    return plain.eval()


def _place_of(directory: Path, manifest: Manifest) -> ModelPlace:
    """Where a student's weights are: here, or with its base for a LoRA student.

    Raises InputError when the base cannot be found, and StaleError when it has other weights than in training.
    """
    if not is_adapter(directory):
        return ModelPlace(str(directory), str(directory), local_only=True)
    place = locate_model(str(directory))
    base = replace(place, adapters=place.adapters[:-1])
    trained_on, today = manifest.extra.get("base"), base_identity(base)
    if trained_on is not None and trained_on != today:
        raise StaleError(
            f"this adapter was trained on other weights than those of {base.name} now",
            "restore that model, or run `pst train` again",
            path=directory,
        )
    return place


def answer_generation_config(model: Any, tokenizer: Any, fmt: AnswerFormat) -> Any:
    """Greedy decoding that ends at the answer stop; a server that reads eos_token_id then stops there too."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(fmt.stop_token)],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=256,
    )
    if model.config.is_encoder_decoder:
        config.decoder_start_token_id = model.config.decoder_start_token_id
    elif tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    return config


def save_head(weight: Tensor | None, directory: Path) -> None:
    """Write the alignment head's [E, D] weight into a student's folder; nothing when the arm has none."""
    if weight is None:
        return
    from safetensors.torch import save_file

    save_file({"weight": weight.float().contiguous()}, directory / HEAD_FILE)


@dataclass(frozen=True)
class LoadedStudent:
    """A trained student, ready to answer."""

    model: Any
    tokenizer: Any
    format: AnswerFormat
    manifest: Manifest
    directory: Path


def load_student(directory: Path, device: str | None = None) -> LoadedStudent:
    """The student in `directory` (from training or an export) on `device`; without one, on CUDA if available.

    Every file is compared with its digest first. Raises InputError when there is no finished student and
    IntegrityError when it is damaged.
    """
    quiet_libraries()
    # An export is recognised by its model card.
    artefact = Artefact(directory, "export" if (directory / "README.md").is_file() else "student")
    manifest = artefact.verified()
    if manifest is None:
        raise InputError("no trained student here", "run `pst train` first", path=directory)
    fmt = read_typed(directory / FORMAT_FILE, AnswerFormat)
    problem = fmt.problem()
    if problem is not None:
        raise IntegrityError(problem, "run `pst train` again", path=directory / FORMAT_FILE)
    place = _place_of(directory, manifest)
    try:
        model = load_language_model(place)
        tokenizer = load_tokenizer(place)
    except InputError as error:  # `save_student` wrote these files, so they are damaged
        raise IntegrityError(error.what, "run `pst train` again", path=directory) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise IntegrityError(f"cannot be loaded: {reason[:160]}", "run `pst train` again", path=directory) from error
    if place.adapters:  # the base's own settings would sample, or end elsewhere
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config = answer_generation_config(model, tokenizer, fmt)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return LoadedStudent(model, tokenizer, fmt, manifest, directory)
