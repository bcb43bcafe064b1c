"""Checks that the files of a model contain every weight, in the right shape and not quantised.

Libraries only warn about a missing weight and leave it random; here it is an error.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pst_dist.errors import ConfigError, InputError
from pst_dist.models.load_errors import WEIGHTS, loading_errors
from pst_dist.models.locate import ModelPlace

log = logging.getLogger(__name__)

UNUSED = ("pooler.",)
"""Name prefixes of weights that are never used here: sentence vectors and warm starts do not need BERT's pooler, which
many published encoders lack."""
_NAMED = 3
"""Most names of weights in a message."""
_PATCH = threading.Lock()
"""Held while `from_pretrained` is replaced."""


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
    missing = wanted.keys() - stored.keys() - tied_weights(model) if direct else set()
    shapes = [(name, stored[name], wanted[name]) for name in stored.keys() & wanted.keys()]
    mismatched = [found for found in shapes if found[1] != found[2]]
    info = {"missing_keys": missing, "unexpected_keys": (), "mismatched_keys": mismatched}
    refuse_unmatched(info, what, place.name, warn=False)


def tied_weights(model: Any) -> set[str]:
    """Names of weights that are tied to another weight and may be absent from the files."""
    return set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())


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
    """Within the body, every `from_pretrained` of transformers raises InputError when the files lack weights.

    For libraries such as sentence-transformers, which call it themselves and do not return its loading information.
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


def _named(keys: list[str]) -> str:
    further = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + further
