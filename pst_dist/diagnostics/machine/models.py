"""Checks that the encoder and student of a config are in a local folder, in the cache, or available from the hub.

Only the headers of one small file are requested. `embedding.encoder_model` and `student.pretrained` load the models.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from pathlib import Path

from pst_dist.config.schema import Config
from pst_dist.diagnostics.machine.findings import Finding, ok, problem
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import PstError
from pst_dist.models.adapters import is_adapter
from pst_dist.models.hub import HUB_SECONDS, went_offline
from pst_dist.models.locate import MINILM, is_gguf, locate_encoder, locate_model
from pst_dist.student.warm_start import warm_checkpoint
from pst_dist.text.urls import SameOriginToken


def encoder(config: Config) -> list[Finding]:
    """The text encoder, if an arm aligns with its vectors."""
    name = config.embed.encoder
    if not needs_embeddings(config):
        return []
    if is_gguf(name):
        return _gguf("encoder", name)
    if name == "minilm" or name.startswith(("/", ".", "~")) or Path(name).is_dir():
        folder = locate_encoder(name)
        return _folder("encoder", folder, "embed.encoder")
    return _hub("encoder", name, config.embed.revision, "embed.encoder")


def student(config: Config) -> list[Finding]:
    """The student that training starts from."""
    name = config.student.model_name_or_path
    if name is None:
        return [ok("student", "starts from random weights")]
    if name == MINILM:
        return _folder("student", Path(warm_checkpoint(config.student)), "student.model_name_or_path")
    if is_gguf(name):
        return _gguf("student", name)
    folder = Path(name).expanduser()
    try:
        if folder.is_dir() and is_adapter(folder):
            place = locate_model(name)
            below = config.student.model_copy(
                update={
                    "model_name_or_path": str(Path(place.target) / place.gguf) if place.gguf else place.target,
                    "revision": place.revision,
                }
            )
            return student(config.model_copy(update={"student": below}))
    except PstError as error:
        return [problem("student", f"{name}: {error.what}", error.remedy)]
    if name.startswith(("/", ".", "~")) or folder.is_dir():
        return _folder("student", Path(name).expanduser(), "student.model_name_or_path")
    return _hub("student", name, config.student.revision, "student.model_name_or_path")


def _gguf(subject: str, name: str) -> list[Finding]:
    try:
        place = locate_model(name)
    except PstError as error:
        return [problem(subject, f"{name}: {error.what}", error.remedy)]
    if importlib.util.find_spec("gguf") is None:
        return [problem(subject, f"{name}: reading a GGUF file needs the package gguf", "pip install gguf")]
    return [ok(subject, f"{place.target}/{place.gguf}: found")]


def _folder(subject: str, folder: Path, key: str) -> list[Finding]:
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        what = "contains no config.json" if folder.is_dir() else "no such folder"
        return [problem(subject, f"{folder}: {what}", f"set {key} to a model's folder or a hub id")]
    if not any(folder.rglob("*.safetensors")) and not any(folder.rglob("*.bin")):
        return [problem(subject, f"{folder}: contains no weights", "download the model again: hf download")]
    return [ok(subject, f"{folder}: found")]


def _hub(subject: str, name: str, revision: str | None, key: str) -> list[Finding]:
    try:
        from huggingface_hub import constants, get_token, try_to_load_from_cache
    except ImportError:
        return [
            problem(subject, f"{name} cannot be downloaded without huggingface_hub", "pip install 'pst-dist[train]'")
        ]
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return [ok(subject, f"{name}: in the cache")]
    fetch = f"download it on a machine with a network (`hf download {name}`), or set {key} to a folder"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if silence := went_offline():
        return [problem(subject, f"{name} is not in the cache, and {endpoint} does not answer ({silence})", fetch)]
    if constants.HF_HUB_OFFLINE:
        return [problem(subject, f"{name} is not in the cache, and HF_HUB_OFFLINE is set", fetch)]
    request = urllib.request.Request(f"{endpoint}/{name}/resolve/{revision or 'main'}/config.json", method="HEAD")
    if token := get_token():
        request.add_header("Authorization", f"Bearer {token}")
    try:
        # The hub sends downloads to other hosts, which are not to see its token.
        with urllib.request.build_opener(SameOriginToken()).open(request, timeout=HUB_SECONDS):
            return [ok(subject, f"{name}: not in the cache, but available from the hub")]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return [
                problem(
                    subject,
                    f"the hub denies this user access to {name} ({error.code})",
                    "check the name, request access, and set HF_TOKEN",
                )
            ]
        if error.code == 404:
            return [problem(subject, f"the hub does not have {name}, or not this revision", f"check {key}")]
        return [problem(subject, f"{endpoint} answers with {error.code} for {name}", fetch)]
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return [problem(subject, f"{name} is not in the cache, and {endpoint} does not answer ({reason})", fetch)]
