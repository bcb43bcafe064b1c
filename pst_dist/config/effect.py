"""Refuse settings that have no effect: those that a verb never reads and that differ from the run's own.

A student, its scores, its export and its page belong to the rows and settings of their run, so `evaluate`, `export` and
`report` read only the settings listed below and take all others from the run. With data.test, `evaluate` scores other
rows as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pst_dist.config.keys import flat_keys
from pst_dist.config.loading import load_config
from pst_dist.config.locate import RESOLVED, locate_overlay
from pst_dist.config.overrides import parse_override
from pst_dist.config.schema import Config
from pst_dist.config.yaml_text import read_yaml
from pst_dist.errors import ConfigError

WHAT_A_RUN_IS = ("arm", "seed", "data", "student", "layout", "loss")
"""Settings that determine what a student is and what it is scored on. The others only affect how it is trained."""
_ALWAYS_READ = ("output_dir", "data_dir", "data_cache", "arm", "arms", "task")
_EXPORT = (*_ALWAYS_READ, "evaluate.max_new_tokens")
_READ = {
    "evaluate": (*_ALWAYS_READ, "data.answer_type", "evaluate", "embed"),
    "export": _EXPORT,
    "report": _ALWAYS_READ,
    "export --lm-eval": (*_EXPORT, "data.answer_type", "evaluate.split", "evaluate.max_rows"),
}
"""The keys and sections that each verb reads. `arm` is compared with the student's."""
_READ_OF_OTHER_ROWS = ("data.test", "data.root", "data.columns", "data.max_bad", "data.duplicates")
"""What `evaluate` reads besides, when data.test names other rows than the run's."""


def given_keys(overrides: Sequence[str]) -> list[str]:
    """The dotted keys that command-line overrides set, including those in overlays."""
    keys: list[str] = []
    for word in overrides:
        if word.startswith("+"):
            keys += flat_keys(read_yaml(locate_overlay(word))[0])
        else:
            keys.append(".".join(parse_override(word)[0]))
    return keys


def refuse_without_effect(verb: str, config: Config, given: Iterable[str]) -> None:
    """Raise ConfigError for a given key or section that `verb` never reads and whose value differs from the run's.

    Does nothing for a run without a saved config.
    """
    given = list(given)
    if not given or not (Path(config.output_dir) / RESOLVED).is_file():
        return
    recorded = flat_keys(load_config(config.output_dir).model_dump(mode="json"))
    read = _READ[verb] + (_READ_OF_OTHER_ROWS if verb == "evaluate" and names_other_rows(config, given) else ())
    for key, value in flat_keys(config.model_dump(mode="json")).items():
        if value == "auto":  # the run replaced it by its own value when it began
            continue
        if value != recorded.get(key) and _is_among(key, given) and not _is_among(key, read):
            raise ConfigError(
                f"{key}={_shown(value)} has no effect on {verb}: the run was made with {_shown(recorded.get(key))}",
                "leave it out, or start a new run with it in another output_dir",
                path=config.output_dir,
            )


def names_other_rows(config: Config, given: Iterable[str]) -> bool:
    """Whether data.test is among the given keys and names rows that are not those of the run.

    Without a saved config, only data.test itself counts, not the section `data` of a whole config.
    """
    given, rows = list(given), config.data.test
    if rows is None or not _is_among("data.test", given):
        return False
    if not (Path(config.output_dir) / RESOLVED).is_file():
        return "data.test" in given
    return bool(load_config(config.output_dir).data.test != rows)


def _is_among(key: str, names: Iterable[str]) -> bool:
    """Whether a key is one of `names` or belongs to a section among them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
