"""Recognises the encoder of finished embeddings by its settings and files, without loading it.

Importing sentence-transformers and loading a model takes seconds, which a command with nothing to embed need not spend.
`.embeddings.encoder.json`, beside the embeddings, records the identity that an encoder had, its settings and packages.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path
from typing import Any

from pst_dist.config.schema import EmbedConfig
from pst_dist.embedding.causal import causal_place, reads_causal
from pst_dist.embedding.encoder_model import encoder_files
from pst_dist.errors import PstError
from pst_dist.models.locate import GGUF, SETTING_SUFFIXES, WEIGHT_SUFFIXES, locate_encoder
from pst_dist.storage.json_files import read_object, write_json
from pst_dist.storage.manifest import digest_of, sha256_file

_ELSEWHERE = {"device", "backend", "ray"}
"""Settings that decide where vectors are computed, not which."""
_PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers", "openvino")


def encoder_folder(config: EmbedConfig) -> Path:
    """The folder of the encoder's files; raises what locating it raises."""
    if reads_causal(config):
        return Path(causal_place(config).target)
    return locate_encoder(config.encoder, config.revision)


def digests_of(config: EmbedConfig, folder: Path) -> dict[str, Any]:
    """The part of an encoder's identity that its files decide: `weights_sha256` by file name and `settings_sha256`."""
    digests = {str(path.relative_to(folder)): sha256_file(path) for path in encoder_files(config, folder)}
    return {
        "weights_sha256": {name: sha for name, sha in digests.items() if name.endswith((*WEIGHT_SUFFIXES, GGUF))},
        "settings_sha256": digest_of({name: sha for name, sha in digests.items() if name.endswith(SETTING_SUFFIXES)}),
    }


def remember_identity(embeddings: Path, config: EmbedConfig, identity: dict[str, Any]) -> None:
    """Record that the encoder of this config has this identity; does nothing where that cannot be written."""
    with contextlib.suppress(PstError, OSError):
        write_json(_record(embeddings), {**_asked(config), "identity": identity})


def known_identity(embeddings: Path, config: EmbedConfig) -> dict[str, Any] | None:
    """The recorded identity, if settings, packages and the encoder's files are those of the record; else None."""
    with contextlib.suppress(PstError, OSError):
        record = read_object(_record(embeddings))
        identity = record.pop("identity", None)
        if record == _asked(config) and isinstance(identity, dict):
            found = digests_of(config, encoder_folder(config))
            return identity if all(identity.get(name) == value for name, value in found.items()) else None
    return None


def _record(embeddings: Path) -> Path:
    return embeddings.with_name(f".{embeddings.name}.encoder.json")


def _asked(config: EmbedConfig) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"settings": config.model_dump(mode="json", exclude=_ELSEWHERE), "packages": versions}
