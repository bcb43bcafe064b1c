"""How a GGUF file stores each matrix: float32, float16, 8 bits, or llama.cpp's mixture Q4_K_M.

q8_0 and f16 are computed by the package gguf, Q4_K_M's kinds by ggml itself, the library inside llama.cpp, which the
package xllamacpp carries. Which tensor gets which kind is llama.cpp's rule (`llama_tensor_get_type` in
src/llama-quant.cpp). Vectors and learnt positions stay in float32.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any, Literal, get_args

import numpy as np

from pst_dist.errors import ConfigError, EnvironmentFault

GGUFType = Literal["f32", "f16", "q8_0", "q4_k_m"]
TYPES: tuple[str, ...] = get_args(GGUFType)
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""llama.cpp's replacement where a row is not a multiple of 256 values."""
_BLOCK, _SUPER_BLOCK = 32, 256


def file_type(kind: str) -> int:
    """llama.cpp's number for a whole file of this kind (`general.file_type`)."""
    return _FILE_TYPES[kind]


def stored_type(kind: str, name: str, shape: tuple[int, ...], *, layers: int, tied: bool) -> str:
    """ggml's name of the type in which a tensor is stored, such as `Q6_K`, in a file of this kind.

    `shape` is [rows, values per row]; `tied` says that the output layer is the embedding matrix.
    """
    if len(shape) < 2 or kind == "f32" or name.startswith(("position_embd", "rope_freqs")):
        return "F32"
    if kind == "f16" or shape[-1] % _BLOCK:
        return "F16"
    if kind == "q8_0":
        return "Q8_0"
    wanted = _mixed(name, layers=layers, tied=tied)
    return wanted if shape[-1] % _SUPER_BLOCK == 0 else _FALLBACK[wanted]


def _mixed(name: str, *, layers: int, tied: bool) -> str:
    """The type of a tensor in Q4_K_M."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    block = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block is None:
        return "Q4_K"
    layer, part = int(block[1]), block[2]
    if part == "attn_qkv":
        return "Q5_K"
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if part in ("attn_v", "ffn_down") and more else "Q4_K"


def stored(value: np.ndarray, kind: str) -> np.ndarray:
    """A float32 array as ggml stores it in this type: float32, float16, or bytes [rows, bytes per row].

    Raises EnvironmentFault where ggml is needed and not installed, and ConfigError for a weight that f16 cannot
    represent.
    """
    import gguf

    if kind == "F32":
        return value
    if kind == "F16":
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if not np.isfinite(half).all():
            raise ConfigError(
                f"a weight of {np.abs(value).max():.3g} is too large for f16, whose largest number is 65504",
                "choose f32",
            )
        return half
    if kind == "Q8_0":
        return gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
    return _by_ggml(value, gguf.GGMLQuantizationType[kind])


def _by_ggml(value: np.ndarray, kind: Any) -> np.ndarray:
    """`ggml_quantize_chunk` of ggml.h, called in the library that xllamacpp carries."""
    import gguf

    call = _ggml().ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    rows, width = int(np.prod(value.shape[:-1])), value.shape[-1]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(value, dtype=np.float32)
    target = np.zeros((*value.shape[:-1], width // per_block * block_bytes), dtype=np.uint8)
    written = call(int(kind), source.ctypes.data, target.ctypes.data, 0, rows, width, None)
    if written != target.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes of {kind.name}, expected {target.nbytes}")
    return target


def _ggml() -> ctypes.CDLL:
    remedy = "pip install 'pst-dist[llama-cpp]', or choose q8_0 or f16"
    try:
        import xllamacpp.xllamacpp as library
    except ImportError as error:
        raise EnvironmentFault("q4_k_m is computed by llama.cpp, from the package xllamacpp", remedy) from error
    loaded = ctypes.CDLL(library.__file__)
    if not hasattr(loaded, "ggml_quantize_chunk"):
        raise EnvironmentFault("this build of xllamacpp does not give access to ggml's quantisation", remedy)
    return loaded
