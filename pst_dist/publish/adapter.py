"""Exports a LoRA student as its adapter alone: a PEFT folder of a few megabytes that names its base.

`publish.export` merges the adapter into the base instead, for programs that load a whole model.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.errors import InputError
from pst_dist.evaluation.adaptive import chosen_threshold
from pst_dist.evaluation.evaluate import evaluations_of
from pst_dist.models import adapters
from pst_dist.models.locate import locate_model
from pst_dist.publish.card_facts import CardFacts
from pst_dist.publish.export import chain_of, generation_settings, prepare_tokenizer
from pst_dist.publish.model_card import model_card
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import digest_of, write_json
from pst_dist.student.saved import FORMAT_FILE, load_student

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
            "was trained whole (student.lora.rank=0), so there is no adapter to export",
            "run `pst export` without --adapter",
            path=run.best,
        )
    student = load_student(run.best, device="cpu")
    if len(locate_model(str(run.best)).adapters) > 1:
        raise InputError(
            "its base is an adapter too, and peft loads one only", "run `pst export` without --adapter", path=run.best
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
        prepare_tokenizer(student)
        student.tokenizer.save_pretrained(draft.path)
        fmt = replace(student.format, think_below=chosen_threshold(evaluations))
        write_json(draft.path / FORMAT_FILE, fmt.to_json())
        has_template = student.tokenizer.chat_template is not None
        facts = CardFacts(
            config,
            student.format,
            student.manifest,
            evaluations,
            encoder,
            chain,
            student.model,
            has_template,
            is_adapter=True,
        )
        write_text(draft.path / "README.md", model_card(facts))
    log.info("exported the adapter to %s; it loads with peft on top of its base", run.adapter)
    return run.adapter
