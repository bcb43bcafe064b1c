"""OpenVINO in place of torch for the encoder's forward pass: two to four times as fast on a CPU.

The whole model, pooling included, is converted from the loaded SentenceTransformer when it starts, which takes seconds.
Tokens, batches and prompts stay those of `embedding.encoder`, which also measures how close the vectors are to torch's.
sentence-transformers has such a backend itself, but it needs optimum-intel, which excludes transformers from 5.6 on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pst_dist.config.schema import EmbedConfig
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, first_line

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Shapes in this file: B texts, T tokens, E encoder width
PROBES = (
    "four",
    "One apple and two pears are three fruits.",
    "Anna had 12 stamps and gave 5 of them to Ben, so 12 - 5 = 7 are left.",
    "The train leaves at 9:40 and needs 85 minutes. 40 + 85 = 125 minutes after nine is five past eleven. "
    "It waits for ten minutes, so it arrives at 11:15. The answer is 11:15.",
)
"""Texts of different lengths, on which a conversion is tried with padding and without."""
_LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "int8": 0.9}
"""To torch's vector of each probe. Below it the conversion is wrong, and more than rounding differs."""
_INT8_GROUP = "64"
"""Activations that share a scale. Larger groups are no faster and less exact."""
_PACKAGES = {"float32": ("openvino",), "bfloat16": ("openvino",), "int8": ("openvino", "nncf")}


def check_engine(config: EmbedConfig, *, causal: bool) -> None:
    """Raise ConfigError for settings that OpenVINO cannot follow, EnvironmentFault for a package that is missing."""
    if config.engine != "openvino":
        return
    if causal:
        raise ConfigError(
            "embed.engine=openvino runs sentence encoders only, and embed.encoder is a causal language model",
            "use embed.engine=torch",
        )
    if config.device not in (None, "cpu"):
        raise ConfigError(
            f"embed.engine=openvino runs on the CPU, but embed.device={config.device}", "use embed.engine=torch"
        )
    for name in _PACKAGES[config.dtype]:
        if importlib.util.find_spec(name) is None:
            raise EnvironmentFault(
                f"embed.engine=openvino with embed.dtype={config.dtype} needs {name}",
                "pip install 'pst-dist[openvino]'",
            )


class OpenVinoEngine:
    """A converted SentenceTransformer. Gives the same bits for the same batch, on as many threads as torch has."""

    def __init__(self, model: Any, example: Mapping[str, torch.Tensor], constants: Mapping[str, Any], dtype: str):
        """Convert `model` (float32, on the CPU), whose batches have the tensors of `example`, [B, T] each.

        `constants` are further features, equal in all batches. Raises InputError when OpenVINO cannot convert the
        model, EnvironmentFault when this processor lacks the precision.
        """
        import torch

        # Both packages send usage data to their maker through this module, without asking; without it they do not.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        core = openvino.Core()
        if dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EnvironmentFault("this processor has no bfloat16 for OpenVINO", "use embed.dtype=float32 or int8")
        self._names = tuple(example)
        log.info("encoder: converting it for OpenVINO %s, %s", openvino.__version__.partition("-")[0], dtype)
        try:
            with _without_noise(), torch.inference_mode():
                whole = _traced(model, self._names, constants)
                converted = openvino.convert_model(whole, example_input=tuple(example.values()))
            if dtype == "int8":
                converted = _with_int8_weights(converted)
        except Exception as error:  # an operation that has no counterpart raises almost any kind
            raise InputError(
                f"the encoder cannot be converted for OpenVINO ({first_line(error)[:160]})", "use embed.engine=torch"
            ) from error
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _INT8_GROUP if dtype == "int8" else "0",
        }
        self._compiled = core.compile_model(converted, "CPU", settings)

    def __call__(self, features: Mapping[str, Any]) -> np.ndarray:
        """[B, E] float32, before normalisation, of padded features [B, T]."""
        return self._compiled([features[name].numpy() for name in self._names])[0]


def check_conversion(ours_nE: np.ndarray, torch_nE: np.ndarray, dtype: str) -> None:
    """Raise InputError unless the unit vectors of the probes are torch's but for the precision."""
    lowest = float((ours_nE * torch_nE).sum(1).min())
    if not lowest >= _LEAST_COSINE[dtype]:
        raise InputError(
            f"OpenVINO's vectors differ from torch's in {dtype} (cosine {lowest:.4f})", "use embed.engine=torch"
        )


def _traced(model: Any, names: tuple[str, ...], constants: Mapping[str, Any]) -> Any:
    """A module from tensors in the order of `names` to the sentence embedding."""
    from torch import nn

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.model(dict(zip(names, tensors, strict=True)) | dict(constants))["sentence_embedding"]

    return Whole().eval()


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Hide the tracer's warnings of values that it takes for constants, and those of attributes that it looks at.

    The converter also sets up the root logger for itself, so that our lines would be lost.
    """
    chatters = [logging.getLogger(name) for name in ("sentence_transformers", "transformers")]
    root = logging.getLogger()
    levels, kept = [one.level for one in chatters], (root.level, root.handlers[:], root.disabled, root.filters[:])
    for one in chatters:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(chatters, levels, strict=True):
            one.setLevel(level)
        root.setLevel(kept[0])
        root.handlers, root.disabled, root.filters = kept[1:]


def _with_int8_weights(converted: Any) -> Any:
    """Weights in int8, one scale a row; activations are quantised as they come, so no texts are needed to calibrate."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars and tables
        return nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
