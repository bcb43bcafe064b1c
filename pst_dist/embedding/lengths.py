"""Counts rationales that an encoder would truncate, from its tokenizer and settings alone: no weights are read.

For `pst check`, before anything is embedded. `TextEncoder.count_truncated` counts the same while it embeds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.config.schema import EmbedConfig
from pst_dist.errors import InputError, PstError
from pst_dist.models.load_errors import loading_errors
from pst_dist.models.locate import ModelPlace, is_hub_id, locate_encoder

_SETTINGS = "sentence_*_config.json"
"""Of sentence-transformers' first module; today's name is sentence_bert_config.json, earlier ones had other models'."""
_ADDED = 8
"""More tokens than a tokenizer adds to a text by itself."""
_AT_ONCE = 1000


@dataclass(frozen=True)
class Lengths:
    """What would become of the rationales."""

    rationales: int
    truncated: int
    limit: int
    """Tokens that the encoder reads of a rationale."""


def measure(config: EmbedConfig, rationales: Iterable[str]) -> Lengths | None:
    """Counts rationales that exceed the encoder's limit.

    None when the encoder is not on this machine, is of a kind whose limit is not in its settings, or every text is so
    short that none can exceed it. Raises InputError for settings that cannot be read.
    """
    try:
        folder = None if is_hub_id(config.encoder) else locate_encoder(config.encoder)
    except PstError:
        return None  # not installed here; `pst run` says so
    place = None if folder is None else _transformer(folder)
    if folder is None or place is None:
        return None
    prefix = config.prefix or _default_prompt(folder)
    limits = [limit for limit in (config.max_seq_length, *_limits(place)) if limit is not None]
    # A token of ASCII text has at least one character.
    shortest = min(limits, default=0) - _ADDED - len(prefix)
    counted = 0

    def candidates() -> Iterator[str]:
        nonlocal counted
        for text in rationales:
            counted += 1
            if len(text) > shortest or not (prefix + text).isascii():
                yield prefix + text

    tokenizer, limit, truncated = None, None, 0
    longer = candidates()
    while part := list(itertools.islice(longer, _AT_ONCE)):
        if tokenizer is None:
            tokenizer, limit = _tokenizer(place, config)
            if limit is None:
                return None
        ids = tokenizer(part, truncation=False, verbose=False)["input_ids"]
        truncated += sum(len(row) > (limit or 0) for row in ids)
    return None if limit is None else Lengths(counted, truncated, limit)


def _transformer(folder: Path) -> Path | None:
    """The folder of the module that tokenises; None for modules without a tokenizer of their own."""
    modules = _json(folder / "modules.json")
    if not modules:
        return folder  # a bare encoder, as sentence-transformers loads it
    first = modules[0] if isinstance(modules, list) and isinstance(modules[0], dict) else {}
    return folder / str(first.get("path") or "") if str(first.get("type", "")).endswith(".Transformer") else None


def _default_prompt(folder: Path) -> str:
    settings = _json(folder / "config_sentence_transformers.json") or {}
    prompts = settings.get("prompts") or {}
    return str(prompts.get(settings.get("default_prompt_name")) or "")


def _own(place: Path) -> dict[str, Any]:
    """The settings of the first module."""
    found = sorted(place.glob(_SETTINGS))
    settings = _json(found[0]) if found else {}
    return settings if isinstance(settings, dict) else {}


def _limits(place: Path) -> list[int | None]:
    """Every number in the settings that may be the limit."""
    tokenizer, shape = (_json(place / name) or {} for name in ("tokenizer_config.json", "config.json"))
    named = [_own(place).get("max_seq_length"), tokenizer.get("model_max_length"), shape.get("max_position_embeddings")]
    return [number for number in named if isinstance(number, int) and number > 0]


def _tokenizer(place: Path, config: EmbedConfig) -> tuple[Any, int | None]:
    """The tokenizer and the number of tokens after which it cuts, by sentence-transformers' rules."""
    from transformers import AutoConfig, AutoTokenizer

    own, model = _own(place), ModelPlace(str(place), str(place), local_only=True)
    options = own.get("processor_kwargs") or own.get("tokenizer_args") or {}
    if own.get("max_seq_length") is not None:
        options = {"model_max_length": own["max_seq_length"], **options}
    given = {name: value for name, value in options.items() if name not in ("local_files_only", "trust_remote_code")}
    with loading_errors("the sentence encoder", model, "modules.json"):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(place), **given, local_files_only=True, trust_remote_code=False
        )
        limit = int(tokenizer.model_max_length)
        if "model_max_length" not in options:
            shape = AutoConfig.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
            positions = getattr(shape, "max_position_embeddings", None)
            limit = min(limit, positions) if isinstance(positions, int) and positions > 0 else limit
    return tokenizer, config.max_seq_length if config.max_seq_length is not None else limit


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read: {error}", "check embed.encoder", path=path) from error
