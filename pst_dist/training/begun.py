"""Settings that are `auto` in a config, and their values in one run.

A run keeps the values that it started with, so the same command resumes it, even after an upgrade that changed
defaults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.locate import RESOLVED
from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config, LayoutConfig
from pst_dist.errors import IntegrityError
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import read_json, read_manifest
from pst_dist.student.new_tokens import MEAN, token_start
from pst_dist.student.prompt import AUTO, is_pretrained, prompt_of
from pst_dist.student.saved import FORMAT_FILE

PROMPT, TOKEN_INIT = "layout.prompt", "student.new_token_init"
SEPARATOR, TURNS = "layout.separator", "layout.turns"
_OLDER = {TOKEN_INIT: MEAN, SEPARATOR: " ", TURNS: None}
"""What trainings used before there was a choice."""


def begun_settings(run: RunDir) -> dict[str, Any] | None:
    """The settings PROMPT, SEPARATOR, TURNS and TOKEN_INIT of the training in a run directory; None without one.

    They are those of the newest readable checkpoint. Without checkpoints they are those of the kept student, if the
    training is finished.
    """
    steps = (path for path in run.checkpoints.glob("checkpoint-*") if path.name[11:].isdigit())
    for path in sorted(steps, key=lambda path: int(path.name[11:]), reverse=True):
        with contextlib.suppress(IntegrityError, OSError):
            saved = read_json(path / "run_state.json").get("settings", {})
            if PROMPT in saved:
                return {PROMPT: saved[PROMPT]} | {key: saved.get(key, value) for key, value in _OLDER.items()}
    if run.training.is_file():
        with contextlib.suppress(IntegrityError, OSError, KeyError):
            student = read_manifest(run.best, "student")
            if student is not None:
                written = read_json(run.best / FORMAT_FILE)
                start = student.extra.get("new_token_init", MEAN)
                kept = {SEPARATOR: written.get("separator", " "), TURNS: written.get("turns"), TOKEN_INIT: start}
                return {PROMPT: written["prompt"], **kept}
    return None


def settled(config: Config, begun: Mapping[str, Any] | None, make_tokenizer: Callable[[], Any]) -> Config:
    """The config with every `auto` replaced: by the begun training's value, else by what suits the student.

    `make_tokenizer` is called only where the tokenizer decides. Raises ConfigError, as `prompt_of` and `token_start`.
    """
    if begun is not None:
        config = _as_begun(config, begun)
    layout, start, tokenizer = config.layout, config.student.new_token_init, None
    if is_pretrained(config) and AUTO in (layout.prompt, layout.separator, start):
        tokenizer = make_tokenizer()
    prompt = prompt_of(config, tokenizer)
    layout = layout.model_copy(update={"prompt": prompt.template, "separator": prompt.separator, "turns": prompt.turns})
    return _with(config, layout, token_start(config, tokenizer) if start == AUTO else start)


def _as_begun(config: Config, begun: Mapping[str, Any]) -> Config:
    """The config with the begun training's values for `auto`; a fresh student's prompt and start need none."""
    begun = {**_OLDER, **begun}
    layout, start = config.layout, config.student.new_token_init
    if layout.separator == AUTO:
        layout = layout.model_copy(update={"separator": begun[SEPARATOR]})
    if is_pretrained(config):
        if layout.prompt == AUTO:
            layout = layout.model_copy(update={"prompt": begun[PROMPT], "turns": begun[TURNS]})
        start = begun[TOKEN_INIT] if start == AUTO else start
    return _with(config, layout, start)


def with_auto_of(recorded: Config, wanted: Config) -> Config:
    """The recorded config of a run with `auto` where `wanted` says `auto`: the run replaced it when it began."""
    layout, asked = recorded.layout, wanted.layout
    if asked.prompt == AUTO:
        layout = layout.model_copy(update={"prompt": AUTO, "turns": asked.turns})
    if asked.separator == AUTO:
        layout = layout.model_copy(update={"separator": AUTO})
    start = wanted.student.new_token_init
    return _with(recorded, layout, AUTO if start == AUTO else recorded.student.new_token_init)


def _with(config: Config, layout: LayoutConfig, start: str) -> Config:
    student = config.student.model_copy(update={"new_token_init": start})
    return config.model_copy(update={"layout": layout, "student": student})


def record_settled(config: Config, run: RunDir) -> None:
    """Write the settled values into the saved config of a run, where there is one; on rank zero.

    The rest of that file stays: a training on Ray has other folders in its config than the command had.
    """
    path = run.path / RESOLVED
    if not is_pretrained(config) or not path.is_file():  # for a fresh student `auto` means one thing
        return
    recorded = load_config(str(run.path))
    if AUTO in (recorded.layout.prompt, recorded.layout.separator, recorded.student.new_token_init):
        write_text(path, dump_config(_with(recorded, config.layout, config.student.new_token_init)))
