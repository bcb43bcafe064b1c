"""Trains a sentence encoder to distinguish rationales with different conclusions: `pst encoder train`.

The training itself is sentence-transformers' own trainer with its multiple-negatives ranking loss (InfoNCE over the
batch, with hard negatives). The result is a folder with a manifest and a card, which `embed.encoder` accepts. After an
interruption, the same command continues from the last checkpoint. `embedding.contrast` makes the examples.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.sample import normalise_question
from pst_dist.data.sources import load_data
from pst_dist.distributed.device_memory import is_out_of_memory
from pst_dist.embedding.causal import reads_causal
from pst_dist.embedding.contrast import Triplets, triplets
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.encoder_card import card, measure
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, StaleError, first_line
from pst_dist.logs import Progress, progress, quiet_libraries, without_chatter
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.json_files import read_lines, write_json
from pst_dist.storage.leftovers import restore_replaced
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import Manifest, digest_of
from pst_dist.storage.outputs import refuse_foreign_folder

log = logging.getLogger(__name__)
_VERSION = 1
_LEAST_ROWS = 8
MARK = "pst_encoder.json"
"""A file that only an encoder of ours has: what it was trained from, and what that changed."""
_WRONG = ("wrong", "disagrees")
"""Verdicts of `pst teach` that make a reply a hard negative."""


@dataclass(frozen=True)
class EncoderTraining:
    """Settings of one training; the base model, the rows and the seed come from the config."""

    output: Path
    """The folder of the trained encoder."""
    wrong: tuple[Path, ...] = ()
    """Files with wrong rationales: `dropped.jsonl` of `pst teach`, or rows with `question` and `rationale`."""
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-5
    negatives: int = 2
    """Hard negatives per rationale."""


def train_encoder(config: Config, settings: EncoderTraining, *, rebuild: bool = False) -> Manifest:
    """Train `config.embed.encoder` on the config's training rows; returns the manifest of `settings.output`.

    Does nothing when the same encoder exists. Raises InputError for a base that is no sentence-transformers model and
    for a folder with other files, DataError for too few rationales, StaleError for an encoder from other inputs unless
    `rebuild`, EnvironmentFault when memory runs out, and what reading the rows raises.
    """
    if reads_causal(config.embed):
        raise InputError(
            f"embed.encoder={config.embed.encoder} is a causal language model, which this command cannot train",
            "name a sentence-transformers model, such as embed.encoder=minilm",
        )
    if config.embed.engine != "torch":
        raise ConfigError(
            f"embed.engine={config.embed.engine} cannot train", "add embed.engine=torch embed.dtype=float32"
        )
    for package in ("accelerate", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise EnvironmentFault(f"training an encoder needs {package}", "pip install 'pst-dist[encoder]'")
    output = Path(os.path.abspath(settings.output))  # `-o .` has a name, too
    refuse_foreign_folder(output, "encoder")  # before the work
    splits = load_data(config).splits
    wrong = read_wrong(settings.wrong)
    made = triplets(splits["train"], wrong, negatives=settings.negatives, seed=config.seed)
    if len(made.rows) < _LEAST_ROWS:
        unchanged = f", and {made.without_negative:,} have no number, option, name, quoted word or opposite to change"
        without = unchanged if made.without_negative else ""
        raise DataError(
            f"{len(made.rows)} rationales can be used{without}; training an encoder needs at least {_LEAST_ROWS}",
            "add rows with rationales, or wrong rationales with --wrong",
        )
    log.info(
        "%s rationales: %s with another of the same question; %s of %s hard negatives are the teacher's; %s left out",
        *(f"{n:,}" for n in (len(made.rows), made.paired, made.from_teacher)),
        f"{settings.negatives * len(made.rows):,}",
        f"{made.without_negative:,}",
    )
    encoder = TextEncoder(config.embed)
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("output", "wrong")}
    facts = {
        "version": _VERSION,
        "base": encoder.identity,
        "examples": digest_of([asdict(row) for row in made.rows]),
        "seed": config.seed,
        **chosen,
    }
    artefact, fingerprint = Artefact(output, "encoder"), digest_of(facts)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f"{output.name}.training")
    with directory_lock(work):
        restore_replaced(output)
        done = artefact.finished()
        if done is not None and done.fingerprint == fingerprint:
            log.info("encoder %s is complete, nothing to do", output)
        elif done is not None and not rebuild:
            raise StaleError(
                "was trained from other rows, settings or weights",
                "use --rebuild to replace it, or name another folder",
                path=output,
            )
        else:
            held_out = triplets(splits["validation"], wrong, negatives=settings.negatives, seed=config.seed)
            done = _train(artefact, encoder, made, held_out, facts, work)
    shutil.rmtree(work, ignore_errors=True)
    return done


def read_wrong(files: Sequence[Path]) -> dict[str, list[str]]:
    """`normalise_question(question)` -> wrong rationales of it, from files in either form; raises InputError."""
    found: dict[str, list[str]] = {}
    for path in files:
        if not path.is_file():
            raise InputError("no such file", "--wrong takes dropped.jsonl of `pst teach`", path=path)
        taken = 0
        for row in read_lines(path):
            if "verdict" in row and row["verdict"] not in _WRONG:
                continue
            replies = row.get("replies")
            first = replies[0] if isinstance(replies, list) and replies and isinstance(replies[0], dict) else {}
            texts = row.get("rationales") or [row.get("rationale") or first.get("text")]
            question = row.get("question")
            for text in texts:
                if isinstance(question, str) and isinstance(text, str) and text.strip():
                    found.setdefault(normalise_question(question), []).append(text.strip())
                    taken += 1
        if not taken:
            raise InputError(
                "no line is a JSON object with a question and a wrong rationale",
                "--wrong takes dropped.jsonl of `pst teach`, or lines with question and rationale",
                path=path,
            )
        log.info("%s: %s wrong rationales", path, f"{taken:,}")
    return found


def _train(
    artefact: Artefact, encoder: TextEncoder, made: Triplets, held_out: Triplets, facts: dict[str, Any], work: Path
) -> Manifest:
    before = measure(encoder, held_out)
    fingerprint = digest_of(facts)
    note = work / "fingerprint.json"
    if not note.is_file() or json.loads(note.read_text()) != fingerprint:
        shutil.rmtree(work / "checkpoints", ignore_errors=True)  # of another training
        write_json(note, fingerprint)
    steps = _run_trainer(encoder, made, facts, work / "checkpoints")
    after = measure(encoder, held_out)
    report = {**facts, "steps": steps, "paired": made.paired, "from_teacher": made.from_teacher}
    report |= {"left_out": made.without_negative, "before": before, "after": after}
    with artefact.publish(fingerprint, report) as draft, without_chatter():
        encoder.model.save_pretrained(str(draft.path), create_model_card=False)
        write_json(draft.path / MARK, report)
        write_text(draft.path / "README.md", card(report, len(made.rows)))
    return draft.manifest


def _run_trainer(encoder: TextEncoder, made: Triplets, facts: Mapping[str, Any], checkpoints: Path) -> int:
    """Train in place, from the last whole checkpoint if there is one; returns the number of steps in all."""
    quiet_libraries()
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.training_args import BatchSamplers
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    columns: dict[str, list[str]] = {
        "anchor": [row.anchor for row in made.rows],
        "positive": [row.positive for row in made.rows],
    }
    for k in range(facts["negatives"]):
        columns[f"negative_{k + 1}"] = [row.negatives[k] for row in made.rows]
    per_epoch = max(1, -(-len(made.rows) // facts["batch_size"]))
    model = encoder.model
    if getattr(model, "model_card_data", None) is not None:
        model.model_card_data.local_files_only = True
        model.model_card_data.widget = [{"text": made.rows[0].anchor}]  # else it looks for examples, with a bar
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=facts["epochs"],
        per_device_train_batch_size=facts["batch_size"],
        learning_rate=facts["learning_rate"],
        warmup_steps=per_epoch * facts["epochs"] // 10,
        # Two rationales with equal words in one batch would be each other's negatives.
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        save_strategy="steps",
        save_steps=max(1, min(500, per_epoch * facts["epochs"] // 5)),
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        seed=facts["seed"],
        use_cpu=str(model.device) == "cpu",
    )

    class Shown(TrainerCallback):
        """Passes the trainer's steps on to a progress bar."""

        def __init__(self, bar: Progress) -> None:
            self.bar, self.note = bar, ""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar.total = state.max_steps
            self.bar.skip(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.bar.advance(note=self.note)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            self.note = f"loss {logs['loss']:.3f}" if logs and "loss" in logs else self.note

    with without_chatter(), progress("train encoder", total=per_epoch * facts["epochs"], unit="steps") as bar:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[Shown(bar)],
        )
        # The trainer prints its logs as dicts; the progress bar shows the loss instead.
        trainer.remove_callback(PrinterCallback)
        last = last_checkpoint(checkpoints)
        if last is not None:
            log.info("continuing from %s", last.name)
        try:
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise EnvironmentFault(
                f"memory ran out while training the encoder ({first_line(error, 200)})",
                f"use a smaller --batch-size than {facts['batch_size']}, or fewer --negatives",
            ) from error
    model.eval()
    return int(trainer.state.global_step)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose last file, the trainer's state, is whole; removes newer ones, cut short by a kill."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
            continue
        return path
    return None
