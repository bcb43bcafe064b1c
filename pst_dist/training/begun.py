"""Settings that are `auto` in a config, and what they stand for in one run.

A run keeps what it began with: the same command typed again, after an upgrade with other defaults too, resumes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from pst_dist.config.loading import RESOLVED, dump_config, load_config
from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config
from pst_dist.errors import IntegrityError
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import read_json, read_manifest
from pst_dist.student.new_tokens import MEAN, token_start
from pst_dist.student.prompt import AUTO, is_pretrained, prompt_of
from pst_dist.student.saved import FORMAT_FILE

PROMPT, TOKEN_INIT = "layout.prompt", "student.new_token_init"


def begun_settings(run: RunDir) -> dict[str, Any] | None:
    """The settings `PROMPT` and `TOKEN_INIT` of the training in a run directory; None when there is none.

    They are those of the newest readable checkpoint. Without checkpoints they are those of the kept student, if the
    training is finished. Trainings made before there was a choice of TOKEN_INIT used the mean.
    """
    steps = (path for path in run.checkpoints.glob("checkpoint-*") if path.name[11:].isdigit())
    for path in sorted(steps, key=lambda path: int(path.name[11:]), reverse=True):
        with contextlib.suppress(IntegrityError, OSError):
            saved = read_json(path / "run_state.json").get("settings", {})
            if PROMPT in saved:
                return {PROMPT: saved[PROMPT], TOKEN_INIT: saved.get(TOKEN_INIT, MEAN)}
    if run.training.is_file():
        with contextlib.suppress(IntegrityError, OSError, KeyError):
            student = read_manifest(run.best, "student")
            if student is not None:
                prompt = read_json(run.best / FORMAT_FILE)["prompt"]
                return {PROMPT: prompt, TOKEN_INIT: student.extra.get("new_token_init", MEAN)}
    return None


def settled(config: Config, begun: Mapping[str, Any] | None, make_tokenizer: Callable[[], Any]) -> Config:
    """The config with every `auto` replaced: by the begun training's value, else by what suits the student.

    `make_tokenizer` is called only where the tokenizer decides. Raises ConfigError, as `prompt_of` and `token_start`.
    """
    prompt, start = config.layout.prompt, config.student.new_token_init
    tokenizer = None
    if is_pretrained(config):
        if begun is not None:
            prompt = begun[PROMPT] if prompt == AUTO else prompt
            start = begun[TOKEN_INIT] if start == AUTO else start
            config = _with(config, prompt, start)
        if AUTO in (prompt, start):
            tokenizer = make_tokenizer()
    return _with(config, prompt_of(config, tokenizer), token_start(config, tokenizer) if start == AUTO else start)


def with_auto_of(recorded: Config, wanted: Config) -> Config:
    """The recorded config of a run with `auto` where `wanted` says `auto`: the run replaced it when it began."""
    prompt, start = recorded.layout.prompt, recorded.student.new_token_init
    return _with(
        recorded,
        AUTO if wanted.layout.prompt == AUTO else prompt,
        AUTO if wanted.student.new_token_init == AUTO else start,
    )


def _with(config: Config, prompt: str, start: str) -> Config:
    return config.model_copy(
        update={
            "layout": config.layout.model_copy(update={"prompt": prompt}),
            "student": config.student.model_copy(update={"new_token_init": start}),
        }
    )


def record_settled(config: Config, run: RunDir) -> None:
    """Write the settled values into the saved config of a run, where there is one; on rank zero.

    The rest of that file stays: a training on Ray has other folders in its config than the command had.
    """
    path = run.path / RESOLVED
    if not is_pretrained(config) or not path.is_file():  # for a fresh student `auto` means one thing
        return
    recorded = load_config(str(run.path))
    if AUTO in (recorded.layout.prompt, recorded.student.new_token_init):
        write_text(path, dump_config(_with(recorded, config.layout.prompt, config.student.new_token_init)))
