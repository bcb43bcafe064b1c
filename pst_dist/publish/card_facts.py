"""The facts in a model card, and the words that describe what the student was trained to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.schema import Config
from pst_dist.config.variant import variant_of
from pst_dist.models.locate import MINILM, PACKAGED
from pst_dist.storage.manifest import Manifest
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.warm_start import warm_shape
from pst_dist.text.redaction import redact
from pst_dist.text.urls import place_name

_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
_PLACES = {
    "ray",
    "backend",
    "report_to",
    "metrics_port",
    "sample_answers",
    "deepspeed",
    "num_threads",
    "timeout_seconds",
}
"""Settings of `train` that say where and how it ran, not what was learnt."""
_MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class CardFacts:
    """Everything that goes into a card."""

    config: Config
    format: AnswerFormat
    student: Manifest
    evaluations: list[dict[str, Any]]
    """Results of this student, test first."""
    encoder: dict[str, Any] | None
    """Identity of the encoder of the teacher's rationales."""
    chain: dict[str, str | None]
    """Digests of shards and embeddings."""
    model: Any
    has_chat_template: bool = True
    """Whether the exported tokenizer has one."""
    is_adapter: bool = False
    """Whether the folder contains a LoRA adapter without its base."""
    licence: str | None = None
    """Identifier of the licence that the exporting person stated, such as `apache-2.0`; None when they stated none."""

    def licence_words(self) -> str:
        """One sentence on the licence."""
        if self.licence is None:
            return "Its licence depends on the base model, the rows and the teacher. This card grants none."
        return (
            f"Its licence is `{self.licence}`, as stated by the person who exported it; pst-dist has not checked that "
            "the base model, the rows and the teacher allow it."
        )

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the data sets that its rows were read from."""
        found = (_hub_dataset(source) for source in _sources(self.config))
        return list(dict.fromkeys(name for name in found if name is not None))

    @property
    def seq2seq(self) -> bool:
        """Whether the student is an encoder-decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def base_model(self) -> str | None:
        """Hub id of the base model; None for random weights and for a local folder, whose path stays private."""
        base = self.config.student.model_name_or_path or ""
        if base == MINILM:
            return _MINILM_ID
        if base in PACKAGED:
            return PACKAGED[base].hub_id
        return base if _HUB_ID.fullmatch(base) and not Path(base).exists() else None

    @property
    def name(self) -> str:
        """Arm, task and model type: `pst-svamp-gpt2`."""
        return "-".join((self.format.arm, self.config.task or "reasoning", self.model.config.model_type))


def _sources(config: Config) -> list[str]:
    """Where the rows come from, as the config says it: train, validation and test."""
    data = config.data
    values = [value for value in (data.train, data.validation, data.test) if value is not None]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [one if isinstance(one, str) else str(getattr(one, "rows", "")) for one in flat]


def _hub_dataset(source: str) -> str | None:
    """The hub id in `hf:NAME[@REVISION][:CONFIG]:SPLIT`."""
    found = re.match(r"hf:([\w.-]+(?:/[\w.-]+)?)(?=[@:])", source)
    return found[1] if found else None


def _row_words(config: Config) -> str:
    """The sources of the rows, files and URLs by their names alone because their folders are private."""
    named = (source if source.startswith(("hf:", "gen:")) else place_name(source) for source in _sources(config))
    return ", ".join(f"`{name}`" for name in dict.fromkeys(named)) or "not recorded"


def settings_text(facts: CardFacts) -> str:
    """The settings that shape the weights as YAML, with every default; without folders and other places."""
    import yaml

    kept = facts.config.model_dump(mode="json", include={"arm", "task", "seed", "layout", "loss", "student", "train"})
    kept["train"] = {key: value for key, value in kept["train"].items() if key not in _PLACES}
    if kept["student"]["model_name_or_path"] is not None:
        kept["student"]["model_name_or_path"] = facts.base_model or "a model from a local folder"
    return redact(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)).replace("`", "'")


def training_words(facts: CardFacts) -> str:
    """What the student was trained to do; loss terms that were switched off are not mentioned as used."""
    if facts.format.arm != "pst":
        return ARMS[facts.format.arm].description
    loss = facts.config.loss
    words = "trained to answer first"
    if facts.format.writes_rationale:
        words += " and to give the rationale after the answer"
    if loss.alignment_weight == 0:
        return words + ", with a semantic token whose hidden state is not aligned with anything"
    what = "a semantic token's hidden state" if loss.pooling == "token" else "the mean hidden state of its rationale"
    whose = (
        "another row's teacher rationale (a control)"
        if loss.control == "shuffle_embeddings"
        else "the teacher's rationale"
    )
    return f"{words}, with {what} aligned with a sentence embedding of {whose}"


def lineage(facts: CardFacts) -> list[tuple[str, str]]:
    """(name, Markdown) of everything the student was made from."""
    config, extra = facts.config, facts.student.extra
    rows = [
        ("base model", _base_words(facts)),
        *([("base weights", f"sha256 `{digest}`")] if (digest := (extra.get("base") or {}).get("sha256")) else []),
        *([("trained weights", _lora_words(facts))] if config.student.lora.rank else []),
        ("arm", f"`{facts.format.arm}`, seed {extra.get('seed')}, step {extra.get('step')}"),
        *([("variant", ", ".join(variant))] if (variant := variant_of(config)) else []),
        ("task", f"`{config.task}`" if config.task else "unnamed"),
        ("rows", _row_words(config)),
        ("shards", f"`{facts.chain['shards']}`" if facts.chain["shards"] else "not recorded"),
        *([("synthetic questions", made_up)] if (made_up := synthetic_words(facts)) else []),
    ]
    if facts.encoder is not None and ARMS[facts.format.arm].aligned:
        read = f", layer {facts.encoder['layer']}" if "layer" in facts.encoder else ""
        rows.append(("encoder of the teacher's rationales", f"`{facts.encoder['encoder']}`{read}"))
        rows.append(("embeddings", f"`{facts.chain['embeddings']}`"))
    return [*rows, ("student", f"`{facts.student.digest}`")]


def _lora_words(facts: CardFacts) -> str:
    lora = facts.config.student.lora
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    where = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    words = f"LoRA adapters of rank {lora.rank} (alpha {alpha:g}) on `{where}`, and the embeddings of the added tokens"
    if lora.quantize:
        words += f"; the base was in 4 bits ({lora.quantize}) while training"
    return words + ("" if facts.is_adapter else "; merged into the base's weights")


def synthetic_words(facts: CardFacts) -> str:
    """How many of the questions a model made up, by split; empty if none."""
    found = facts.student.extra.get("synthetic")
    if not found:
        return ""
    counts = " and ".join(f"{count:,} of the {split} questions" for split, count in sorted(found["rows"].items()))
    return f"{counts} were made up by {', '.join(f'`{name}`' for name in found['made_by'])}"


def _base_words(facts: CardFacts) -> str:
    student = facts.config.student
    if student.model_name_or_path is None:
        bpe = student.fresh.tokenizer == "bpe"
        return f"none: random weights, {'a tokenizer trained on the training rows' if bpe else 'bytes as tokens'}"
    base = f"`{facts.base_model}`" if facts.base_model else "a model from a local folder"
    if quantised := (facts.student.extra.get("base") or {}).get("quantised"):
        base += f", from a GGUF file: its weights were quantised ({quantised}) and converted back to float32"
    return base + (", an encoder whose weights the student started from" if warm_shape(student) is not None else "")
