"""Turns the error of any library that cannot load a model into one line, which names the model and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from pst_dist.errors import EnvironmentFault, InputError, PstError
from pst_dist.logs import without_chatter
from pst_dist.models.locate import ModelPlace

WEIGHTS, TOKENIZER = "config.json and weights", "tokenizer.json"
"""What a folder must have; `wanted` of `loading_errors`."""


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


def cannot_load(what: str, name: str, wanted: str, error: Exception) -> PstError:
    """The one-line error for a model that a library could not load, chosen by the library's error.

    Bad files in a folder are the user's to fix (InputError). A hub id that is not in the cache or a missing package is
    a fault of the machine (EnvironmentFault).
    """
    path = Path(name).expanduser()
    reason = _reason(error)
    if "trust_remote_code" in str(error):
        return InputError(
            f"cannot load {what}: it needs the Python code in its own folder (auto_map), which is never run",
            "choose a model whose architecture is part of transformers",
            path=name,
        )
    if isinstance(error, ImportError):
        return EnvironmentFault(
            f"cannot load {what}: {reason}", "install the missing package, or choose another model", path=name
        )
    if type(error) is Exception:  # the tokenizers library raises it for an unknown form of tokenizer.json
        return InputError(
            f"cannot load {what}: {reason}",
            "its tokenizer.json may be damaged or of a newer format: pip install -U tokenizers transformers",
            path=name,
        )
    if path.is_dir() or path.is_file():
        return InputError(f"cannot load {what}: {reason}", f"give a folder with {wanted}", path=name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return InputError(f"cannot load {what}: no such folder", f"give a folder with {wanted}", path=name)
    if not isinstance(error, OSError):
        return InputError(f"cannot load {what}: {reason}", "choose another model or revision", path=name)
    return EnvironmentFault(
        f"cannot load {what}: it is not in the cache and cannot be fetched",
        "check its name, the network and HF_TOKEN, or give a folder",
        path=name,
    )


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def _reason(error: Exception) -> str:
    """The text of a library's error on one line, at most 240 characters."""
    text = " ".join(_COLOURS.sub("", str(error)).split())
    return (text or type(error).__name__)[:240]
