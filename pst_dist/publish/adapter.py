"""Exports a LoRA student as its adapter alone: a PEFT folder of a few megabytes that names its base.

`publish.export` merges the adapter into the base instead, for programs that load a whole model.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.errors import InputError
from pst_dist.evaluation.evaluate import evaluations_of
from pst_dist.models import adapters
from pst_dist.models.locate import locate_model
from pst_dist.publish.export import chain_of, generation_settings, write_beside_weights
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.manifest import digest_of
from pst_dist.student.saved import load_student

log = logging.getLogger(__name__)
_VERSION = 1


def export_adapter(config: Config, *, rebuild: bool = False) -> Path:
    """Write `run.adapter` and return its path; does nothing when the same export already exists.

    The folder loads with peft on top of its base and has the tokenizer, the end of an answer and the model card of the
    whole export. Raises InputError when the student is no LoRA student, and when its base is an adapter too, because
    peft cannot load one on top of the other.
    """
    from safetensors import safe_open

    run = run_dir(config)
    if run.best.is_dir() and not adapters.is_adapter(run.best):
        raise InputError(
            "was trained without LoRA (student.lora.rank=0), so there is no adapter to export",
            "run `pst export` without --adapter",
            path=run.best,
        )
    student = load_student(run.best, device="cpu")
    if len(locate_model(str(run.best)).adapters) > 1:
        raise InputError(
            "its base is an adapter too, and peft can load only one",
            "run `pst export` without --adapter",
            path=run.best,
        )
    with safe_open(run.best / adapters.WEIGHTS, "pt") as stored:
        both = adapters.rows_inside_adapters(stored.keys())
    if both:
        raise InputError(
            f"{both} has an adapter and trained rows, which peft cannot load together",
            "run `pst export` without --adapter, or leave it out of student.lora.target_modules",
            path=run.best,
        )
    evaluations = evaluations_of(run.path, student.manifest)
    chain, encoder = chain_of(run, student.manifest)
    inputs: dict[str, Any] = {"student": student.manifest.digest, "evaluations": evaluations, "chain": chain}
    inputs["task"] = config.task
    inputs |= {"version": _VERSION, "kind": "adapter", "max_new_tokens": config.evaluate.max_new_tokens}
    artefact, fingerprint = Artefact(run.adapter, "export"), digest_of(inputs)
    if not rebuild and artefact.finished(fingerprint):
        log.info("export %s is complete, nothing to do", run.adapter)
        return run.adapter
    extra = {**student.manifest.extra, "student": student.manifest.digest, **chain}
    with artefact.publish(fingerprint, extra) as draft:
        for name in (adapters.CONFIG, adapters.WEIGHTS):
            shutil.copyfile(run.best / name, draft.path / name)
        generation_settings(student, config.evaluate.max_new_tokens).save_pretrained(draft.path)
        write_beside_weights(draft.path, config, student, evaluations, encoder, chain, is_adapter=True)
    log.info("exported the adapter to %s; it loads with peft on top of its base", run.adapter)
    return run.adapter
