"""Parses the arguments after a verb: the config, its overrides, and `on=ray`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pst_dist.errors import ConfigError

if TYPE_CHECKING:
    from pst_dist.config.schema import Config


def config_of(arguments: argparse.Namespace) -> Config:
    """The config named on the command line, with its overrides."""
    from pst_dist.config.loading import load_config

    return load_config(arguments.config, spell_on(arguments.overrides, arguments.on))


def rows_and_words(first: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the rows, the other words) of a command whose first word names rows.

    A shell may have expanded a pattern into several files.
    """
    from pst_dist.config.locate import is_rows
    from pst_dist.text.urls import is_whole_url

    others = [word for word in words if is_whole_url(word) or ("=" not in word and is_rows(word))]
    return [first, *others], [word for word in words if word not in others]


def config_of_rows(files: Sequence[str], words: Sequence[str]) -> Config:
    """A config whose training rows are these files."""
    from pst_dist.config.loading import load_config

    # JSON quotes them, because YAML reads `*` as an alias.
    train = json.dumps(files if len(files) > 1 else files[0])
    # No validation rows are held out, because nothing is trained on them.
    return load_config(None, [f"data.train={train}", "data.validation_size=0", *words])


def finished_config_of(arguments: argparse.Namespace, verb: str) -> Config:
    """The same for a verb that uses a finished run; refuses overrides that have no effect on `verb`."""
    from pst_dist.config.effect import given_keys, refuse_without_effect

    config = config_of(arguments)
    refuse_without_effect(verb, config, given_keys(arguments.overrides))
    return config


def lasting_config_of(arguments: argparse.Namespace) -> Config:
    """The same for a verb that writes; refuses folders that would be deleted with a Ray job."""
    from pst_dist.config.run_dir import check_lasting

    config = config_of(arguments)
    check_lasting(config)
    return config


def spell_on(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The words with `on=ray` or `on=local` replaced by values of `keys`; raises ConfigError for another value.

    `on` cannot be a config key because YAML reads a bare `on` as true. Without `keys` it is not special.
    """
    spelt: list[str] = []
    for word in words:
        if keys and word.startswith("on="):
            if word not in ("on=ray", "on=local"):
                raise ConfigError(f"{word}: unknown value", "use on=ray or on=local")
            spelt += [f"{key}={word.removeprefix('on=')}" for key in keys]
        else:
            spelt.append(word)
    return spelt


def gather_overrides(unknown: Sequence[str]) -> list[str]:
    """`--key.sub value` and `--key.sub=value` as `key.sub=value`; raises ConfigError for a flag without a value.

    `unknown` also contains plain `key.sub=value` and `+NAME` after an option, because argparse ends its list there.
    """
    words: list[str] = []
    rest = list(unknown)
    while rest:
        word = rest.pop(0)
        if word.startswith("+") or (not word.startswith("-") and "=" in word):
            words.append(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is not key.sub=value", "see `pst --help`")
        if "=" not in word:
            if not rest:
                raise ConfigError(f"unknown option {word!r}", "see the verb's --help")
            word = f"{word}={rest.pop(0)}"
        words.append(word.removeprefix("--"))
    return words
