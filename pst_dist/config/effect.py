"""Settings that a verb never reads: giving one that differs from the run's own has no effect, and is refused.

A student, its scores and its export belong to the rows and settings that they were made from, so `evaluate` and
`export` read the few settings below and take everything else from the run.
"""

from __future__ import annotations

from pathlib import Path

from pst_dist.config.loading import RESOLVED, flat_keys, load_config
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError

_ALWAYS_READ = ("output_dir", "data_dir", "data_cache", "arm", "arms", "task")
_READ = {
    "evaluate": (*_ALWAYS_READ, "data.answer_type", "evaluate.", "embed."),
    "export": (*_ALWAYS_READ, "evaluate.max_new_tokens"),
}
"""Verb -> the keys it reads; a name that ends in a dot is a whole section. `arm` is compared with the student's."""


def refuse_without_effect(verb: str, config: Config) -> None:
    """Raises ConfigError for a setting that `verb` never reads and that differs from the one the run was made with.

    A run without a saved config is taken as it is.
    """
    if not (Path(config.output_dir) / RESOLVED).is_file():
        return
    recorded = flat_keys(load_config(config.output_dir).model_dump(mode="json"))
    for key, value in flat_keys(config.model_dump(mode="json")).items():
        read = any(key.startswith(name) if name.endswith(".") else key == name for name in _READ[verb])
        if not read and value != recorded.get(key):
            raise ConfigError(
                f"{key}={_shown(value)} has no effect on {verb}: the run was made with {_shown(recorded.get(key))}",
                "leave it out, or make another run with it in another output_dir",
                path=config.output_dir,
            )


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
