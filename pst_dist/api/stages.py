"""The stages of a run as functions of a config: all of them, training, evaluation and export."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pst_dist.api.configs import Source, checked, load_config, tree_of, write_rows
from pst_dist.api.faults import our_errors
from pst_dist.api.results import ArmResult, EvaluationResult, RunResult, TrainResult
from pst_dist.config.effect import WHAT_A_RUN_IS, given_keys, names_other_rows, refuse_without_effect
from pst_dist.config.keys import flat_keys
from pst_dist.config.run_dir import check_lasting, expand_arms, recorded, run_dir
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, InputError
from pst_dist.logs import shown_by_default

log = logging.getLogger(__name__)


def run(source: Source, *overrides: str, rebuild: bool = False, **keys: Any) -> RunResult:
    """All stages for every arm: shards, embeddings, training, evaluation, export and report.

    A stage that is complete for the same inputs is skipped, and an interrupted training resumes from its newest
    checkpoint, so the same call resumes; `run("runs/mine")` resumes from the directory alone. `rebuild` replaces
    artefacts made from other inputs. The arguments are those of `load_config`.

    Raises as `load_config` and the stages do (see `pst_dist.errors`). Ctrl-C during training saves a checkpoint after
    the current step and raises KeyboardInterrupt; a second Ctrl-C ends the process at once.
    """
    from pst_dist.pipeline import run_all

    with our_errors(), shown_by_default():
        config = load_config(source, *overrides, **keys)
        check_lasting(config)
        pages = run_all(config, rebuild=rebuild, command=_command("run", config))
        arms = tuple(_arm_result(arm) for arm in expand_arms(config))
    return RunResult(config=config, output_dir=Path(config.output_dir), arms=arms, report=pages[-1])


def train(source: Source, *overrides: str, rebuild: bool = False, **keys: Any) -> TrainResult:
    """Train one arm, making missing shards and embeddings first; resumes like `run`.

    With several ranks (a script under torchrun), every rank calls this, and shards and embeddings must already exist.
    Raises ConfigError for a config with several arms.
    """
    from pst_dist.embedding.targets import needs_embeddings
    from pst_dist.pipeline import make_embeddings, make_shards, make_student

    with our_errors(), shown_by_default():
        config = _one_arm(load_config(source, *overrides, **keys), "train")
        check_lasting(config)
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        is_main = int(os.environ.get("RANK", "0")) == 0
        with recorded(config, command=_command("train", config)) if is_main else contextlib.nullcontext():
            if alone:
                make_shards(config, rebuild=rebuild)
                if needs_embeddings(config):
                    make_embeddings(config, rebuild=rebuild)
            record = make_student(config, rebuild=rebuild)
        return TrainResult.of(config, record)


def evaluate(source: Source, *overrides: str, rebuild: bool = False, **keys: Any) -> EvaluationResult:
    """Decode and score one split with a trained student; done once for the same student, rows and settings.

    `data={"test": rows}` scores other rows (a path, or the rows themselves) into a folder of their own; `task` and
    data.answer_type, columns, root, max_bad and duplicates then apply to them. The run's own scores stay.

    It uses the settings of `evaluate` (`evaluate={"split": "validation"}`, or `{"backend": "ray"}` for a cluster),
    `embed`, the task and the directories. Any other given setting that differs from the run's own has no effect and
    raises ConfigError; so do student, layout and loss of a given `Config` that differ, and a config with several arms.
    """
    from pst_dist.pipeline import make_scores

    with our_errors(), shown_by_default():
        config, others = _of_finished("evaluate", source, overrides, keys)
        results = make_scores(config, rebuild=rebuild, other_rows=others)
        assert results is not None, "only the ranks of a process group have none"
        return EvaluationResult.of(config, results)


def export(
    source: Source,
    *overrides: str,
    rebuild: bool = False,
    adapter: bool = False,
    gguf: bool | str = False,
    compare_rows: int = 200,
    licence: str | None = None,
    **keys: Any,
) -> Path:
    """Write the student as a folder that plain transformers loads, with its model card; returns the folder.

    `gguf` names a type ("f32", "f16", "q8_0", "q4_k_m"; True is "q8_0") and writes a GGUF file for llama.cpp too. Then
    that file is returned; a Modelfile and a card are beside it, and the log says how many of `compare_rows` scored
    test rows it answers differently. `adapter` writes the adapter of a LoRA student alone, as a PEFT folder. `licence`
    is named in the cards.

    It uses `evaluate.max_new_tokens`, the task and the directories; other settings are refused as in `evaluate`. Raises
    ConfigError for an unknown type or a student that llama.cpp does not compute in the same way, and EnvironmentFault
    without the package gguf.
    """
    from pst_dist.publish.adapter import export_adapter
    from pst_dist.publish.export import export
    from pst_dist.publish.gguf.types import TYPES

    kind = "q8_0" if gguf is True else gguf
    if kind and kind not in TYPES:
        raise ConfigError(f"gguf={gguf!r} is not a type of GGUF file", f"use one of {', '.join(TYPES)}")
    if adapter and (kind or licence):
        raise ConfigError(f"{'gguf' if kind else 'licence'} has no effect on an adapter alone", "leave out one of them")
    with our_errors(), shown_by_default():
        config = _of_finished("export", source, overrides, keys)[0]
        if adapter:
            return export_adapter(config, rebuild=rebuild)
        folder = export(config, rebuild=rebuild, licence=licence)
        if not kind:
            return folder
        from pst_dist.publish.gguf.artefact import export_gguf

        made = export_gguf(config, kind, compare_rows=compare_rows, rebuild=rebuild)
        for line in made.lines():
            log.info("%s", line.strip())
        return made.file


def _of_finished(verb: str, source: Source, overrides: Sequence[str], keys: Mapping[str, Any]) -> tuple[Config, bool]:
    """(the config of a trained arm, whether it names other rows); raises ConfigError for a setting without effect."""
    config, files = checked(source, overrides, keys)
    config = _one_arm(config, verb)
    given = [*given_keys(overrides), *flat_keys(tree_of(keys))]
    given += WHAT_A_RUN_IS if isinstance(source, Config) else ()
    refuse_without_effect(verb, config, given)
    others = names_other_rows(config, given)
    if others:
        write_rows(config, files)
    return config, others


def _one_arm(config: Config, verb: str) -> Config:
    """The config of the only arm; raises ConfigError for several."""
    arms = expand_arms(config)
    if len(arms) > 1:
        raise ConfigError(
            f"{verb} takes one arm, and this config has {len(arms)}: {', '.join(arm.arm for arm in arms)}",
            f"call it for each arm: `for arm in pst_dist.expand_arms(config): {verb}(arm)`",
            path=config.output_dir,
        )
    return arms[0]


def _arm_result(config: Config) -> ArmResult:
    """The results of a finished arm, from its run directory."""
    from pst_dist.evaluation.evaluate import finished_evaluation
    from pst_dist.storage.manifest import read_json
    from pst_dist.training.result import TrainingResult

    paths = run_dir(config)
    results = finished_evaluation(paths.evaluation(config.evaluate.split))
    if results is None:
        raise InputError("the run has not been evaluated", "run it again", path=paths.path)
    return ArmResult(
        arm=config.arm,
        config=config,
        output_dir=paths.path,
        training=TrainResult.of(config, TrainingResult(**read_json(paths.training))),
        evaluation=EvaluationResult.of(config, results),
        export=paths.export,
        report=paths.report,
    )


def _command(verb: str, config: Config) -> str:
    """The command in a run's record: the call that resumes it."""
    return f"pst_dist.{'api.' if verb == 'train' else ''}{verb}({config.output_dir!r})"
